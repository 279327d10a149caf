"""Wrapped optimizers: the same updates, the same derivatives, and finite ones at zero."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from optax import contrib

from metalearn import Forward, MixedFlow, Reverse, Unroll
from metalearn.engines.inner_loop import rollout
from metalearn.experiments.benchmarks import optimizers as table
from metalearn.optimizers.differentiable import differentiable_at_zero
from tests.helpers.inner_optimizers import FINITE, NAN, NAN_AT_ALL_ZERO, NAN_AT_ZERO, documented
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
EVERY = {**FINITE, **NAN_AT_ZERO, **NAN_AT_ALL_ZERO, **NAN}
# One of each kind: moments, norms, powers, branches, and states of several layers.
KINDS = {
    name: EVERY[name]
    for name in ("adam", "lamb", "adafactor", "novograd", "schedule_free_adamw", "madgrad")
}
KINDS["MultiSteps"] = optax.MultiSteps(EVERY["clipped"], 2).gradient_transformation()
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
@pytest.mark.parametrize(
    "name",
    quick(
        ["adam", "muon", "mechanize", "clipped", "radam"],
        lambda name: name not in ("muon", "mechanize"),
    ),
)
def test_updates_and_states_are_the_same_to_the_bit_one_operation_at_a_time(name, scale):
    """Uncompiled: fusion could round two programs differently, whatever they compute."""
    optimizer, scale = EVERY[name], jnp.float32(scale)
    with jax.numpy_dtype_promotion("standard"):
        expected = trained(optimizer, scale, PARAMS, steps=2)
        same_bits(trained(differentiable_at_zero(optimizer), scale, PARAMS, steps=2), expected)


@pytest.mark.parametrize("name", quick(KINDS, lambda name: name in ("adam", "madgrad")))
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("optimizer", "weights"),
    quick(
        [
            (optax.adam(0.1), (1, 1, 1)),
            (optax.chain(optax.clip_by_global_norm(1.0), optax.lars(0.1)), (0, 1, 0)),
        ],
        lambda optimizer, weights: all(weights),
    ),
    ids=["adam", "clipped lars, steps without a gradient"],
)
def test_engines_agree_through_a_unit_whose_gradients_are_zero(optimizer, weights):
    optimizer = differentiable_at_zero(optimizer)

    def loss(theta, batch):
        x, weight = batch
        hidden = jax.nn.relu(x * theta["w"] + theta["b"])
        return weight * ((hidden * theta["v"]).sum() - x) ** 2

    def step(eta, state, x, grad):
        theta, inner = state
        updates, inner = optimizer.update(grad(loss)(theta, x), inner, theta)
        return optax.apply_updates(theta, updates), inner

    unroll = Unroll(
        lambda eta: (eta, optimizer.init(eta)),
        step,
        lambda eta, state: (loss(state[0], (jnp.asarray(2.0), 1.0)), {}),
    )
    eta = {name: jnp.array([0.5, 0.3]) for name in "wv"} | {"b": jnp.array([0.1, -99.0])}
    batches = jnp.array([1.0, 0.7, 1.3]), jnp.array(weights, float)

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


# An optimizer, and the weight of an inner loss: at 0 its gradient is zero in every entry.
SAMPLES = {
    "radam": (optax.radam(0.1), 1.0),
    "radam, nesterov": (optax.radam(0.1, nesterov=True), 1.0),
    "clip_by_global_norm": (EVERY["clipped"], 0.0),
    "clip_by_block_rms": (EVERY["clipped_by_block"], 0.0),
    "adaptive_grad_clip": (EVERY["clipped_adaptively"], 0.0),
    "clip_by_global_norm, momentum": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        0.0,
    ),
    "normalize_by_update_norm": (
        optax.chain(optax.normalize_by_update_norm(eps=1.0), optax.sgd(0.1)),
        0.0,
    ),
    "scale_by_trust_ratio": (EVERY["trust_ratio"], 0.0),
    "lars": (EVERY["lars"], 0.0),
    "lamb": (EVERY["lamb"], 0.0),
    "novograd": (EVERY["novograd"], 0.0),
    "novograd, weight decay": (optax.novograd(0.1, weight_decay=0.1), 0.0),
}
# Whose update is differentiable in the gradient at zero, as clipping is: the identity around it.
SMOOTH = [name for name in SAMPLES if "clip" in name or name.startswith(("radam", "normalize"))]


def after_eight_steps(optimizer, params, weight):
    """Return the outer loss after eight steps; its derivatives at weight 0 are the question."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: (weight * (p - 2) ** 2 * jnp.array([1.0, 2.0])).sum())(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    return ((jax.lax.scan(step, start, None, 8)[0][0] - 1) ** 2).sum()


