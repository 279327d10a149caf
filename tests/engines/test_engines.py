"""What an engine owes any inner loop: the derivative of the loss, whatever is in a step.

Each scenario below is an unroll of three steps with something in it that a derivative
can get lost in. The reference is the same loop by hand: a Python loop with `jax.grad`.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import ExampleMean, Forward, MetaGradient, MixedFlow, Reverse, Unroll
from metalearn.engines.mixed_flow.forward_over_reverse import pushforward
from tests.cases import ENGINES
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
T = 3


def eta_and_batches(steps=T):
    """Eta of 3 scalars; batches of 4 points in the plane with targets."""
    x_key, y_key = jax.random.split(jax.random.key(3))
    eta = {"start": jnp.array([0.3, -0.4]), "log_rate": jnp.array(-1.0)}
    x, y = jax.random.normal(x_key, (steps, 4, 2)), jax.random.normal(y_key, (steps, 4))
    return eta, (x, y)


def fit(theta, batch):
    """A loss that is not quadratic in theta [2]."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ theta) - y) ** 2)


def penalised(eta, theta, batch):
    """The inner loss, one of whose terms is learned: eta acts through it on theta."""
    return fit(theta, batch) + jnp.exp(eta["log_rate"]) * jnp.sum(jnp.cos(theta))


def descend(eta, theta, grads):
    return theta - jnp.exp(eta["log_rate"]) * grads


def simple(step, init=lambda eta: eta["start"], result=lambda eta, theta: theta):
    """An unroll whose loss is a function of `result`, an array of shape [2]."""

    def loss(eta, state):
        out = result(eta, state)
        return jnp.sum(jnp.sin(out) * jnp.arange(1.0, 3.0)), {"first": out[0]}

    return Unroll(init, step, loss)


def plain_step(eta, theta, batch, grad):
    return descend(eta, theta, grad(fit)(theta, batch))


def closes_over_eta():
    def step(eta, theta, batch, grad):
        squared = jax.tree.map(jnp.square, eta)  # an intermediate, not eta itself
        grads = grad(lambda theta: penalised(eta, theta, batch) + penalised(squared, theta, batch))
        return descend(eta, theta, grads(theta))

    return simple(step)


def closes_over_eta_inside_jit():
    def step(eta, theta, batch, grad):
        loss = jax.jit(lambda theta: jax.jit(penalised)(eta, theta, batch))
        return descend(eta, theta, jax.jit(lambda theta: grad(loss)(theta))(theta))

    return simple(step)


def closes_over_eta_inside_vmap():
    def step(eta, theta, batch, grad):
        def of_one(x, y):
            return grad(lambda theta: penalised(eta, theta, (x[None], y[None])))(theta)

        return descend(eta, theta, jax.vmap(of_one)(*batch).mean(0))

    return simple(step)


def gradient_inside_scan_and_cond():
    def step(eta, theta, batch, grad):
        def inner(theta, example):
            moved = descend(eta, theta, grad(lambda theta: penalised(eta, theta, example))(theta))
            return jax.lax.cond(moved[0] > 0.2, lambda: moved, lambda: 0.5 * moved), None

        x, y = batch
        return jax.lax.scan(inner, theta, (x[:, None], y[:, None]))[0]

    return simple(step)


def eta_is_an_argument():
    def step(eta, theta, batch, grad):
        return descend(eta, theta, grad(penalised, argnums=1)(eta, theta, batch))

    return simple(step)


def aux_carries_gradient():
    """Batch statistics that later steps and the outer loss read, and the loss value."""

    def step(eta, state, batch, grad):
        theta, mean, total = state

        def loss(theta):
            out = batch[0] @ theta - mean
            statistics = 0.9 * mean + 0.1 * jnp.sin(out).mean() * eta["log_rate"]
            value = penalised(eta, theta, (batch[0] - mean, batch[1])) + jnp.mean(out**2)
            return value, {"mean": statistics, "value": value, "unused": out}

        grads, aux = grad(loss, has_aux=True)(theta)
        return descend(eta, theta, grads), aux["mean"], total + aux["value"] ** 2

    def start(eta):
        return eta["start"], jnp.array(0.2), jnp.array(0.0)

    return simple(step, start, lambda eta, state: state[0] * state[1] + state[2])


