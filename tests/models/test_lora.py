"""Low-rank terms around any model, as fast or as learned parameters; parts that are constants."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import MixedFlow, Trainer
from metalearn._utils.trees import paths, size
from metalearn.algorithms import MAML, LearningRates, squared_error
from metalearn.datasets import Sinusoid
from metalearn.models import Architecture, Functions, LoRA, Trainable, with_params
from tests.cases import ADAPTED, MODELS, mlp

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 5)[:, None]


def pretrained(model):
    return with_params(model, model.init(jax.random.key(1))[0])


@pytest.mark.parametrize("library", ADAPTED)
def test_a_model_of_any_library_begins_as_it_is_and_moves_by_its_terms(library):
    model = pretrained(mlp(library))
    lora = LoRA(model, rank=2, scale=0.5)
    params, state = lora.init(KEY)
    base, _ = model.init(KEY)
    expected, _ = model.apply(base, state, X, train=False)
    np.testing.assert_array_equal(lora.apply(params, state, X, train=False)[0], expected)
    assert len(params["lora"]) == 2  # matrices; biases have no term
    terms = jax.tree.map(jnp.ones_like, params["lora"])
    moved = jax.tree.map(lambda x: x + 0.5 * 2 if x.ndim == 2 else x, base)
    ours, _ = lora.apply({"base": base, "lora": terms}, state, X, train=False)
    np.testing.assert_allclose(ours, model.apply(moved, state, X, train=False)[0], rtol=1e-6)


def test_terms_of_stacked_matrices_are_stacked():
    architecture = Architecture(vocabulary=5, width=8, layers=3, heads=2)
    model = Functions(architecture.init, architecture.apply)
    params, _ = LoRA(model, 2, "^(query|value)$").init(KEY)
    shapes = jax.tree.map(jnp.shape, params["lora"])
    term = {"a": (3, 8, 2), "b": (3, 2, 8)}
    assert shapes == {"query": term, "value": term}


@pytest.mark.parametrize("learned", ["^lora", "^base"])
def test_terms_are_fast_and_learned_or_fast_around_a_slow_body(learned):
    model = pretrained(MODELS["Functions"])
    algorithm = MAML(
        LoRA(model, 1), squared_error, optax.sgd(0.1), 2, adapted="^lora", learned=learned
    )
    trainer = Trainer(algorithm, MixedFlow(), optax.sgd(0.1), tasks_per_step=2)
    state = trainer.init(KEY)
    assert all(f"params/{learned[1:]}" in path for path in paths(state.eta))
    after, metrics = trainer.step(state, Sinusoid())
    assert metrics["meta_grad_norm"] > 0 and metrics["inner_update_norm"] > 0
    assert jax.tree.structure(after.eta) == jax.tree.structure(state.eta)


def test_a_rank_of_a_model_that_is_not_pretrained_is_refused_by_what_would_freeze_it():
    algorithm = MAML(LoRA(MODELS["Functions"], 1), adapted="^lora", learned="^lora")
    with pytest.raises(ValueError, match="leaves base/body as the model initialises it, which is"):
        algorithm.init(KEY)


REFUSED = {
    "no matrix": (
        lambda: LoRA(mlp("linen"), 1, "bias").init(KEY),
        "`LoRA(paths='bias')` chooses no matrix, which is an array of two axes or more. There are:",
    ),
    "no path": (
        lambda: LoRA(mlp("linen"), 1, "tail").init(KEY),
        "No parameter path matches 'tail'. There are:",
    ),
    "no rank": (lambda: LoRA(mlp("linen"), 0), "`LoRA(rank=0)`: it is an integer, 1 or more."),
    "a random rest": (
        lambda: Trainable(mlp("linen"), "head"),
        "`Trainable(paths='head')` makes the other parameters constants, but the model draws them "
        "at random. Give it their values: `with_params(model, params)`.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_trainable_parameters_are_all_that_another_algorithm_sees():
    model = pretrained(mlp("linen"))
    part = Trainable(LoRA(model, 1), "^lora")
    params, state = part.init(KEY)
    assert size(params) == 2 * (1 + 3) and all(p.startswith("lora/") for p in paths(params))
    whole = part.whole(params)
    np.testing.assert_array_equal(
        part.apply(params, state, X, train=False)[0],
        LoRA(model, 1).apply(whole, state, X, train=False)[0],
    )
    algorithm = LearningRates(part, squared_error)
    assert paths(algorithm.init(KEY)) == paths(params)
    assert size(algorithm.constants()) == 10