@functools.cache
def sampled(name):
    """Return of a sample: derivatives of the optimizer wrapped, and as it is; and differences."""
    optimizer, weight = SAMPLES[name]

    def derivatives(params, shift):
        gradient = [
            jax.grad(functools.partial(after_eight_steps, chosen), argnums=(0, 1))
            for chosen in (differentiable_at_zero(optimizer), optimizer)
        ]
        at = weight + shift  # no constant: the compiler would fold the samples
        value = functools.partial(after_eight_steps, optimizer)
        eps = 1e-6
        moves = [jnp.array([eps, 0.0]), jnp.array([0.0, eps])]
        by_params = jnp.stack([value(params + d, at) - value(params - d, at) for d in moves])
        by_weight = value(params, at + eps) - value(params, at - eps)
        return (*(g(params, at) for g in gradient), (by_params / (2 * eps), by_weight / (2 * eps)))

    with jax.enable_x64(True):
        return jax.jit(derivatives)(jnp.array([0.3, 0.6]), jnp.zeros(()))


@pytest.mark.parametrize(
    "name", quick(SAMPLES, lambda name: name in ("radam", "clip_by_global_norm", "lamb"))
)
def test_derivatives_are_right_where_those_of_the_optimizer_are_nan(name):
    ours, as_it_is, differences = sampled(name)
    assert jnp.isnan(as_it_is[0]).any() or jnp.isnan(as_it_is[1])
    np.testing.assert_allclose(ours[0], differences[0], rtol=1e-6, atol=1e-8)
    assert jnp.isfinite(ours[1]) and jnp.abs(ours[0]).min() > 1e-2
    if name in SMOOTH:
        np.testing.assert_allclose(ours[1], differences[1], rtol=1e-4)


def test_radam_has_the_meta_gradient_of_its_loop():
    np.testing.assert_allclose(sampled("radam")[0][0], [0.26809, -0.68673], atol=5e-6)


