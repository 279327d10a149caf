"""bfloat16 parameters or computation: the meta-gradient is that of float32 within a few percent."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML, squared_error
from metalearn.datasets import Sinusoid
from metalearn.models import Functions, Precision
from metalearn.optimizers import master_weights
from tests.cases import ENGINES, conv_net
from tests.helpers.selection import quick

KEY, WIDTH, LARGEST_ERROR = jax.random.key(0), 16, 0.05
TASKS = Sinusoid(shots=10, queries=10)


def network():
    def init(key):
        first, middle, head = jax.random.split(key, 3)
        return {
            "first": jax.random.normal(first, (1, WIDTH)),
            "middle": jax.random.normal(middle, (WIDTH, WIDTH)) / 4,
            "head": jax.random.normal(head, (WIDTH, 1)) / 4,
        }

    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params["first"]) @ params["middle"]) @ params["head"]

    return Functions(init, apply)


ADAM = optax.adam(1e-2, eps_root=1e-6)
KINDS = {
    "compute": (Precision(network(), compute=jnp.bfloat16), ADAM),
    "params": (Precision(network(), params=jnp.bfloat16), ADAM),
    "master weights": (Precision(network(), params=jnp.bfloat16), master_weights(ADAM)),
}


def meta_gradient(model, optimizer, engine):
    algorithm = MAML(model, squared_error, optimizer, inner_steps=3)
    task, eta = TASKS.sample(jax.random.key(3)), algorithm.init(KEY)

    @jax.jit
    def solve(eta):
        unroll, batches = algorithm.unroll(task, KEY), algorithm.batches(task, KEY)
        return engine.value_and_grad(unroll, eta, batches)

    (loss, _), grads = solve(eta)
    assert loss.dtype == jnp.float32
    assert jax.tree.map(jnp.result_type, grads) == jax.tree.map(jnp.result_type, eta)
    return ravel_pytree(jax.tree.map(lambda g: g.astype(jnp.float32), grads))[0]


@functools.cache
def in_float32():
    return meta_gradient(network(), ADAM, Reverse())


@pytest.mark.parametrize(
    ("kind", "engine"),
    quick(
        [(kind, engine) for kind in KINDS for engine in ENGINES],
        lambda kind, engine: engine == "MixedFlow" or (kind, engine) == ("params", "Reverse-step"),
    ),
)
def test_the_meta_gradient_in_bfloat16_is_near_that_in_float32(kind, engine):
    grads = meta_gradient(*KINDS[kind], ENGINES[engine])
    error = jnp.linalg.norm(grads - in_float32()) / jnp.linalg.norm(in_float32())
    assert 1e-4 < error < LARGEST_ERROR  # not float32 in disguise


@pytest.mark.slow
def test_types_are_what_was_asked_for_and_the_state_keeps_its_own():
    images = jnp.ones((2, 4, 4, 1), jnp.float32)
    model = Precision(conv_net("linen"), compute=jnp.bfloat16, params=jnp.bfloat16)
    params, state = model.init(KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    outputs, new = model.apply(params, state, images, train=True)
    assert outputs.dtype == jnp.float32
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
    seen = []
    spy = Functions(lambda key: jnp.ones(2), lambda w, x: seen.append((w.dtype, x.dtype)) or x)
    Precision(spy, compute=jnp.bfloat16).apply(jnp.ones(2), (), images, train=True)
    Precision(spy).apply(jnp.ones(2), (), jnp.arange(2), train=True)
    assert seen == [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.int32)]


@pytest.mark.parametrize("dtype", [jnp.int32, "bfloat"])
def test_a_type_that_is_not_floating_is_refused(dtype):
    message = f"`Precision(compute={dtype!r})`: it is a floating-point type, such as"
    with pytest.raises(ValueError, match=re.escape(message)):
        Precision(network(), compute=dtype)


# Master weights.


def descended(optimizer, params, grads, steps):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_small_steps_are_lost_in_bfloat16_and_summed_by_master_weights():
    params, grads = jnp.ones(3, jnp.bfloat16), jnp.full(3, 1e-3, jnp.bfloat16)
    lost, _ = descended(optax.sgd(1.0), params, grads, 100)
    summed, state = descended(master_weights(optax.sgd(1.0)), params, grads, 100)
    exact = 1 - 100 * grads.astype(jnp.float32)
    assert (lost == 1).all() and summed.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.params, exact, rtol=1e-5)
    np.testing.assert_array_equal(summed, state.params.astype(jnp.bfloat16))


def test_master_weights_of_float32_parameters_change_nothing():
    params, grads = jnp.arange(1.0, 4.0), jnp.arange(3.0) - 1
    ours, _ = descended(master_weights(ADAM), params, grads, 5)
    theirs, _ = descended(ADAM, params, grads, 5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_master_weights_ask_for_parameters():
    optimizer = master_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"`master_weights` needs the parameters: `update\(grads"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))


@pytest.mark.slow
def test_master_weights_serve_the_outer_loop_of_an_eta_in_bfloat16():
    model, optimizer = KINDS["master weights"]
    algorithm = MAML(model, squared_error, optimizer, inner_steps=2)
    trainer = Trainer(algorithm, MixedFlow(), master_weights(optax.sgd(1e-4)), tasks_per_step=2)
    state = trainer.init(KEY)
    for _ in range(2):
        state, _ = trainer.step(state, TASKS)
    start = trainer.init(KEY)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), state.optimizer.params, start.optimizer.params
    )
    assert all(jax.tree.leaves(moved))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.eta)} == {jnp.dtype("bfloat16")}
    jax.tree.map(
        lambda eta, master: np.testing.assert_array_equal(eta, master.astype(jnp.bfloat16)),
        state.eta,
        state.optimizer.params,
    )