def only_aux_is_used():
    def step(eta, theta, batch, grad):
        _, value = grad(lambda theta: (penalised(eta, theta, batch),) * 2, has_aux=True)(theta)
        return theta * jnp.cos(value)

    return simple(step)


def complex_aux_and_closure():
    """A spectrum as an intermediate value: complex values whose cotangents are complex too."""

    def step(eta, theta, batch, grad):
        phases = jnp.exp(1j * eta["log_rate"] * jnp.arange(theta.size))  # complex, and of eta

        def loss(theta):
            spectrum = jnp.fft.fft(theta * phases)
            return penalised(eta, theta, batch) + jnp.sum(jnp.abs(spectrum) ** 2), spectrum

        grads, spectrum = grad(loss, has_aux=True)(theta)
        return descend(eta, theta, grads) + 0.1 * jnp.real(spectrum * phases) * theta

    return simple(step)


def two_players():
    """Several gradients in one step, tuples of argnums, and a state of several leaves."""

    def payoff(batch, ours, theirs, rate):
        return fit(ours["w"], batch) + ours["w"] @ jnp.tanh(theirs) + rate * theirs @ theirs

    def step(eta, state, batch, grad):
        ours, theirs = state
        rate = jnp.exp(eta["log_rate"])
        grads, (slope,) = grad(payoff, argnums=(1, 3))(batch, ours, theirs, rate), (1.0,)
        ours = jax.tree.map(lambda p, g: p - rate * slope * g * grads[1], ours, grads[0])
        theirs = theirs + rate * grad(payoff, 2)(batch, ours, theirs, rate)
        (again,) = grad(lambda theta: fit(theta, batch), (0,))(theirs)
        return ours, theirs - rate * again

    def start(eta):
        return {"w": eta["start"]}, jnp.array([0.1, 0.7]) * eta["log_rate"]

    return simple(step, start, lambda eta, state: state[0]["w"] + eta["log_rate"] * state[1])


def keywords_and_static_arguments():
    def loss(theta, batch, flip, *, scale, power=2):
        assert flip is True and power == 3  # Python values stay Python values
        return scale * fit(-theta if flip else theta, batch) ** power

    def step(eta, theta, batch, grad):
        scale = jnp.exp(eta["log_rate"])
        return descend(eta, theta, grad(loss)(theta, batch, True, scale=scale, power=3))

    return simple(step)


def keys_integers_and_booleans():
    """In the state, in the batches, closed over, as arguments and as aux."""

    def step(eta, state, batch, grad):
        (points, batch_key, number, odd) = batch

        def loss(theta, key, mask):
            noise = jax.random.normal(key, theta.shape) + jax.random.normal(state["key"])
            sign = jnp.where(mask & odd, 1.0, -1.0) * state["count"]
            aux = {"key": jax.random.split(key)[0], "count": number + 1, "flag": ~mask}
            return penalised(eta, theta + noise * sign, points), aux

        differentiate = grad(loss, has_aux=True)
        grads, aux = differentiate(state["theta"], batch_key, state["flag"])
        return {**aux, "theta": descend(eta, state["theta"], grads)}

    def start(eta):
        count = jnp.array(2, jnp.int32)
        return {"theta": eta["start"], "key": jax.random.key(0), "count": count, "flag": odd(2)}

    def odd(number):
        return jnp.asarray(number % 2 == 1)

    return simple(step, start, lambda eta, state: state["theta"] * state["count"])


def with_keys(batches):
    numbers = jnp.arange(T, dtype=jnp.int32)
    return batches, jax.random.split(jax.random.key(5), T), numbers, numbers % 2 == 0


def block_remat_inside_the_loss():
    def step(eta, theta, batch, grad):
        @jax.checkpoint
        def block(h, _):
            return jnp.tanh(h * theta + jnp.exp(eta["log_rate"])), None

        def loss(theta):
            return fit(jax.lax.scan(block, theta, None, length=3)[0], batch)

        return descend(eta, theta, grad(loss)(theta))

    return simple(step)


def step_ignores_eta_and_outer_loss_reads_it():
    def step(eta, theta, batch, grad):
        return theta - 0.1 * grad(fit)(theta, batch)

    def start(eta):
        return jnp.array([0.5, 0.1])

    return simple(step, start, lambda eta, theta: theta * eta["log_rate"])