# Learning-rate-free optimizers and Muon: the optimizer, and T, the inner steps. They begin with a
# scale that is large enough to adapt within T; or with the default one, and take more steps.
SCALED = {
    "mechanize": (contrib.mechanize(optax.sgd(1.0), s_init=0.05), 6),
    "mechanize, adam": (contrib.mechanize(optax.adam(1.0), s_init=0.05), 6),
    "mechanize, default": (contrib.mechanize(optax.sgd(1.0)), 20),
    "prodigy": (contrib.prodigy(1.0, estim_lr0=0.05), 6),
    "prodigy, default": (contrib.prodigy(1.0), 30),
    "muon": (contrib.muon(0.1), 4),
    "muon, weight decay": (contrib.muon(0.1, nesterov=False, weight_decay=0.1), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_the_meta_gradient_through_it_agrees_with_central_differences(name):
    """Of an initialisation, a matrix and a vector, and of the weights of two kinds of examples."""
    optimizer, steps = SCALED[name]
    wrapped = differentiable_at_zero(optimizer)
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (steps + 1, 8, 3))
    batches = inputs, jnp.sin(inputs @ jnp.arange(1.0, 4))

    def losses(theta, batch):
        inputs, targets = batch
        return (jnp.tanh(inputs @ theta["w"]) @ theta["b"] - targets) ** 2

    def unroll(optimizer):
        def step(eta, state, batch, grad):
            theta, inner = state
            weights = jnp.exp(eta["log_weights"]).repeat(4)
            grads = grad(lambda t, b: (weights * losses(t, b)).mean())(theta, batch)
            updates, inner = optimizer.update(grads, inner, theta)
            return optax.apply_updates(theta, updates), inner

        def loss(eta, state):
            return losses(state[0], jax.tree.map(lambda x: x[-1], batches)).mean(), {}

        return Unroll(lambda eta: (eta["theta"], optimizer.init(eta["theta"])), step, loss)

    eta = {
        "theta": {"w": jax.random.normal(key, (3, 2)), "b": jnp.array([0.9, -0.7])},
        "log_weights": jnp.array([0.3, -0.1]),
    }
    flat, unravel = ravel_pytree(eta)
    inner = jax.tree.map(lambda x: x[:-1], batches)

    @jax.jit
    def measured(flat):
        moves = 1e-5 * jnp.eye(flat.size)
        outer = jax.vmap(lambda v: rollout(unroll(optimizer), unravel(v), inner)[0])
        near, far = (outer(flat[None] + d) - outer(flat[None] - d) for d in (moves, 2 * moves))
        grads = [
            ravel_pytree(engine.value_and_grad(unroll(wrapped), unravel(flat), inner)[1])[0]
            for engine in (Reverse(), MixedFlow())
        ]
        return (8 * near - far) / 12e-5, grads

    differences, grads = measured(flat)
    assert jnp.abs(differences).min() > 1e-8
    for found in grads:
        error = jnp.linalg.norm(found - differences) / jnp.linalg.norm(differences)
        assert error < 1e-6, error


def norm(g):
    return jnp.sqrt((g**2).sum())


def clipped(g):
    return jnp.where(norm(g) < 1, g, g / norm(g))


@jax.custom_jvp
def own_rule(x):
    return x**2


own_rule.defjvp(lambda primals, tangents: (primals[0] ** 2, 3 * primals[0] * tangents[0]))

# Updates that use no value that is not finite: forward mode drops the tangents with the values.
QUICK = ("vmap", "scan", "cond", "checkpoint", "reciprocal root", "logarithm")
UPDATES = {
    "jit": lambda g: jax.jit(clipped)(g),
    "vmap": lambda g: jax.vmap(lambda x: jnp.where(x == 0, 2 * x, x**2 / jnp.abs(x)))(g),
    "fori_loop": lambda g: jax.lax.fori_loop(0, 3, lambda i, x: 1.5 * clipped(x), g),
    "scan": lambda g: jax.lax.scan(lambda x, k: (k * clipped(x), x), g, jnp.arange(1.0, 4))[0],
    "while_loop": lambda g: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, 1.5 * clipped(c[1])), (0, g)
    )[1],
    "cond": lambda g: jax.lax.cond(g.sum() < 1, clipped, lambda g: g / norm(g), g),
    "checkpoint": lambda g: jax.checkpoint(clipped)(g),
    "root of a negative number": lambda g: jnp.where(g < 5, g, jnp.sqrt(g - 5) * g),
    "reciprocal root": lambda g: jnp.where(g == 0, g, g**2 * jax.lax.rsqrt(g**2)),
    "reciprocal power": lambda g: jnp.where(g == 0, g, g**3 * g**-2),
    "fractional power": lambda g: jnp.where(g == 0, g, jnp.sign(g) * jnp.abs(g) ** 0.3),
    "logarithm": lambda g: jnp.where(g > 0, g * jnp.log(g), g),
    "overflow": lambda g: jnp.where(g < 1, g, jnp.exp(1e4 * (g + 1))),
    "angle": lambda g: jnp.where(g == 0, g, jnp.arctan2(g, g**2)),
    "product of matrices": lambda g: jnp.where(norm(g) > 0, jnp.outer(g, g) @ (g / norm(g)), g),
    "largest": lambda g: g * jnp.where(norm(g) > 0, (g / norm(g)).max(), 1.0),
    "cumulative": lambda g: jnp.where(norm(g) > 0, jnp.cumprod(g / norm(g)), g),
    "rule of its own": lambda g: jnp.where(norm(g) > 0, own_rule(g / norm(g)), g),
    "hyperbolic": lambda g: jnp.where(norm(g) > 0, jnp.tanh(g / norm(g)), g),
}


@pytest.fixture(scope="module")
def jacobians():
    """Return by update: Jacobians at 0 forward and reverse, expected; and elsewhere likewise."""

    def one(name, g):
        plain = UPDATES[name]
        wrapped = differentiable_at_zero(optax.stateless(lambda g, _: plain(g)))

        def ours(g):
            return wrapped.update(g, wrapped.init(g))[0]

        def taken(g):
            reverse = jax.jacfwd if name == "while_loop" else jax.jacrev
            return jax.jacfwd(ours)(g), reverse(ours)(g), jax.jacfwd(plain)(g)

        return taken(0 * g), taken(g)

    with jax.enable_x64(True):
        program = jax.jit(lambda g: {name: one(name, g) for name in UPDATES})
        return program(jnp.array([0.3, -0.8, 0.2]))


