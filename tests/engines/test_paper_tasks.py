"""The three tasks of Kemaev et al. 2025 (arXiv:2505.00793), on transformers of all libraries.

Per-parameter learning rates, MAML and loss weights, each with Adam in the inner loop: every
exact setting returns the meta-gradient of plain reverse mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Episode, MixedFlow, Reverse
from metalearn.algorithms import MAML, LearningRates, LossWeights, TokenWeights
from metalearn.datasets.text import Windows
from metalearn.models import (
    NNX,
    Haiku,
    Linen,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)
from metalearn.models.transformer import Architecture
from tests.cases import Float64

T, BATCH, S, TOKENS = 3, 2, 4, 5
SHAPE = Architecture(vocabulary=TOKENS, width=4, layers=2, heads=2, remat="block")
INPUTS = jax.ShapeDtypeStruct((1, S), jnp.int32)
MODELS = {
    "linen": Linen(linen_networks.Transformer(SHAPE), INPUTS, train_flag),
    "nnx": NNX(lambda rngs: nnx_networks.Transformer(SHAPE, rngs=rngs), train_flag),
    "haiku": Haiku(
        lambda x, train: haiku_networks.Transformer(SHAPE)(x, train), INPUTS, train_flag
    ),
}
ADAM = {"eps_root": 1e-4}
TASKS = {
    "rates": lambda model: LearningRates(model, optimizer=optax.adam(1.0, **ADAM), initial=0.01),
    "maml": lambda model: MAML(model, optimizer=optax.adam(0.01, **ADAM), inner_steps=T),
    "weights": lambda model: LossWeights(
        model, TokenWeights(hidden=(3,)), optax.adam(0.01, **ADAM)
    ),
}
SETTINGS = {
    "default": MixedFlow(),
    "none": MixedFlow("none"),
    "nested": MixedFlow("nested", segment=2),
    "host": MixedFlow(store="host"),
    "unpeeled": MixedFlow(peel=False),
    "reverse-peeled": Reverse("step", peel=True),
}


def episode(task):
    tokens = np.random.default_rng(0).integers(0, TOKENS, (T, BATCH, S + 1))
    windows = Windows(
        jnp.asarray(tokens[..., :-1], jnp.int32),
        jnp.asarray(tokens[..., 1:], jnp.int32),
        jnp.zeros((T, BATCH), jnp.int32),
        None,
    )
    query = jax.tree.map(lambda x: x[-1], windows)
    if task == "maml":
        return Episode(jax.tree.map(lambda x: x[0], windows)[:2], query[:2])
    return Episode(windows, query)


@functools.cache
def solved(task, library, engine):
    """Return (loss, meta-gradient) flat, at an eta away from where it begins."""
    algorithm, key = TASKS[task](Float64(MODELS[library])), jax.random.key(1)
    flat, unravel = ravel_pytree(jax.jit(algorithm.init)(key))
    flat = flat + 0.1 * jnp.sin(jnp.arange(flat.size, dtype=flat.dtype))

    @jax.jit
    def solve(flat, data):
        unroll, batches = algorithm.unroll(data, key), algorithm.batches(data, key)
        (loss, _), grads = engine.value_and_grad(unroll, unravel(flat), batches)
        return loss, ravel_pytree(grads)[0]

    return solve(flat, episode(task))


def assert_agrees(task, library, engine):
    loss, grads = solved(task, library, engine)
    expected_loss, expected = solved(task, library, Reverse())
    assert grads.dtype == np.float64 and jnp.linalg.norm(expected) > 1e-6
    assert abs(loss - expected_loss) < 1e-12
    assert jnp.linalg.norm(grads - expected) < 1e-10 * jnp.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("library", MODELS)
def test_mixed_flow_agrees_with_plain_reverse_on_the_tasks_of_the_paper(task, library):
    assert_agrees(task, library, SETTINGS["default"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("library", MODELS)
def test_all_exact_settings_agree_on_the_tasks_of_the_paper(task, library, setting):
    assert_agrees(task, library, SETTINGS[setting])
