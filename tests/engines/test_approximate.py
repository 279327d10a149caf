"""Hypergradients of a fixed point, and of the last steps: against closed forms and exact ones."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import SAMA, Forward, Implicit, MixedFlow, Reverse, Trainer, Truncated, Unroll
from metalearn.algorithms import MAML, squared_error
from metalearn.engines import ApproximationWarning, segments
from metalearn.engines.approximate import solvers
from metalearn.engines.inner_loop import Remat
from metalearn.optimizers import master_weights
from tests.cases import MODELS, TASKS
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
SOLVERS = sorted(solvers.SOLVERS)
RANDOM = np.random.default_rng(0)


def gradient_of(engine, unroll, eta, batches):
    """(meta-gradient, aux) of a compiled call."""
    (_, aux), grads = jax.jit(engine.value_and_grad, static_argnums=0)(unroll, eta, batches)
    return grads, aux


def error(grads, expected):
    grads, expected = ravel_pytree(grads)[0], ravel_pytree(expected)[0]
    return float(jnp.linalg.norm(grads - expected) / jnp.linalg.norm(expected))


def descent(loss, outer, theta_0, rule=None):
    """An unroll of an optax optimizer (sgd by default) on loss(eta, theta, batch)."""
    rule = optax.sgd(0.2) if rule is None else rule

    def step(eta, state, batch, grad):
        theta, memory = state
        grads = grad(lambda theta: loss(eta, theta, batch))(theta)
        updates, memory = rule.update(grads, memory, theta)
        return optax.apply_updates(theta, updates), memory

    def judge(eta, state):
        return outer(eta, state[0]), {}

    return Unroll(lambda eta: (theta_0, rule.init(theta_0)), step, judge)


# A quadratic, whose fixed point is H^-1 (B eta), and a ridge regression with a learned penalty.

ROTATION = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
HESSIAN = ROTATION @ np.diag([0.5, 0.7, 1.0, 1.5, 2.0, 3.0]) @ ROTATION.T
MIX = RANDOM.normal(size=(6, 4))
TARGET = RANDOM.normal(size=6)
X, Y, X_VAL, Y_VAL = (RANDOM.normal(size=s) for s in ((20, 6), 20, (15, 6), 15))


def quadratic_loss(eta, theta, batch):
    flat = jnp.concatenate([theta["a"], theta["b"].ravel()])
    return flat @ HESSIAN @ flat / 2 - flat @ (MIX @ eta)


def quadratic_outer(eta, theta):
    flat = jnp.concatenate([theta["a"], theta["b"].ravel()])
    return jnp.sum((flat - TARGET) ** 2) / 2 + jnp.sum(eta**3)


def quadratic(rule=None, scale=1.0):
    theta_0 = {"a": scale * jnp.ones(2), "b": jnp.zeros((2, 2))}
    unroll = descent(quadratic_loss, quadratic_outer, theta_0, rule)
    eta = jnp.arange(1.0, 5.0) / 4
    star = np.linalg.solve(HESSIAN, MIX @ eta)
    return unroll, eta, MIX.T @ np.linalg.solve(HESSIAN, star - TARGET) + 3 * eta**2


def ridge():
    def loss(eta, theta, batch):
        penalty = jnp.sum(jnp.exp(eta["penalty"]) * theta**2)
        return jnp.mean((X @ theta - eta["scale"] * Y) ** 2) + penalty

    def outer(eta, theta):
        return jnp.mean((X_VAL @ theta - Y_VAL) ** 2)

    def closed(eta):
        gram = X.T @ X / 20 + jnp.diag(jnp.exp(eta["penalty"]))
        return outer(eta, jnp.linalg.solve(gram, X.T @ Y * eta["scale"] / 20))

    eta = {"penalty": jnp.linspace(-2.0, 0.0, 6), "scale": jnp.float64(1.3)}
    return descent(loss, outer, jnp.zeros(6)), eta, jax.grad(closed)(eta)


PROBLEMS = {"quadratic": quadratic, "ridge": ridge}


@pytest.mark.parametrize(
    ("problem", "solver"),
    quick(
        [(problem, solver) for problem in PROBLEMS for solver in SOLVERS],
        lambda *case: case in [("quadratic", "cg"), ("ridge", "gmres")],
    ),
)
def test_at_a_fixed_point_every_solver_gives_the_closed_form(problem, solver):
    unroll, eta, expected = PROBLEMS[problem]()
    engine = Implicit(solver, iterations=400, tolerance=1e-12, rank=3)
    grads, aux = gradient_of(engine, unroll, eta, jnp.arange(400))
    assert error(grads, expected) < 1e-8
    assert aux.metrics["fixed_point_residual"] < 1e-12
    assert aux.metrics["solver_residual"] < 1e-10
    assert aux.inner.losses.shape == (400, 1)


def test_a_step_that_changes_sign_needs_a_shorter_neumann_step():
    """Eigenvalues of J down to 1 - 0.6 * 3 = -0.8, and with a rate of 0.8 down to -1.4."""
    unroll, eta, expected = quadratic(optax.sgd(0.6))
    short = Implicit("neumann", iterations=300, tolerance=1e-12, relaxation=0.7)
    assert error(gradient_of(short, unroll, eta, jnp.arange(200))[0], expected) < 1e-8


# The state of the inner optimizer.


@pytest.mark.parametrize("solver", quick(["gmres", "bicgstab"], lambda solver: solver == "gmres"))
@pytest.mark.slow
def test_momentum_has_a_fixed_point_with_its_velocity(solver):
    unroll, eta, expected = quadratic(optax.sgd(0.1, momentum=0.8))
    engine = Implicit(solver, iterations=100, tolerance=1e-12)
    grads, aux = gradient_of(engine, unroll, eta, jnp.arange(600))
    assert error(grads, expected) < 1e-8 and aux.metrics["solver_residual"] < 1e-10


@pytest.mark.slow
def test_decoupled_weight_decay_with_momentum_needs_the_whole_state():
    """theta* solves 5 (H theta - B eta) + theta / 4 = 0, where the inner gradient is not zero."""
    rule = optax.chain(optax.trace(0.8), optax.add_decayed_weights(0.25), optax.scale(-0.1))
    unroll, eta, _ = quadratic(rule)
    hessian = HESSIAN + np.eye(6) / 20
    star = np.linalg.solve(hessian, MIX @ eta)
    expected = MIX.T @ np.linalg.solve(hessian, star - TARGET) + 3 * eta**2
    whole, part = (
        gradient_of(Implicit(tolerance=1e-12, variables=variables), unroll, eta, jnp.arange(600))
        for variables in ("", "^0")
    )
    assert error(whole[0], expected) < 1e-8 and error(part[0], expected) > 1e-2


@pytest.mark.slow
def test_a_state_that_counts_its_steps_has_no_fixed_point_and_its_parameters_do():
    rule = optax.adam(0.05, eps=0.1, eps_root=1e-12)
    unroll, eta, expected = quadratic(rule)
    message = r"its '1/0/count' changes at every step, .*`Implicit\(variables='params'\)`"
    with pytest.raises(ValueError, match=message):
        gradient_of(Implicit(), unroll, eta, jnp.arange(2))
    engine = Implicit(tolerance=1e-12, variables="^0")
    grads, aux = gradient_of(engine, unroll, eta, jnp.arange(3000))
    assert aux.metrics["fixed_point_residual"] < 1e-10
    assert error(grads, expected) < 1e-8


def test_a_learning_rate_schedule_counts_steps_too_and_a_count_that_nobody_reads_does_not():
    unroll, eta, expected = quadratic(optax.sgd(lambda count: 0.2 / (1 + 0.0 * count)))
    with pytest.raises(ValueError, match="the inner state has no fixed point as a whole"):
        gradient_of(Implicit(), unroll, eta, jnp.arange(2))
    plain, eta, expected = quadratic()
    counting = plain._replace(
        init=lambda eta: (plain.init(eta), jnp.zeros((), int)),
        step=lambda eta, state, batch, grad: (plain.step(eta, state[0], batch, grad), state[1] + 1),
        loss=lambda eta, state: plain.loss(eta, state[0]),
    )
    grads, _ = gradient_of(Implicit(tolerance=1e-12), counting, eta, jnp.arange(400))
    assert error(grads, expected) < 1e-8


def test_what_is_held_may_not_be_read_by_the_outer_loss():
    unroll, eta, _ = quadratic(optax.sgd(0.1, momentum=0.8))
    reads_all = unroll._replace(loss=lambda eta, state: (optax.tree.norm(state), {}))
    message = r"holds '1/0/trace/a' .* but the outer loss reads it.*variables='\^0\|1'"
    with pytest.raises(ValueError, match=message):
        gradient_of(Implicit(variables="^0"), reads_all, eta, jnp.arange(2))


def test_variables_that_are_not_there_are_refused_with_those_that_are():
    unroll, eta, _ = quadratic()
    with pytest.raises(ValueError, match="No parameter path matches 'weights'. There are: 0/a, "):
        gradient_of(Implicit(variables="weights"), unroll, eta, jnp.arange(2))


@pytest.mark.slow
def test_complex_and_mixed_states_are_differentiated():
    """theta* = eta (1 + 2i) / 2 in complex64 or 128, and 3 eta in float32."""

    def step(eta, state, batch, grad):
        z, x = state
        target = eta * (1 + 2j)
        gz = grad(lambda z: jnp.sum((2 * z - target) * (2 * z - target).conj()).real / 8)(z)
        gx = grad(lambda x: jnp.sum((x - 3 * eta.astype(jnp.float32)) ** 2) / 4)(x)
        return z - gz.conj(), x - gx

    def loss(eta, state):
        z, x = state
        return jnp.sum(jnp.real(z) * jnp.imag(z)) + jnp.sum(x**2).astype(float), {}

    unroll = Unroll(lambda eta: (jnp.zeros(2, complex), jnp.zeros(2, jnp.float32)), step, loss)
    eta = jnp.array([0.5, -1.0])
    grads, _ = gradient_of(Implicit(tolerance=1e-9), unroll, eta, jnp.arange(60))
    np.testing.assert_allclose(grads, eta + 18 * eta, rtol=1e-5)


# What is no fixed point, or is not solved.


def doubts_of(engine, unroll, eta, batches):
    (loss, aux), _ = jax.jit(engine.value_and_grad, static_argnums=0)(unroll, eta, batches)
    return engine.doubts({"loss": loss, **aux.metrics})


def test_away_from_the_fixed_point_it_warns_with_the_residual():
    unroll, eta, _ = quadratic()
    after = unroll.step(eta, unroll.init(eta), 0, jax.grad)[0]
    twice = unroll.step(eta, unroll.step(eta, unroll.init(eta), 0, jax.grad), 0, jax.grad)[0]
    moved = float(optax.tree.norm(optax.tree.sub(twice, after)))
    size = max(optax.tree.norm(after), optax.tree.norm(optax.tree.sub(after, unroll.init(eta)[0])))
    message = rf"one more step with the last batch changes it by {moved / float(size):.2g} of its"
    with pytest.warns(ApproximationWarning, match=message):
        Implicit().value_and_grad(unroll, eta, jnp.arange(1))
    assert [*doubts_of(Implicit(), unroll, eta, jnp.arange(1))] == ["fixed_point_residual"]
    assert doubts_of(Implicit(), unroll, eta, jnp.arange(400)) == {}


@pytest.mark.slow
def test_short_steps_do_not_hide_that_the_loop_has_not_converged():
    unroll, eta, _ = quadratic(optax.sgd(1e-5))
    text = doubts_of(Implicit(), unroll, eta, jnp.arange(5))["fixed_point_residual"]
    (loss, aux), _ = jax.jit(Implicit().value_and_grad, static_argnums=0)(
        unroll, eta, jnp.arange(5)
    )
    assert aux.metrics["fixed_point_residual"] < 1e-3
    assert f"{loss:.3g} now, would change by about {aux.metrics['fixed_point_gap']:.2g}" in text


def test_at_a_quadratic_the_gap_is_how_far_a_linear_outer_loss_is_from_its_own():
    unroll, eta, _ = quadratic()
    linear = unroll._replace(loss=lambda eta, state: (jnp.sum(state[0]["a"]), {}))
    engine = Implicit(tolerance=1e-12)
    (loss, aux), _ = engine_call(engine, linear, eta, jnp.arange(3))
    star = np.linalg.solve(HESSIAN, MIX @ eta)[:2].sum()
    np.testing.assert_allclose(aux.metrics["fixed_point_gap"], abs(star - loss), rtol=1e-8)


def engine_call(engine, *problem):
    return jax.jit(engine.value_and_grad, static_argnums=0)(*problem)


@pytest.mark.parametrize("rate", [0.8, 3.0])
def test_a_loop_that_diverges_is_told_whether_or_not_it_has_overflowed(rate):
    unroll, eta, _ = quadratic(optax.sgd(rate))
    steps = 20 if rate < 1 else 500
    text = doubts_of(Implicit(), unroll, eta, jnp.arange(steps))["fixed_point_residual"]
    assert ("the inner loop diverges" in text) is (rate > 1)
    assert ("is no fixed point of the inner step" in text) is (rate < 1)


@pytest.mark.parametrize("solver", quick(SOLVERS, lambda solver: solver == "gmres"))
def test_a_solver_that_does_not_converge_is_told_with_residual_and_iterations(solver):
    unroll, eta, _ = quadratic(optax.sgd(0.02))
    engine = Implicit(solver, iterations=2, rank=1)
    doubts = doubts_of(engine, unroll, eta, jnp.arange(4000))
    assert [*doubts] == ["solver_residual"]
    text = doubts["solver_residual"]
    assert f"{solver!r} has not converged: it left a relative residual of" in text
    assert "(tolerance=1e-05) after at most 2 iterations" in text


def test_conjugate_gradients_on_a_step_with_momentum_are_told_to_be_wrong():
    unroll, eta, expected = quadratic(optax.sgd(0.1, momentum=0.8))
    grads, _ = gradient_of(Implicit("cg"), unroll, eta, jnp.arange(600))
    doubts = doubts_of(Implicit("cg"), unroll, eta, jnp.arange(600))
    assert error(grads, expected) > 1e-3 and "else take 'gmres'" in doubts["solver_residual"]


def test_damping_solves_a_singular_system_and_biases_a_regular_one():
    unroll, eta, expected = quadratic()
    damped = gradient_of(Implicit(tolerance=1e-12, damping=0.01), unroll, eta, jnp.arange(400))[0]
    star = np.linalg.solve(HESSIAN, MIX @ eta)
    biased = MIX.T @ np.linalg.solve(HESSIAN + 0.05 * np.eye(6), star - TARGET) + 3 * eta**2
    assert error(damped, biased) < 1e-8 and error(damped, expected) > 1e-3


def test_a_warm_start_goes_on_from_the_solve_before():
    unroll, eta, _ = quadratic(optax.sgd(0.05))
    engine = Implicit("neumann", iterations=20, warm_start=True)
    state, rests = engine.init(jax.random.key(0), unroll, eta), []
    for _ in range(3):
        (_, aux), _ = engine_call(engine, unroll, eta, jnp.arange(900), state)
        assert jax.tree.map(jnp.shape, aux.engine) == jax.tree.map(jnp.shape, state)
        state, rests = aux.engine, [*rests, float(aux.metrics["solver_residual"])]
    assert rests[1] < 0.7 * rests[0] and rests[2] < 0.7 * rests[1]
    broken = [jnp.full_like(x, jnp.nan) for x in state]
    (_, aux), grads = engine_call(engine, unroll, eta, jnp.arange(900), broken)
    assert jnp.isfinite(grads).all() and aux.metrics["solver_residual"] == rests[0]


# The last steps.


@pytest.mark.parametrize("through", quick([MixedFlow(), Reverse(), Forward()], lambda e: True))
@pytest.mark.parametrize("last", [20, 50])
def test_all_steps_of_a_loop_are_the_exact_gradient(last, through):
    unroll, eta, _ = quadratic()
    (_, aux), grads = engine_call(Truncated(last, through), unroll, eta, jnp.arange(20))
    (_, expected_aux), expected = engine_call(Reverse(), unroll, eta, jnp.arange(20))
    assert error(grads, expected) < 1e-12
    jax.tree.map(np.testing.assert_allclose, aux.state, expected_aux.state)


@pytest.mark.parametrize("last", [1, 3])
def test_the_last_steps_have_the_gradient_from_a_constant_state(last):
    unroll, eta, _ = quadratic(optax.adam(0.1, eps_root=1e-8))
    (loss, aux), grads = engine_call(Truncated(last), unroll, eta, jnp.arange(20))
    middle, *_ = segments.advance(unroll, eta, unroll.init(eta), jnp.arange(20 - last))
    rest = unroll._replace(init=lambda eta: middle)
    (expected_loss, _), expected = engine_call(Reverse(), rest, eta, jnp.arange(last))
    assert error(grads, expected) < 1e-12 and abs(loss - expected_loss) < 1e-12
    full = engine_call(Reverse(), unroll, eta, jnp.arange(20))[0][1]
    np.testing.assert_allclose(aux.inner.losses, full.inner.losses)


@pytest.mark.slow
def test_the_error_falls_with_the_last_steps_as_the_loop_contracts():
    unroll, eta, _ = quadratic()
    expected = engine_call(Reverse(), unroll, eta, jnp.arange(100))[1]
    errors = [
        error(engine_call(Truncated(last), unroll, eta, jnp.arange(100))[1], expected)
        for last in (20, 40)
    ]
    # The eigenvalues of J that are left are 1 - 0.2 * 0.5 and 1 - 0.2 * 0.7.
    assert 0.9 * 0.86**20 < errors[1] / errors[0] < 1.1 * 0.9**20


def test_one_step_by_finite_differences_is_one_step():
    def loss(eta, theta, batch):
        return jnp.sum(jnp.cosh(theta - eta) + eta * theta**3 / 3)

    start = jnp.array([0.1, 0.4])
    unroll = descent(loss, lambda eta, theta: jnp.sum(theta**2), start)
    eta = jnp.array([0.5, 0.2])
    exact = engine_call(Truncated(1), unroll, eta, jnp.arange(9))[1]
    for move, least, most in ((1e-4, 0, 1e-7), (0.1, 1e-6, 1e-2)):
        grads = engine_call(Truncated(1, finite_difference=move), unroll, eta, jnp.arange(9))[1]
        assert least < error(grads, exact) < most


ENDS = [Implicit("neumann", iterations=5, tolerance=0.0), Truncated(2), SAMA()]


@pytest.mark.parametrize("engine", ENDS, ids=lambda engine: type(engine).__name__)
def test_memory_does_not_grow_with_the_inner_steps(engine):
    def loss(eta, theta, batch):
        return jnp.mean(jnp.tanh(theta @ eta - batch) ** 2)

    start = jnp.ones((50, 40))
    unroll = descent(loss, lambda eta, theta: jnp.sum(theta**2), start)

    def temporaries(steps):
        solve = jax.jit(functools.partial(engine.value_and_grad, unroll))
        compiled = solve.lower(jnp.ones((40, 3)), jnp.arange(float(steps))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(10), temporaries(1000)
    assert many - few < 990 * 8 * 10  # a scalar or so a step; a state has 2,000


# SAMA.


@pytest.mark.parametrize(
    "rule", [optax.sgd(0.2), optax.adam(0.1, eps_root=1e-8)], ids=["sgd", "adam"]
)
def test_sama_is_one_step_at_the_end_through_the_inner_optimizer(rule):
    unroll, eta, _ = quadratic(rule)
    (_, aux), grads = engine_call(SAMA(1e-3), unroll, eta, jnp.arange(30))
    _, bars = segments.outer_cotangents(unroll, eta, aux.state)
    one = eta, aux.state, jnp.arange(1)
    expected = segments.pull_back(unroll, *one, [], bars, jax.value_and_grad, Remat()).eta
    assert error(grads, expected) < 1e-7


# Bad input.


@pytest.mark.parametrize("engine", [Implicit(), SAMA()], ids=["Implicit", "SAMA"])
def test_a_loop_without_steps_is_refused(engine):
    unroll, eta, _ = quadratic(optax.sgd(0.2))
    with pytest.raises(ValueError, match=r"this loop takes none \(T = 0\).*`Reverse\(\)`"):
        engine.value_and_grad(unroll, eta, jnp.arange(0))


LEARNED_START = [Implicit(), Truncated(1), SAMA()]


@pytest.mark.parametrize("engine", LEARNED_START, ids=lambda engine: type(engine).__name__)
def test_an_initialisation_that_only_theta_0_reads_is_refused(engine):
    algorithm = MAML(MODELS["Functions"], squared_error, inner_steps=3)
    trainer = Trainer(algorithm, engine, tasks_per_step=2)
    eta = algorithm.init(jax.random.key(0))
    message = (
        "does not see theta_0. Of eta, params/body, params/head is read by `Unroll.init` alone"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(trainer.task_gradient, eta, TASKS["Sinusoid"], jax.random.key(1))


def head_on_features(kept, reads=True):
    """A head fitted to `kept(features)`, which is beside it in the state and which no step changes.

    The outer loss reads `features` of eta too, so that some of its derivative is always seen.
    """

    def step(eta, state, batch, grad):
        head, x = state
        inputs = x if reads else jnp.ones((2, 2))
        slope = grad(lambda head: jnp.sum((inputs @ head - eta["targets"]) ** 2))(head)
        return head - 0.1 * slope, x

    def loss(eta, state):
        return jnp.sum((eta["features"] @ state[0]) ** 2), {}

    return Unroll(lambda eta: (jnp.zeros(2), kept(eta["features"])), step, loss)


FEATURES = {"features": jnp.eye(2), "targets": jnp.ones(2)}


@pytest.mark.parametrize("engine", LEARNED_START, ids=lambda engine: type(engine).__name__)
def test_a_path_through_a_leaf_that_no_step_changes_is_refused(engine):
    message = (
        "does not see theta_0. '1' of the inner state is computed by `Unroll.init` from features "
        "of eta, no step changes it, and it is read afterwards"
    )
    with pytest.raises(ValueError, match=message):
        engine_call(engine, head_on_features(jnp.sin), FEATURES, jnp.arange(4))


@pytest.mark.parametrize("case", ["constant", "unread", "all steps"])
def test_a_leaf_that_no_step_changes_is_served_where_no_derivative_is_lost(case):
    kept = jax.lax.stop_gradient if case == "constant" else jnp.sin
    unroll = head_on_features(kept, reads=case != "unread")
    last = 4 if case == "all steps" else 1
    grads = engine_call(Truncated(last), unroll, FEATURES, jnp.arange(4))[1]
    expected = engine_call(Reverse(), unroll, FEATURES, jnp.arange(4))[1]
    seen = slice(None) if case == "all steps" else slice(4)  # those of `features`
    grads, expected = (ravel_pytree(tree)[0][seen] for tree in (grads, expected))
    assert error(grads, expected) < 1e-12 and jnp.linalg.norm(expected) > 1e-3


def judged_by_training():
    """A learned rate, judged by the sum of the losses before each step."""

    def objective(theta):
        return jnp.sum((theta - 1) ** 2)

    def step(eta, state, batch, grad):
        theta, total = state
        return theta - jnp.exp(eta["rate"]) * grad(objective)(theta), total + objective(theta)

    return Unroll(
        lambda eta: (jnp.zeros(3), jnp.zeros(())), step, lambda eta, state: (state[1], {})
    )


RATE = {"rate": jnp.log(0.1)}


@pytest.mark.parametrize("engine", [Truncated(1), SAMA()], ids=lambda engine: type(engine).__name__)
def test_an_entry_that_the_last_steps_do_not_read_is_refused(engine):
    message = (
        r"Of eta, rate enters the outer loss through earlier steps alone.*`Truncated\(last=2\)`"
    )
    with pytest.raises(ValueError, match=message):
        engine_call(engine, judged_by_training(), RATE, jnp.arange(4))
    two, exact = (
        engine_call(engine, judged_by_training(), RATE, jnp.arange(4))[1]["rate"]
        for engine in (Truncated(2), Reverse())
    )
    assert exact < two < 0


@pytest.mark.parametrize("engine", LEARNED_START, ids=lambda engine: type(engine).__name__)
def test_segments_are_refused(engine):
    with pytest.raises(ValueError, match="does not differentiate them: it estimates .* the end of"):
        Trainer(MAML(MODELS["Functions"], squared_error), engine, segment=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncated(0), r"`Truncated\(last=0\)` differentiates the last k inner steps, an"),
        (lambda: Truncated(True), r"`Truncated\(last=True\)`"),
        (lambda: Truncated(1, Reverse(), 0.1), "finite differences take the place of the engine"),
        (lambda: Truncated(1, finite_difference=0.0), "it is a number above 0"),
        (lambda: SAMA(-1.0), r"`SAMA\(finite_difference=-1.0\)`: it is a number above 0"),
        (
            lambda: Implicit("newton"),
            "No solver is called 'newton'.*There are: bicgstab, cg, gmres",
        ),
        (
            lambda: Implicit(iterations=0),
            r"`Implicit\(iterations=0\)`: it is an integer, 1 or more",
        ),
        (lambda: Implicit(damping=-1.0), r"`Implicit\(damping=-1.0\)`: it is a number, 0 or more"),
        (lambda: Implicit(stationary=0.0), r"`Implicit\(stationary=0.0\)`: it is a number above 0"),
        (lambda: Implicit(variables="("), "it is no regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_engine_with_a_state_does_not_differentiate_the_last_steps():
    engine = Truncated(1, Forward(directions=2))
    with pytest.raises(ValueError, match="an engine that carries a state of its own"):
        engine.init(jax.random.key(0), *quadratic()[:2])


def test_nothing_is_said_where_all_is_well():
    unroll, eta, _ = quadratic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Implicit().value_and_grad(unroll, eta, jnp.arange(200))


# Compiled parts, leaves that stay, scales, and what is not finite.


@pytest.mark.parametrize("compiled", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("engine", LEARNED_START, ids=lambda engine: type(engine).__name__)
def test_a_compiled_loss_does_not_read_what_it_does_not_use(engine, compiled):
    @compiled
    def loss(eta, theta, count):
        return jnp.sum((theta - eta["target"]) ** 2)

    def step(eta, state, batch, grad):
        theta, count = state
        return theta - 0.1 * grad(lambda theta: loss(eta, theta, count))(theta), count + 1

    def init(eta):
        return eta["start"], jnp.zeros((), int)

    unroll = Unroll(init, step, lambda eta, state: (jnp.sum(state[0] ** 2), {}))
    eta = {"start": jnp.ones(2), "target": jnp.full(2, 0.5)}
    with pytest.raises(ValueError, match="Of eta, start is read by `Unroll.init` alone"):
        engine_call(engine, unroll, eta, jnp.arange(5))
    constant = unroll._replace(init=lambda eta: (jnp.ones(2), jnp.zeros((), int)))
    grads = engine_call(engine, constant, {"target": eta["target"]}, jnp.arange(500))[1]
    assert jnp.isfinite(grads["target"]).all()  # a count that is passed on but not read is no clock


@pytest.mark.parametrize("solver", quick(SOLVERS, lambda solver: solver in ("gmres", "cg")))
@pytest.mark.parametrize("outer", [lambda x: jnp.sqrt(jnp.sum(x**2)), lambda x: 1 / jnp.sum(x**2)])
def test_an_outer_derivative_that_is_not_finite_gives_none_that_is(solver, outer):
    """At theta_T = 1 exactly, from the start, neither the norm nor an inverse has a derivative."""
    unroll = descent(
        lambda eta, theta, batch: jnp.sum((theta - eta) ** 2) / 2,
        lambda eta, theta: outer(theta - 1.0),
        jnp.ones(2),
    )
    engine = Implicit(solver)
    (loss, aux), grads = engine_call(engine, unroll, jnp.ones(2), jnp.arange(5))
    assert not jnp.isfinite(grads).any()
    text = engine.doubts({"loss": 0.0, **aux.metrics})["solver_residual"]
    assert "has no finite solution" in text


@pytest.mark.parametrize("solver", quick(SOLVERS, lambda solver: solver == "gmres"))
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_hypergradient_scales_with_the_outer_loss(solver, scale):
    unroll, eta, expected = quadratic()
    scaled = unroll._replace(loss=lambda eta, s: (scale * quadratic_outer(eta, s[0]), {}))
    engine = Implicit(solver, iterations=400, tolerance=1e-12, rank=3)
    grads, aux = gradient_of(engine, scaled, eta, jnp.arange(400))
    assert error(grads / scale, expected) < 1e-8 and aux.metrics["solver_residual"] < 1e-10


@pytest.mark.parametrize("solver", quick(SOLVERS, lambda solver: solver in ("gmres", "cg")))
@pytest.mark.parametrize("variables", ["", "^0", "0|1"])
def test_a_constant_beside_theta_is_held(solver, variables):
    def step(eta, state, batch, grad):
        theta, x = state
        return theta - 0.2 * grad(lambda t: jnp.sum((x * t - eta) ** 2) / 2)(theta), x

    init = (jnp.zeros(2), jnp.array([1.0, 2.0]))
    unroll = Unroll(lambda eta: init, step, lambda eta, state: (jnp.sum(state[0] ** 2), {}))
    engine = Implicit(solver, iterations=400, tolerance=1e-12, rank=2, variables=variables)
    (loss, aux), grads = engine_call(engine, unroll, jnp.ones(2), jnp.arange(400))
    np.testing.assert_allclose(grads, [2.0, 0.5], rtol=1e-8)  # of sum (eta / x)^2
    assert engine.doubts({"loss": loss, **aux.metrics}) == {}


def test_an_iterate_that_is_held_beside_its_copy_is_told():
    unroll, eta, expected = quadratic(master_weights(optax.sgd(0.2), jnp.float64))
    engine = Implicit(tolerance=1e-12, variables="^0")
    grads, _ = gradient_of(engine, unroll, eta, jnp.arange(400))
    doubts = doubts_of(engine, unroll, eta, jnp.arange(400))
    assert error(grads, expected) > 0.1 and [*doubts] == ["held_residual"]
    assert "or from a copy that is held" in doubts["held_residual"]
    both = Implicit(tolerance=1e-12)
    assert error(gradient_of(both, unroll, eta, jnp.arange(400))[0], expected) < 1e-8


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_decoupled_weight_decay_is_told_where_the_rest_is_held(decay):
    rule = optax.chain(
        optax.trace(0.8), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(0.1)
    )
    unroll, eta, _ = quadratic(rule)
    doubts = doubts_of(Implicit(tolerance=1e-12, variables="^0"), unroll, eta, jnp.arange(600))
    assert [*doubts] == ["held_residual"] * (decay > 0)


def test_a_series_without_a_tolerance_is_told_where_it_leaves_most():
    unroll, eta, _ = quadratic(optax.sgd(1e-6))
    series = Implicit("neumann", iterations=20, tolerance=0.0)
    text = doubts_of(series, unroll, eta, jnp.arange(50))["solver_residual"]
    assert "`fixed_point_gap` is a lower bound" in text
    unroll, eta, expected = quadratic()
    assert doubts_of(series, unroll, eta, jnp.arange(400)) == {}
    short = Implicit("cg", iterations=1, tolerance=0.0)
    assert error(gradient_of(short, unroll, eta, jnp.arange(400))[0], expected) > 0.01
    assert [*doubts_of(short, unroll, eta, jnp.arange(400))] == ["solver_residual"]


@pytest.mark.parametrize("through", [MixedFlow(), Reverse(), Forward()], ids=repr)
def test_any_exact_engine_differentiates_the_last_steps(through):
    unroll, eta, _ = quadratic()
    (_, aux), grads = engine_call(Truncated(3, through), unroll, eta, jnp.arange(20))
    expected = engine_call(Truncated(3, Reverse("nested")), unroll, eta, jnp.arange(20))[1]
    assert error(grads, expected) < 1e-12
    assert len({len(leaf) for leaf in aux.inner}) == 1 and len(aux.inner.losses) == 20


def test_what_the_engine_of_the_last_steps_doubts_is_passed_on():
    unroll, eta, _ = quadratic()
    assert [*doubts_of(Truncated(1, Implicit()), unroll, eta, jnp.arange(2))] == [
        "fixed_point_residual"
    ]


@pytest.mark.parametrize("engine", [Truncated(2), SAMA(), Implicit()], ids=repr)
def test_batches_may_be_numpy_arrays(engine):
    unroll, eta, _ = quadratic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        (_, _), grads = engine.value_and_grad(unroll, eta, np.arange(20))
    expected = engine_call(engine, unroll, eta, jnp.arange(20))[1]
    np.testing.assert_allclose(grads, expected, rtol=1e-12)


@pytest.mark.parametrize("engine", [Truncated(1, finite_difference=0.01), SAMA()], ids=repr)
def test_differences_of_a_bfloat16_state_are_not_rounded_away(engine):
    """theta moves by 1e-4 an entry, and 1 + 1e-4 is 1 in bfloat16."""

    def loss(eta, theta, batch):
        return jnp.sum((theta - eta).astype(jnp.float32) ** 2) / 2

    unroll = descent(
        loss,
        lambda eta, theta: jnp.sum(theta.astype(jnp.float32)),
        jnp.ones(10_000, jnp.bfloat16),
        optax.sgd(0.1),
    )
    (_, aux), grads = engine_call(engine, unroll, jnp.float32(1), jnp.arange(3))
    expected = engine_call(Truncated(1), unroll, jnp.float32(1), jnp.arange(3))[1]
    assert error(grads, expected) < 0.02 and aux.state[0].dtype == jnp.bfloat16


def test_a_warm_start_without_its_state_is_refused():
    unroll, eta, _ = quadratic()
    message = r"begins from the last solve: pass `state=engine.init\(key, unroll, eta\)`"
    with pytest.raises(ValueError, match=message):
        Implicit(warm_start=True).value_and_grad(unroll, eta, jnp.arange(5))
