"""Inner gradients of a segment that are computed going forward, for the backward pass to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import ExampleMean, MixedFlow, Reverse, Unroll
from metalearn.engines.segments import Cotangents
from tests.helpers.selection import quick

ETA = {"rate": np.array(0.1), "pull": np.array([0.3, -0.2, 0.5])}
INPUTS = np.random.default_rng(0).normal(size=(4, 6, 3))  # [K, batch, ...]
STATE = {"w": np.array([0.4, -0.1, 0.2]), "mean": np.zeros(()), "count": np.zeros((), np.int32)}


def step(eta, state, batch, grad):
    """A step whose loss returns outputs that nobody reads, and a statistic of the next state."""

    def loss(w):
        outputs = jnp.tanh(batch @ w)
        aux = {"outputs": outputs, "mean": outputs.mean()}
        return ((outputs - batch @ eta["pull"]) ** 2).mean(), aux

    slope, aux = grad(loss, has_aux=True)(state["w"])
    # A gradient inside a transformation of the step's own is not recorded.
    decay = jax.vmap(grad(lambda w: w**4))(state["w"])
    w = state["w"] - eta["rate"] * (slope + 0.01 * decay + state["mean"] * jnp.tanh(slope))
    return {"w": w, "mean": 0.9 * state["mean"] + aux["mean"], "count": state["count"] + 1}


def in_examples(eta, state, batch, grad):
    def loss(w, example, pull):
        return (jnp.tanh(example @ w) - example @ pull) ** 2

    slope = grad(ExampleMean(loss))(state["w"], batch, eta["pull"])
    return {**state, "w": state["w"] - eta["rate"] * slope / (0.1 + jnp.abs(slope))}


def unroll(step):
    return Unroll(lambda eta: STATE, step, lambda eta, state: (jnp.sum(state["w"] ** 2), {}))


def pulled(engine, step, reads=True):
    """Cotangents of (w, mean) and eta before four steps, and the inner gradients of the steps."""
    inputs = unroll(step), *jax.tree.map(jnp.asarray, (ETA, STATE, INPUTS))
    _, inner, gradients = engine.advance(*inputs)
    after = Cotangents([jnp.asarray(0.5), jnp.asarray([1.0, -2.0, 0.7])], inputs[1])
    return engine.pull_back(*inputs, gradients if reads else [], after), gradients, inner


@pytest.mark.parametrize(
    ("remat", "step", "options"),
    quick(
        [
            (remat, *case)
            for case in [(step, {}), (in_examples, {}), (in_examples, {"micro_batches": 3})]
            for remat in ("none", "step", "nested")
        ],
        lambda remat, step, options: remat == ("nested" if options else "step"),
    ),
)
def test_the_backward_pass_reads_inner_gradients_or_computes_them(remat, step, options, x64):
    engine = MixedFlow(remat, **options)
    found, gradients, inner = pulled(engine, step)
    assert gradients[-1].shape == (4, 3) and inner.losses.shape == (4, 1)
    for expected in (pulled(engine, step, reads=False)[0], pulled(Reverse(), step)[0]):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_outputs_of_the_inner_loss_that_no_state_depends_on_are_not_saved():
    inputs = jax.tree.map(jnp.asarray, (ETA, STATE, INPUTS))
    shapes = jax.eval_shape(lambda *inputs: MixedFlow().advance(unroll(step), *inputs), *inputs)
    assert sorted(leaf.shape for leaf in shapes[2]) == [(4,), (4, 3)]  # neither loss nor outputs


@pytest.mark.parametrize(
    "engine",
    [
        Reverse(),
        Reverse("step"),
        MixedFlow("segments"),
        MixedFlow("nested", budget=100),
        MixedFlow(store="inexact_bfloat16"),
        MixedFlow("inexact_reconstruct"),
    ],
)
def test_an_engine_that_saves_fewer_residuals_returns_none(engine):
    inputs = jax.tree.map(jnp.asarray, (ETA, STATE, INPUTS))
    shapes = jax.eval_shape(lambda *inputs: engine.advance(unroll(step), *inputs), *inputs)
    assert shapes[2] == []


def test_inner_gradients_that_are_read_are_not_saved_twice():
    size, steps = 1000, 8

    def step(eta, w, batch, grad):
        return w - eta * grad(lambda w: jnp.sum(jnp.sin(w * batch)))(w)

    bowl = Unroll(lambda eta: jnp.ones(size), step, lambda eta, w: (w.sum(), {}))
    inputs = jnp.asarray(0.1), jnp.ones(size), jnp.arange(float(steps))

    def back(eta, w, batches, gradients):
        after = Cotangents([jnp.ones(size)], eta)
        return MixedFlow().pull_back(bowl, eta, w, batches, gradients, after)

    gradients = [jax.ShapeDtypeStruct((steps, size), jnp.float32)]
    saved = [
        jax.jit(back).lower(*inputs, each).compile().memory_analysis().temp_size_in_bytes
        for each in (gradients, [])
    ]
    one = 4 * size
    assert steps * one <= saved[0] < (steps + 4) * one  # the states
    assert saved[1] >= 2 * steps * one  # and the gradients