SCENARIOS = [
    closes_over_eta,
    closes_over_eta_inside_jit,
    closes_over_eta_inside_vmap,
    gradient_inside_scan_and_cond,
    eta_is_an_argument,
    aux_carries_gradient,
    only_aux_is_used,
    complex_aux_and_closure,
    two_players,
    keywords_and_static_arguments,
    keys_integers_and_booleans,
    block_remat_inside_the_loss,
    step_ignores_eta_and_outer_loss_reads_it,
]


def by_hand(unroll, eta, batches, steps=T):
    """((loss, final state), gradient) of a Python loop that knows nothing of engines."""

    def outer(eta):
        state = unroll.init(eta)
        for t in range(steps):
            batch = jax.tree.map(lambda x: x[t], batches)  # noqa: B023
            state = unroll.step(eta, state, batch, jax.grad)
        return unroll.loss(eta, state)[0], state

    return jax.jit(jax.value_and_grad(outer, has_aux=True))(eta)


def arrays(tree):
    """Leaves as numbers: a PRNG key as its data."""
    keyed = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), tree)
    return jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keyed)


def assert_close(tree, expected, tolerance=1e-10):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=1e-13)


def solve(engine, unroll, eta, batches, state=()):
    run = jax.jit(lambda eta, batches: engine.value_and_grad(unroll, eta, batches, state))
    return run(eta, batches)


@functools.cache
def expected_of(scenario):
    eta, batches = eta_and_batches()
    batches = with_keys(batches) if scenario is keys_integers_and_booleans else batches
    return eta, batches, by_hand(scenario(), eta, batches)


# Every scenario by mixed flow, which records and replays a step; one by every setting.
PAIRS = quick(
    [(scenario, engine) for scenario in SCENARIOS for engine in ENGINES],
    lambda scenario, engine: (
        engine == "MixedFlow"
        or (scenario is aux_carries_gradient and engine in ("Forward", "Reverse-nested"))
    ),
)


@pytest.mark.parametrize(("scenario", "engine"), PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_gradient_and_final_state_are_those_of_a_loop_by_hand(scenario, engine):
    eta, batches, ((loss, state), grads) = expected_of(scenario)
    (ours, aux), our_grads = solve(ENGINES[engine], scenario(), eta, batches)
    assert float(ravel_pytree(grads)[0] @ ravel_pytree(grads)[0]) > 1e-6
    assert_close(our_grads, grads)
    assert_close(ours, loss)
    assert_close(arrays(aux.state), arrays(state))


SEGMENTS = itertools.product(
    (1, 2, 5, 8), (Reverse, MixedFlow), (("segments",), ("segments", 3), ("nested",))
)


# A single step, and a number of steps that segments of three do not divide.
@pytest.mark.parametrize(
    ("steps", "engine", "options"),
    quick(
        SEGMENTS,
        lambda steps, engine, options: (
            (steps == 5 and options == ("segments", 3)) or (steps == 1 and options == ("nested",))
        ),
    ),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_rematerialisation_in_segments_takes_any_number_of_steps(steps, engine, options):
    eta, batches = eta_and_batches(steps)
    (_, state), grads = by_hand(closes_over_eta(), eta, batches, steps)
    (_, aux), our_grads = solve(engine(*options), closes_over_eta(), eta, batches)
    assert_close(our_grads, grads)
    assert_close(aux.state, state)
    assert aux.inner.losses.shape == (steps, 1)


@pytest.mark.parametrize(
    "engine", quick(["Reverse-nested", "Forward", "MixedFlow"], lambda e: e == "MixedFlow")
)
def test_a_vmap_over_tasks_and_no_jit_give_the_same(engine):
    engine, unroll = ENGINES[engine], aux_carries_gradient()
    eta, batches = eta_and_batches()
    tasks = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), batches)
    run = functools.partial(engine.value_and_grad, unroll, eta)
    (losses, _), grads = jax.jit(jax.vmap(run))(tasks)
    (loss, _), expected = run(jax.tree.map(lambda x: x[1], tasks))
    assert_close(losses[1], loss)
    assert_close(jax.tree.map(lambda g: g[1], grads), expected)
    assert losses[0] != losses[1]


