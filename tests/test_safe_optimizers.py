"""Wrapped optimizers: the same updates, the same derivatives, and finite ones at zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Forward, MixedFlow, Reverse, Unroll
from metalearn.optimizers import differentiable_at_zero
from tests.inner_optimizers import FINITE, NAN, NAN_AT_ZERO

pytestmark = pytest.mark.usefixtures("x64")
EVERY = {**FINITE, **NAN_AT_ZERO, **NAN}
# One of each kind: moments, norms, powers, branches, and states of several layers.
KINDS = {
    name: EVERY[name]
    for name in ("adam", "lamb", "adafactor", "novograd", "schedule_free_adamw", "madgrad")
}
KINDS["MultiSteps"] = optax.MultiSteps(FINITE["clipped"], 2).gradient_transformation()
PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(3, 2) / 7, "b": jnp.array([0.3, -0.2])}


def gradients(key, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def trained(optimizer, scale, params, steps=3):
    """Return (params, state) after steps along given gradients, part of the first one scaled."""
    params = jax.tree.map(lambda x: jnp.asarray(x, scale.dtype), params)
    state = optimizer.init(params)
    for step in range(steps):
        grads = gradients(jax.random.key(step), params)
        grads = {**grads, "w": grads["w"].at[0].multiply(scale if step == 0 else 1)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("name", ["adam", "muon", "mechanize"])
def test_updates_and_states_are_the_same_to_the_bit_one_operation_at_a_time(name, scale):
    """Uncompiled: fusion could round two programs differently, whatever they compute."""
    optimizer, scale = EVERY[name], jnp.float32(scale)
    with jax.numpy_dtype_promotion("standard"):
        expected = trained(optimizer, scale, PARAMS, steps=2)
        same_bits(trained(differentiable_at_zero(optimizer), scale, PARAMS, steps=2), expected)


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_are_the_same_where_no_gradient_is_zero(name):
    def outcome(optimizer, scale):
        return ravel_pytree(trained(optimizer, scale, PARAMS)[0])[0]

    @functools.partial(jax.jit, static_argnums=0)
    def both(optimizer, scale):
        return outcome(optimizer, scale), jax.jacrev(functools.partial(outcome, optimizer))(scale)

    one = jnp.ones(())
    value, slope = both(differentiable_at_zero(KINDS[name]), one)
    expected, expected_slope = both(KINDS[name], one)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    assert jnp.linalg.norm(expected_slope) > 1e-6
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-12, atol=1e-14)


def test_the_derivative_at_zero_is_the_limit_of_those_beside_it():
    def update(g):
        optimizer = differentiable_at_zero(optax.adam(0.1, eps=1e-3))
        return optimizer.update(g, optimizer.init(g))[0]

    at_zero, beside = (float(jax.grad(update)(jnp.asarray(g))) for g in (0.0, 1e-12))
    np.testing.assert_allclose(at_zero, -0.1 / 1e-3, rtol=1e-12)
    np.testing.assert_allclose(beside, at_zero, rtol=1e-6)


def test_engines_agree_through_a_unit_whose_gradients_are_zero():
    optimizer = differentiable_at_zero(optax.adam(0.1))

    def loss(theta, x):
        hidden = jax.nn.relu(x * theta["w"] + theta["b"])
        return ((hidden * theta["v"]).sum() - x) ** 2

    def step(eta, state, x, grad):
        theta, inner = state
        updates, inner = optimizer.update(grad(loss)(theta, x), inner, theta)
        return optax.apply_updates(theta, updates), inner

    unroll = Unroll(
        lambda eta: (eta, optimizer.init(eta)),
        step,
        lambda eta, state: (loss(state[0], jnp.asarray(2.0)), {}),
    )
    eta = {name: jnp.array([0.5, 0.3]) for name in "wv"} | {"b": jnp.array([0.1, -99.0])}
    batches = jnp.array([1.0, 0.7, 1.3])

    def found(engine):
        return jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches)[1])(eta)

    expected = found(Reverse())
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert jnp.abs(expected["w"][0]) > 1e-3
    for engine in (Forward(), MixedFlow()):
        for name, leaf in found(engine).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-10, atol=1e-14)


def test_what_the_optimizer_closes_over_keeps_its_derivative():
    grads = {"w": PARAMS["w"], "b": None}

    def moved(rate, wrap):
        optimizer = wrap(optax.adam(rate))
        updates, _ = optimizer.update(grads, optimizer.init(grads))  # no params either
        return updates["w"].sum()

    ours, expected = (jax.grad(moved)(0.1, wrap) for wrap in (differentiable_at_zero, lambda o: o))
    assert abs(expected) > 1
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_extra_arguments_reach_the_optimizer():
    def scale_by_value():
        def update(updates, state, params=None, *, value):
            return jax.tree.map(lambda g: g * jnp.sqrt(value), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    def moved(value):
        return differentiable_at_zero(scale_by_value()).update(3.0, (), value=value)[0]

    assert moved(4.0) == 6.0 and jax.grad(moved)(4.0) == 0.75 and jax.grad(moved)(0.0) == 0.0