@pytest.mark.parametrize("name", quick(UPDATES, lambda name: name in QUICK))
def test_what_is_not_used_has_no_derivative_whatever_it_is_inside_of(jacobians, name):
    for forward, reverse, expected in jacobians[name]:
        assert jnp.linalg.norm(expected) > 1e-3
        np.testing.assert_allclose(forward, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(reverse, expected, rtol=1e-12, atol=1e-14)


def test_a_norm_that_is_used_has_the_derivative_zero_where_it_has_none():
    scaled = differentiable_at_zero(optax.stateless(lambda g, _: g + norm(g)))
    slopes = jax.jacrev(lambda g: scaled.update(g, scaled.init(g))[0])(jnp.zeros(2))
    np.testing.assert_array_equal(slopes, jnp.eye(2))


def test_a_complex_gradient_that_is_zero_is_clipped_like_a_real_one():
    optimizer = differentiable_at_zero(optax.clip_by_global_norm(1.0))

    def size(scale):
        g = {"w": scale * jnp.array([1 + 2j, 3j])}
        return (jnp.abs(optimizer.update(g, optimizer.init(g))[0]["w"] - 1) ** 2).sum()

    slope = jax.jit(jax.grad(size))
    np.testing.assert_allclose(slope(0.0), -2.0, rtol=1e-12)
    np.testing.assert_allclose(slope(7.0), 0.0, atol=1e-12)


def test_the_factors_of_a_decomposition_are_differentiated_where_they_can_be():
    def factor(i):
        made = differentiable_at_zero(optax.stateless(lambda x, _: jnp.linalg.svd(x)[i]))
        return lambda x: made.update(x, made.init(x))[0]

    ours, plain = (
        [jax.jit(jax.jacrev(f)) for f in functions]
        for functions in (
            (factor(0), factor(1)),
            (lambda x: jnp.linalg.svd(x)[0], lambda x: jnp.linalg.svd(x)[1]),
        )
    )
    zero, other = jnp.zeros((2, 2)), jnp.array([[1.0, 2.0], [3.0, 5.0]])
    for x in (zero, other):  # singular values have a derivative at zero, singular vectors none
        np.testing.assert_allclose(ours[1](x), plain[1](x), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(ours[0](zero), 0)
    np.testing.assert_allclose(ours[0](other), plain[0](other), rtol=1e-12, atol=1e-14)


def test_second_derivatives_are_those_of_the_limit():
    optimizer = differentiable_at_zero(optax.adam(0.1, eps=1e-3))

    def square(g):
        return (optimizer.update(g, optimizer.init(g))[0] ** 2).sum()

    hessian = jax.jit(jax.hessian(square))(jnp.zeros(2))
    np.testing.assert_allclose(hessian, 2 * (0.1 / 1e-3) ** 2 * jnp.eye(2), rtol=1e-9)


def test_every_optimizer_of_optax_is_in_the_table_or_said_not_to_be():
    def makers(module, prefix):
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or not isinstance(
                value, types.FunctionType | functools.partial
            ):
                continue
            made = str(inspect.signature(value).return_annotation)
            if "GradientTransformation" in made or name in ("dog", "dowg", "scale_by_factored_rms"):
                yield prefix + name

    rows = {name.partition(",")[0] for name in table.optimizers()}
    there = {*makers(optax, ""), *makers(contrib, "contrib.")}
    assert there - rows == table.MADE_OF_OTHERS | table.NOT_INNER
    assert rows - there == {"MultiSteps"}


def test_the_documented_table_has_every_optimizer_and_nothing_left_unexplained():
    assert [name for name, _ in documented()] == list(table.optimizers())
    for name, (as_it_is, _, wrapped, _, compared) in documented():
        assert compared == "same"
        if wrapped != "finite":  # there is no derivative where there is no value
            assert as_it_is.endswith("all zero (update)") and wrapped == "NaN: all zero (update)"
            assert name in UNDEFINED


# Their updates are NaN for a gradient of zeros alone: zero divided by zero.
UNDEFINED = ("contrib.dadapt_adamw", "contrib.normalize", "contrib.prodigy", "contrib.sam")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optax, on its own arguments
@pytest.mark.parametrize("name", table.optimizers())
def test_an_optimizer_is_as_the_documentation_says(name):
    # Some of optax promote ranks. The flags of tests round two programs differently.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        measured = table.cells(table.optimizers()[name], rounding=1e-13)
    assert measured == dict(documented())[name]