def softplus_of(forward):
    """A softplus with a rule of its own, whose forward part computes it by `forward`."""
    softplus = jax.custom_vjp(lambda x: jnp.logaddexp(x, 0.0))
    value = forward or softplus
    softplus.defvjp(lambda x: (value(x), x), lambda x, u: (u * jax.nn.sigmoid(x),))

    def step(eta, theta, batch, grad):
        loss = lambda theta: penalised(eta, softplus(theta), batch)  # noqa: E731
        return descend(eta, theta, grad(loss)(theta))

    return simple(step)


@pytest.mark.parametrize(
    "engine", quick(["Reverse", "MixedFlow", "MixedFlow-none"], lambda e: e == "MixedFlow")
)
def test_a_model_may_bring_a_backward_rule_of_its_own(engine):
    unroll = softplus_of(lambda x: jnp.logaddexp(x, 0.0))
    eta, batches = eta_and_batches()
    _, grads = by_hand(unroll, eta, batches)
    assert_close(solve(ENGINES[engine], unroll, eta, batches)[1], grads)


@pytest.mark.parametrize(
    "engine", quick(["MixedFlow", "MixedFlow-none", "MixedFlow-host"], lambda e: e == "MixedFlow")
)
def test_mixed_flow_is_exact_where_a_rule_has_no_forward_derivative(engine):
    """A forward part that calls the function itself, as JAX's documentation writes it."""
    eta, batches = eta_and_batches()
    _, grads = by_hand(softplus_of(None), eta, batches)
    assert_close(solve(ENGINES[engine], softplus_of(None), eta, batches)[1], grads)


def test_a_pushforward_never_drops_a_rule_that_has_no_forward_derivative():
    same = jax.custom_vjp(jnp.tanh)
    same.defvjp(lambda x: (same(x), x), lambda x, u: (u * (1 - jnp.tanh(x) ** 2),))
    with pytest.raises(TypeError, match="inside the rule of another, which has no JVP"):
        pushforward(lambda x: jax.value_and_grad(same)(x), (jnp.ones(()),), (jnp.ones(()),))


# What the loop saw.


def test_the_recorder_keeps_the_loss_of_every_gradient_of_every_step():
    def step(eta, theta, batch, grad):
        theta = descend(eta, theta, grad(fit)(theta, batch))
        return descend(eta, theta, grad(penalised, 1)(eta, theta, batch))

    eta, batches = eta_and_batches()
    theta, losses = eta["start"], []
    for batch in zip(*batches, strict=True):
        losses.append([fit(theta, batch)])
        theta = descend(eta, theta, jax.grad(fit)(theta, batch))
        losses[-1].append(penalised(eta, theta, batch))
        theta = descend(eta, theta, jax.grad(penalised, 1)(eta, theta, batch))
    for engine in (Reverse(), Reverse("nested"), Forward(), MixedFlow()):
        (_, aux), _ = solve(engine, simple(step), eta, batches)
        np.testing.assert_allclose(aux.inner.losses, losses, rtol=1e-12)
        assert aux.inner.finite.tolist() == [[True, True]] * T


@pytest.mark.parametrize(
    "engine", [Reverse(), Forward(), MixedFlow(), MixedFlow(store="host")], ids=repr
)
def test_the_recorder_keeps_the_norm_of_every_change_of_theta(engine):
    eta, batches = eta_and_batches()
    thetas = [eta["start"]]
    for batch in zip(*batches, strict=True):
        thetas.append(descend(eta, thetas[-1], jax.grad(fit)(thetas[-1], batch)))
    norms = [jnp.linalg.norm(b - a) for a, b in itertools.pairwise(thetas)]
    unroll = simple(lambda eta, theta, batch, grad: descend(eta, theta, grad(fit)(theta, batch)))
    (_, aux), _ = solve(engine, unroll, eta, batches)
    np.testing.assert_allclose(aux.inner.update_norm, jnp.stack(norms)[:, None], rtol=1e-12)


@pytest.mark.parametrize("engine", [Reverse(), Forward(), MixedFlow()], ids=repr)
def test_the_recorder_says_which_gradient_was_not_finite(engine):
    def step(eta, theta, batch, grad):
        grads = grad(lambda theta: jnp.sum(jnp.sqrt(batch * theta**2)))(theta)
        return descend(eta, theta, jnp.where(jnp.isfinite(grads), grads, 0.0))

    eta, _ = eta_and_batches()
    (_, aux), _ = solve(engine, simple(step), eta, jnp.array([1.0, 0.0, 4.0]))
    assert aux.inner.finite.tolist() == [[True], [False], [True]]
    assert jnp.isfinite(aux.inner.losses).all()


@pytest.mark.parametrize("scenario", [closes_over_eta_inside_vmap, closes_over_eta_inside_jit])
def test_gradients_inside_a_transformation_of_the_step_are_not_recorded(scenario):
    eta, batches = eta_and_batches()
    for engine in (Reverse(), Forward(), MixedFlow()):
        (_, aux), _ = solve(engine, scenario(), eta, batches)
        assert {aux.inner.losses.shape, aux.inner.finite.shape} == {(T, 0)}


def test_metrics_of_the_outer_loss_come_back():
    eta, batches = eta_and_batches()
    for engine in (Reverse(), Forward(), MixedFlow()):
        (_, aux), _ = solve(engine, simple(plain_step), eta, batches)
        assert_close(aux.metrics, {"first": aux.state[0]})


# Random directions.


def test_random_directions_are_unbiased():
    unroll, engine = simple(plain_step), Forward(directions=2)
    eta, batches = eta_and_batches()
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    @jax.vmap
    def draw(key):
        (_, aux), grads = engine.value_and_grad(unroll, eta, batches, engine.init(key, unroll, eta))
        return ravel_pytree(grads)[0], aux.engine

    draws, next_keys = draw(keys)
    exact = ravel_pytree(solve(Forward(), unroll, eta, batches)[1])[0]
    errors = draws.std(0) / np.sqrt(len(keys))
    assert (errors > 0).all() and (errors < 0.1 * jnp.linalg.norm(exact)).all()
    assert (abs(draws.mean(0) - exact) < 4 * errors).all()
    assert (jax.random.key_data(next_keys) != jax.random.key_data(keys)).any(1).all()


def test_random_directions_in_chunks_are_the_same_directions():
    eta, batches = eta_and_batches()
    key = jax.random.key(1)
    _, at_once = solve(Forward(directions=5), simple(plain_step), eta, batches, key)
    _, in_chunks = solve(Forward(directions=5, chunk=2), simple(plain_step), eta, batches, key)
    assert_close(in_chunks, at_once)


def test_random_directions_need_a_key():
    eta, batches = eta_and_batches()
    message = "`Forward(directions=3)` draws random directions and needs a key: pass"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Forward(directions=3).value_and_grad(simple(plain_step), eta, batches)


# What engines refuse.


def test_forward_refuses_a_large_eta_and_names_the_way_out():
    unroll = simple(plain_step, lambda eta: eta[:2])
    message = (
        "`Forward()` pushes one tangent per meta-parameter, but `eta` has 1,025 of them "
        "(max_directions=1024). Use `MixedFlow()` for a problem of this size, "
        "`Forward(directions=k)` for an unbiased estimate, or raise `max_directions`"
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Forward().value_and_grad(unroll, jnp.zeros(1025), eta_and_batches()[1])


@pytest.mark.parametrize("option", ["directions", "chunk"])
def test_forward_refuses_less_than_one(option):
    with pytest.raises(ValueError, match=rf"^`Forward\({option}=0\)` must be at least 1, or None"):
        Forward(**{option: 0})


@pytest.mark.parametrize(
    ("engine", "known"),
    [
        (Reverse, "nested, none, segments, step"),
        (MixedFlow, "inexact_reconstruct, nested, none, segments, step"),
    ],
)
def test_an_unknown_rematerialisation_is_refused_with_those_there_are(engine, known):
    message = f"No remat is called 'all'. There are: {known}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine(remat="all")


def test_segments_of_a_part_of_a_step_are_refused():
    with pytest.raises(ValueError, match=r"^`Reverse\(segment=2.5\)`: it is an integer, 1 or more"):
        Reverse("segments", segment=2.5)


every_engine = pytest.mark.parametrize("engine", [Reverse(), Forward(), MixedFlow()], ids=repr)


def refused(engine: MetaGradient, eta, batches, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        engine.value_and_grad(simple(plain_step), eta, batches)


@every_engine
def test_an_integer_in_eta_is_refused_by_its_path(engine):
    eta, batches = eta_and_batches()
    message = "`eta['steps']` has dtype int32, and a meta-gradient exists for floating-point"
    refused(engine, {**eta, "steps": jnp.int32(3)}, batches, TypeError, message)


@every_engine
def test_an_eta_without_leaves_is_refused(engine):
    message = "`eta` has no leaves, so there is nothing to learn. Did `init` return it?"
    refused(engine, {}, eta_and_batches()[1], ValueError, message)


@every_engine
@pytest.mark.parametrize(
    ("batches", "found"),
    [
        ({}, "no leaves at all"),
        ((np.zeros((3, 2)), np.zeros(2)), "['(2,)', '(3, 2)']"),
        ((np.zeros(3), np.zeros(())), "['()', '(3,)']"),
        ((np.zeros((0, 2)), np.zeros(2)), "['(0, 2)', '(2,)']"),
    ],
)
def test_batches_without_a_common_leading_axis_are_refused(engine, batches, found):
    message = (
        "The leaves of `batches` must share a leading axis of T inner steps, but their "
        f"shapes are {found}. An inner loop that reads no data takes `jnp.arange(T)`."
    )
    refused(engine, eta_and_batches()[0], batches, ValueError, message)


@pytest.mark.parametrize(
    ("theta", "found"),
    [(jnp.arange(3, dtype=jnp.int32), "int32[3]"), (np.array([True]), "bool[1]")],
)
def test_mixed_flow_refuses_an_inner_gradient_of_what_is_not_floating_point(theta, found):
    def step(eta, state, batch, grad):
        return state - grad(lambda theta: jnp.sum(theta * state))(theta)

    eta, batches = eta_and_batches()
    message = (
        "`MixedFlow` takes inner gradients with respect to floating-point arrays, but got "
        f"{found}. Keep integers out of what `grad` differentiates."
    )
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        MixedFlow().value_and_grad(simple(step), eta, batches)


# Memory: temporaries of the compiled program.


def deep(eta, h):
    """Apply 12 residual layers to h [n, 32], each recomputed in the backward pass."""

    @jax.checkpoint
    def layer(h, w):
        return h + jnp.tanh(jnp.tanh(h @ w) @ w.T), None

    return jax.lax.scan(layer, h, eta)[0]


@functools.cache
def temporaries(engine, steps, learn_a_rate=False):
    """Bytes of temporaries; eta is 12 layers' initialisation, or one learning rate."""
    layers = jax.ShapeDtypeStruct((12, 32, 32), jnp.float32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    inputs = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    batches = jax.ShapeDtypeStruct((steps,), jnp.float32)

    @jax.jit
    def run(layers, rate, inputs, batches):
        def loss(theta, batch):
            return jnp.mean(deep(theta, inputs * batch) ** 2)

        def step(eta, theta, batch, grad):
            scale = eta if learn_a_rate else rate
            return theta - scale * grad(loss)(theta, batch)

        unroll = Unroll(
            lambda eta: layers if learn_a_rate else eta,
            step,
            lambda eta, theta: (loss(theta, jnp.float32(1)), {}),
        )
        return engine.value_and_grad(unroll, rate if learn_a_rate else layers, batches)

    compiled = run.lower(layers, rate, inputs, batches).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_less_is_kept_with_each_rematerialisation_and_with_mixed_flow():
    remats = "none", "step", "segments", "nested"
    everything, states, parts, some = (temporaries(Reverse(remat), 32) for remat in remats)
    assert 5 * states < everything
    assert 3 * parts < everything
    assert 1.3 * some < states
    assert 5 * temporaries(MixedFlow(), 32) < everything
    assert 1.2 * temporaries(MixedFlow(), 32) < states
    assert 1.2 * temporaries(MixedFlow("segments"), 32) < temporaries(MixedFlow(), 32)


def test_memory_of_forward_mode_is_flat_in_the_number_of_steps():
    few, many = (temporaries(Forward(), steps, learn_a_rate=True) for steps in (4, 64))
    assert many < 1.05 * few
    assert 2 * many < temporaries(Reverse("step"), 64, learn_a_rate=True)


@pytest.mark.parametrize("returned", [lambda loss: loss, lambda loss: (loss, None)])
@every_engine
def test_an_outer_loss_without_metrics_is_refused_with_what_to_return(engine, returned):
    eta, batches = eta_and_batches()
    unroll = Unroll(lambda eta: eta["start"], descend, lambda eta, theta: returned(theta.sum()))
    unroll = unroll._replace(step=lambda eta, theta, batch, grad: theta)
    with pytest.raises(TypeError, match=r"\(loss, metrics\), but this one.*`return loss, \{\}`"):
        engine.value_and_grad(unroll, eta, batches)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda theta: (theta, {}), r"a number as the outer loss, but this one has shape \[\d\]"),
        (lambda theta: (theta.sum(), [1]), r"returned \(one array, list\)"),
    ],
)
@every_engine
def test_an_outer_loss_that_is_no_number_is_refused(engine, returned, message):
    eta, batches = eta_and_batches()
    unroll = Unroll(lambda eta: eta["start"], descend, lambda eta, theta: returned(theta))
    unroll = unroll._replace(step=lambda eta, theta, batch, grad: theta)
    with pytest.raises(TypeError, match=message):
        engine.value_and_grad(unroll, eta, batches)


# What nothing reads has no part in the derivative, and may have an infinite one.

POINT = jnp.array([1.0, -2.0])


def logged_norm(eta, theta, batch, grad):
    """A metric that is only logged, at parameters that are zero."""

    def loss(theta):
        miss = 0.5 * jnp.sum((theta - POINT * batch) ** 2) * jnp.exp(eta["s"])
        return miss, {"norm": jnp.sqrt(jnp.sum(theta**2))}

    return theta - 0.1 * grad(loss, has_aux=True)(theta)[0]


def norms_of_examples(eta, theta, batch, grad):
    """The same of each example, of a loss that is taken in parts."""

    def loss(theta, example):
        miss = 0.5 * jnp.sum((theta - example) ** 2) * jnp.exp(eta["s"])
        return miss, {"norm": jnp.sqrt(jnp.sum(theta**2))}

    examples = POINT[None] * batch * jnp.arange(1.0, 5.0)[:, None]
    return theta - 0.1 * grad(ExampleMean(loss), has_aux=True)(theta, examples)[0]


def penalty_of_eta(eta, theta, batch, grad):
    """A term of eta alone."""

    def loss(theta, eta):
        miss = 0.5 * jnp.sum((theta - POINT * batch) ** 2) * jnp.exp(eta["s"])
        return miss + jnp.sqrt(jnp.sum(eta["zero"] ** 2))

    return theta - 0.1 * grad(loss)(theta, eta)


def unused_gradient(eta, theta, batch, grad):
    """A leaf that `grad` differentiates and the step leaves as it is."""

    def loss(parts):
        both = jnp.sum(parts["zero"] ** 1.5 * parts["theta"])
        return 0.5 * jnp.sum((parts["theta"] - POINT * batch) ** 2) * jnp.exp(eta["s"]) + both

    return theta - 0.1 * grad(loss)({"theta": theta, "zero": eta["zero"]})["theta"]


@pytest.mark.parametrize(
    ("step", "engine"),
    [
        *itertools.product(
            (logged_norm, penalty_of_eta, unused_gradient),
            (MixedFlow(), MixedFlow("none"), MixedFlow("nested"), MixedFlow(store="host")),
        ),
        (norms_of_examples, MixedFlow(micro_batches=2)),
    ],
)
def test_what_nothing_reads_has_no_part_in_the_meta_gradient(step, engine):
    eta = {"theta": jnp.zeros(2), "s": jnp.array(0.1), "zero": jnp.zeros(2)}
    if step is not logged_norm and step is not norms_of_examples:
        eta["theta"] = jnp.ones(2)
    unroll = Unroll(lambda eta: eta["theta"], step, lambda eta, theta: (jnp.sum(theta**3), {}))
    found, expected = (
        jax.jit(each.value_and_grad, static_argnums=0)(unroll, eta, jnp.arange(1.0, 3.0))[1]
        for each in (engine, Reverse())
    )
    assert all(map(np.any, (expected["theta"], expected["s"])))
    for name in eta:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_an_argument_that_is_differentiated_is_passed_by_position():
    def step(eta, theta, batch, grad):
        return theta - eta * grad(lambda t: jnp.sum(t**2))(t=theta)

    unroll = Unroll(lambda eta: jnp.ones(2), step, lambda eta, theta: (theta.sum(), {}))
    with pytest.raises(TypeError, match="differentiates positional argument 0 of `fun`, which was"):
        MixedFlow().value_and_grad(unroll, jnp.array(0.1), jnp.arange(2))
