"""Engines that estimate: right in the mean, by a margin that a mistake would not slip through."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import ES, PES, Forward, InverseVariance, MixedFlow, Reverse, Trainer, Unroll
from metalearn._utils.trees import select
from metalearn.algorithms import MAML, squared_error
from metalearn.engines import MetaGradient
from metalearn.engines.estimators.inverse_variance import mix_by_inverse_variance
from metalearn.experiments import build
from metalearn.experiments.commands import plan as auto
from metalearn.planning.step_cost import Row
from tests.cases import ALGORITHMS, ESTIMATORS, MODELS, TASKS, Float64, to_float64

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
ETA = {"rate": np.array(0.5, np.float32), "start": np.array([0.3, -0.4])}  # of two dtypes
BATCHES = np.random.default_rng(0).normal(size=(4, 2))


def pursuit():
    """An unroll whose loss is quadratic in eta: its smoothed derivative is its derivative."""

    def step(eta, theta, batch, grad):
        return theta - 0.3 * grad(lambda x: jnp.sum((x - eta["rate"] * batch) ** 2))(theta)

    return final(lambda eta: eta["start"], step, lambda eta, theta: jnp.sum((theta - 1) ** 2))


def final(init, step, loss, **options):
    return Unroll(init, step, lambda eta, state: (loss(eta, state), {}), **options)


def one_step(function):
    """An unroll of no consequence: the loss is a function of eta, a scalar."""
    return final(
        lambda eta: jnp.zeros(()), lambda eta, x, batch, grad: x, lambda eta, x: function(eta)
    )


def estimates(engine, unroll, eta, batches, count):
    """Estimates [count, |eta|], of as many keys."""

    @jax.jit
    @jax.vmap
    def draw(key):
        state = engine.init(key, unroll, eta)
        return ravel_pytree(engine.value_and_grad(unroll, eta, batches, state)[1])[0]

    return draw(jax.random.split(KEY, count))


def assert_unbiased(draws, exact, within=0.1):
    """The mean of draws [count, n] is within 4 standard errors, which are small, of what it is."""
    error = draws.std(0) / np.sqrt(len(draws))
    assert (error < within * jnp.linalg.norm(exact)).all()
    assert (abs(draws.mean(0) - exact) < 4 * error).all()


def reverse(unroll, eta, batches):
    return ravel_pytree(Reverse().value_and_grad(unroll, eta, batches)[1])[0]


# In the mean.


@pytest.mark.parametrize("engine", [ES(), ES(pairs=3, sigma=2.0), PES(pairs=2)], ids=repr)
def test_an_estimate_of_a_whole_unroll_is_unbiased(engine):
    draws = estimates(engine, pursuit(), ETA, BATCHES, 4000)
    assert_unbiased(draws, reverse(pursuit(), ETA, BATCHES))


def test_the_variance_falls_with_the_number_of_pairs():
    few, many = (estimates(ES(n), pursuit(), ETA, BATCHES, 2000).var(0) for n in (1, 8))
    np.testing.assert_allclose(few / many, 8, rtol=0.3)


def test_what_is_estimated_is_the_derivative_of_the_smoothed_loss():
    """E sin(eta + eps) = exp(-sigma^2 / 2) sin(eta)."""
    draws = estimates(ES(pairs=2, sigma=1.5), one_step(jnp.sin), jnp.float64(0.3), BATCHES, 4000)
    smoothed = np.exp(-(1.5**2) / 2) * np.cos([0.3])
    assert_unbiased(draws, smoothed)
    assert abs(draws.mean() - np.cos(0.3)) > 0.4


@functools.cache
def adaptation():
    """An unroll of MAML on one task, its eta and batches, and the gradient of reverse mode."""
    algorithm, tasks = ALGORITHMS["MAML"].problem("linen")
    eta, episode = to_float64(algorithm.init(KEY)), to_float64(tasks.sample(KEY))
    unroll, batches = algorithm.unroll(episode, KEY), algorithm.batches(episode, KEY)
    return unroll, eta, batches, jax.jit(lambda eta: reverse(unroll, eta, batches))(eta)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [ES(2, 1e-3), PES(2, 1e-3)], ids=repr)
def test_maml_has_the_gradient_of_reverse_mode_in_the_mean(engine):
    *problem, exact = adaptation()
    assert_unbiased(estimates(engine, *problem, 4000), exact)


@pytest.mark.slow
def test_maml_has_almost_the_gradient_of_reverse_mode_in_every_mixture():
    *problem, exact = adaptation()
    draws = estimates(InverseVariance(ES(2, 1e-3)), *problem, 10)
    np.testing.assert_allclose(draws, jnp.tile(exact, (10, 1)), atol=1e-4)


# Truncations.


def influence_balancing():
    """A line of 23, of which eta pushes 10 up and 13 down; the first is watched.

    What pushes down arrives late, and is more: the derivative over few steps has the wrong sign
    (Tallec and Ollivier 2017, arXiv:1702.05043; Vicol et al. 2021).
    """
    signs = jnp.where(jnp.arange(23) < 10, 1.0, -1.0)

    def step(eta, state, batch, grad):
        x, total = state
        x = (x + jnp.append(x[1:], 0.0)) / 2 + eta * signs
        return x, total + (x[0] - 1) ** 2 / 2

    return final(
        lambda eta: (jnp.ones(23), jnp.zeros(())),
        step,
        lambda eta, state: state[1],
        resume=lambda state: (state[0], jnp.zeros(())),
    )


def in_parts(engine, unroll, eta, batches, steps, key=KEY):
    """(sum of losses, sum of gradients, engine state) of truncations, as a trainer drives them."""
    parts = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]), batches)
    first, state = jnp.arange(len(parts)) == 0, engine.init(key, unroll, eta)

    def advance(carry, part):
        (state, reached), (first, batches) = carry, part
        start = reached if unroll.resume is None else unroll.resume(reached)
        resumed = unroll._replace(init=lambda eta: select(first, unroll.init(eta), start))
        (loss, aux), grads = engine.value_and_grad(resumed, eta, batches, state)
        return (aux.engine, aux.state), (loss, grads)

    carry, seen = jax.lax.scan(advance, (state, unroll.init(eta)), (first, parts))
    return *jax.tree.map(lambda x: x.sum(0), seen), carry[0]


def test_pes_is_unbiased_where_truncated_backpropagation_has_the_wrong_sign():
    unroll, eta, batches = influence_balancing(), jnp.float64(0.5), jnp.arange(120)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def summed(engine, key):
        return in_parts(engine, unroll, eta, batches, 10, key)[1][None]

    keys = jax.random.split(KEY, 2000)
    exact, truncated = reverse(unroll, eta, batches), summed(Reverse(), keys[:1])[0]
    assert exact * truncated < 0
    assert_unbiased(summed(PES(2, 0.1), keys), exact, within=0.05)
    assert_unbiased(summed(ES(2, 0.1), keys), truncated, within=0.05)


def noisy():
    """An unroll whose state holds a key, an integer, a boolean and a sum of losses."""

    def init(eta):
        count = jnp.zeros((), jnp.int32)
        return {
            "x": eta["start"],
            "key": KEY,
            "count": count,
            "odd": count < 0,
            "sum": jnp.zeros(()),
        }

    def step(eta, state, batch, grad):
        key, now = jax.random.split(state["key"])
        grads = grad(lambda x: jnp.sum(jnp.cos(x * batch)))(state["x"])
        noise = 0.1 * jax.random.normal(now, (2,))
        x = state["x"] - eta["rate"] * grads + jnp.where(state["odd"], noise, 0.0)
        added = jnp.sum(jnp.tanh(x)) * state["count"]
        count = state["count"] + 1
        odd = ~state["odd"]
        return {"x": x, "key": key, "count": count, "odd": odd, "sum": state["sum"] + added}

    def resume(state):
        return {**state, "sum": jnp.zeros_like(state["sum"])}

    return final(init, step, lambda eta, state: state["sum"], resume=resume)


def data(tree):
    """Leaves as numbers: a PRNG key as its data."""
    keyed = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), tree)
    return jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keyed)


def pes_by_hand(engine, unroll, eta, parts):
    """Yield (loss, gradient, particles) of each truncation, in Python loops over particles."""
    count, state, particles, xi = engine.pairs, engine.init(KEY, unroll, eta), None, 0.0
    for part in parts:
        drawn = engine.draw_particles(eta, state)
        points = [jax.tree.map(lambda x: x[i], drawn.points) for i in range(2 * count)]  # noqa: B023
        flat, unravel = ravel_pytree(eta)
        eps = jnp.stack([ravel_pytree(point)[0] - flat for point in points[:count]])
        xi = xi + eps
        if particles is None:
            particles = [unroll.init(point) for point in points]
        else:
            particles = [unroll.resume(particle) for particle in particles]
        for batch in part:
            step = lambda pair: unroll.step(*pair, batch, jax.grad)  # noqa: B023, E731
            particles = list(map(step, zip(points, particles, strict=True)))
        losses = jnp.stack([unroll.loss(eta, particle)[0] for particle in particles])
        slopes = (losses[:count] - losses[count:]) / (2 * engine.sigma**2)
        yield losses.mean(), unravel(slopes @ xi / count), particles
        state = state._replace(key=drawn.key, fresh=jnp.array(False))


def test_pes_is_what_it_is_by_hand_whatever_the_state_holds():
    engine, unroll, parts = PES(2, 0.1), noisy(), (BATCHES[:1], BATCHES[1:])
    state, resumed = engine.init(KEY, unroll, ETA), unroll
    shapes = jax.eval_shape(lambda: state)
    for part, (loss, grads, particles) in zip(
        parts, pes_by_hand(engine, unroll, ETA, parts), strict=True
    ):
        run = jax.jit(functools.partial(engine.value_and_grad, resumed))
        (our_loss, aux), our_grads = run(ETA, part, state)
        state = aux.engine
        assert jax.eval_shape(lambda: state) == shapes  # noqa: B023
        np.testing.assert_allclose(our_loss, loss, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), our_grads, grads)
        ends = jax.tree.map(lambda *x: jnp.stack(x), *particles)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), data(state.states), data(ends)
        )
        first = jax.tree.map(lambda x: x[0], state.states)
        jax.tree.map(np.testing.assert_array_equal, data(aux.state), data(first))
        # Truncated training hands a carried state over: the particles go on from their own.
        lost = jax.tree.map(lambda x: x * jnp.nan if x.dtype == float else x, first)
        resumed = unroll._replace(init=lambda eta: lost)  # noqa: B023


def test_a_new_state_begins_a_new_run_whatever_was_carried():
    engine, unroll = PES(2, 0.1), noisy()
    new = engine.init(KEY, unroll, ETA)
    _, _, used = in_parts(engine, unroll, ETA, BATCHES, 2)
    assert not used.fresh
    left = new._replace(xi=used.xi, states=used.states)
    solve = jax.jit(lambda state: engine.value_and_grad(unroll, ETA, BATCHES, state)[1])
    jax.tree.map(np.testing.assert_array_equal, solve(left), solve(new))


@pytest.mark.slow
def test_persistent_particles_on_a_whole_unroll_are_evolution_strategies():
    (loss, aux), grads, (es_loss, es_aux), es_grads = (
        part
        for engine in (PES(3), ES(3))
        for part in engine.value_and_grad(noisy(), ETA, BATCHES, engine.init(KEY, noisy(), ETA))
    )
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), (es_loss, es_grads))
    jax.tree.map(np.testing.assert_array_equal, data(aux.state), data(es_aux.state))


# What comes back.


@pytest.mark.parametrize("engine", ESTIMATORS.values(), ids=repr)
def test_a_loss_that_eta_has_no_part_in_has_a_gradient_of_exactly_zero(engine):
    def step(eta, theta, batch, grad):
        return theta - 0.3 * grad(lambda x: jnp.sum((x - batch) ** 2))(theta)

    unroll = final(lambda eta: jnp.ones(2), step, lambda eta, theta: jnp.sum(jnp.exp(theta)))
    _, grads, _ = in_parts(engine, unroll, ETA, BATCHES, 2)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_each_call_draws_anew():
    run = jax.jit(functools.partial(ES().value_and_grad, pursuit(), ETA, BATCHES))
    (_, aux), first = run(KEY)
    _, second = run(aux.engine)
    assert (ravel_pytree(first)[0] != ravel_pytree(second)[0]).all()


def test_loss_metrics_and_inner_losses_are_means_and_one_particle_may_fail_for_all():
    def step(eta, theta, batch, grad):
        return theta - 0.1 * grad(lambda x: jnp.sum(x * eta) + jnp.where(eta > 0, 0.0, jnp.nan))(
            theta
        )

    unroll = Unroll(lambda eta: eta, step, lambda eta, x: (x, {"twice": 2 * x}))
    engine = ES(pairs=2, sigma=0.1)
    points = engine.draw_particles(jnp.float64(5.0), KEY).points
    run = jax.jit(lambda eta: engine.value_and_grad(unroll, eta, BATCHES, KEY))
    (loss, aux), _ = run(jnp.float64(5.0))
    np.testing.assert_allclose(loss, (points - 0.4 * points).mean())
    np.testing.assert_allclose(aux.metrics["twice"], 2 * loss)
    np.testing.assert_allclose(aux.state, 0.6 * points[0])
    np.testing.assert_allclose(aux.inner.losses[0], [(points**2).mean()])
    assert aux.inner.finite.all() and aux.inner.finite.shape == (4, 1)
    eta = jnp.float64(0.01)
    signs = engine.draw_particles(eta, KEY).points > 0
    assert signs.any() and not signs.all()
    (_, aux), _ = run(eta)
    assert not jnp.isfinite(aux.inner.losses).any()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ES", "PES", "InverseVariance"])
def test_the_trainer_takes_an_estimator_as_any_engine(engine):
    maml = MAML(Float64(MODELS["Functions"]), squared_error, inner_steps=2)
    whole, chunked = (
        Trainer(maml, ESTIMATORS[engine], tasks_per_step=4, chunk=chunk) for chunk in (None, 2)
    )
    start = whole.init(KEY)
    (state, metrics), (other, others) = (t.step(start, TASKS["Sinusoid"]) for t in (whole, chunked))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8), state.eta, other.eta)
    assert metrics.keys() == others.keys() and all(map(jnp.isfinite, metrics.values()))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start.eta, state.eta)
    assert all(jax.tree.leaves(moved))


# Mixed by inverse variance.


def mixture(function, eta=0.3, engine=None):
    """(weight of the pathwise part, gradient, what its estimator alone would say)."""
    engine = engine or InverseVariance(ES(pairs=8, sigma=0.1))
    unroll, eta = one_step(function), jnp.float64(eta)
    (_, aux), grads = engine.value_and_grad(unroll, eta, BATCHES, KEY)
    _, alone = engine.estimator.value_and_grad(unroll, eta, BATCHES, KEY)
    return aux.metrics["pathwise_weight"], grads, alone


@pytest.mark.slow
def test_on_a_smooth_loss_the_weight_is_pathwise():
    weight, grads, _ = mixture(jnp.sin)
    assert weight > 0.999
    np.testing.assert_allclose(grads, np.cos(0.3), rtol=0.01)
    assert mixture(lambda eta: 3 * eta)[:2] == (1, 3)  # of no variance at all


def chaotic(eta):
    """The logistic map, whose derivative doubles with each step."""
    return jax.lax.fori_loop(0, 50, lambda _, x: 4 * x * (1 - x), eta) + eta


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (lambda eta: 3 * eta + jnp.sqrt(0 * eta), 0),  # finite, its derivative NaN
        (lambda eta: jnp.round(100 * eta) / 100, 0),  # in steps, its derivative zero
        (chaotic, 1e-12),
    ],
)
@pytest.mark.slow
def test_where_the_pathwise_derivative_is_of_no_use_the_weight_is_the_estimators(function, most):
    weight, grads, alone = mixture(function)
    assert 0 <= weight <= most
    assert jnp.isfinite(grads) and grads != 0
    np.testing.assert_allclose(grads, alone, rtol=1e-4)


def test_pathwise_gradients_take_over_where_the_estimates_are_not_finite():
    fine, broken = jnp.array([1.0, 3.0]), jnp.array([1.0, jnp.inf])
    assert mix_by_inverse_variance(fine, broken) == (2, 1)
    assert mix_by_inverse_variance(broken, fine) == (2, 0)
    found, _ = mix_by_inverse_variance(broken, broken)
    assert not jnp.isfinite(found)  # nothing is made up


@pytest.mark.slow
def test_a_mixture_has_less_variance_than_its_parts_and_next_to_no_bias():
    """At sigma=1.5 a sine gives both about the same variance."""
    unroll, estimator = one_step(jnp.sin), ES(pairs=32, sigma=1.5)
    engine = InverseVariance(estimator)
    draws, alone = (
        estimates(e, unroll, jnp.float64(0.3), BATCHES, 1000) for e in (engine, estimator)
    )
    assert_unbiased(draws, np.exp(-(1.5**2) / 2) * np.cos([0.3]), within=0.02)
    assert draws.var() < 0.9 * alone.var()
    assert 0.1 < mixture(jnp.sin, engine=engine)[0] < 0.9


def test_a_mixture_with_persistent_particles_goes_on_from_them():
    estimator = PES(2, 0.1)
    ours, theirs = (
        in_parts(engine, noisy(), ETA, BATCHES, 2)[2]
        for engine in (InverseVariance(estimator, Reverse()), estimator)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), data(ours), data(theirs)
    )


# Names in configs.


def test_estimators_are_built_with_their_options():
    assert build.engine("es", {"pairs": 3, "sigma": None}) == ES(pairs=3)
    assert build.engine("pes", {"sigma": 0.1}) == PES(sigma=0.1)
    assert build.engine("inverse_variance", {"pairs": 3}) == InverseVariance(ES(pairs=3))
    assert build.engine("inverse_variance") == InverseVariance()
    with pytest.raises(ValueError, match=re.escape("It has: ['pairs', 'sigma'].")):
        build.engine("inverse_variance", {"remat": "step"})
    with pytest.raises(ValueError, match="The engine 'es' has no option 'directions'"):
        build.engine("es", {"directions": 2})


def test_a_row_of_a_plan_is_named_as_a_config_names_it():
    named = auto.settings(Row(PES(pairs=3), True, 2, None))
    assert named == {"engine": "pes", "engine_options": {"pairs": 3}, "chunk": 2}


# What is refused.


@pytest.mark.parametrize("engine", [ES, PES])
def test_no_pairs_are_refused(engine):
    message = f"`{engine.__name__}(pairs=0)`: the loss is evaluated at pairs of points, eta + eps"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        engine(pairs=0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_a_sigma_that_divides_by_nothing_is_refused(sigma):
    message = f"`PES(sigma={sigma})` is the standard deviation of perturbations of eta, and "
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        PES(sigma=sigma)


def refuses(engine: MetaGradient, eta, error, message, state=KEY):
    with pytest.raises(error, match="^" + re.escape(message)):
        engine.value_and_grad(pursuit(), eta, BATCHES, state)


@pytest.mark.parametrize("engine", [ES(3), PES(3)], ids=repr)
def test_a_state_without_a_key_is_refused(engine):
    message = f"`{engine!r}` draws random perturbations and needs a key: pass `state=engine.init("
    refuses(engine, ETA, ValueError, message, state=())
    refuses(InverseVariance(engine), ETA, ValueError, message, state=())


@pytest.mark.parametrize("engine", [ES(), PES(), InverseVariance()], ids=repr)
def test_an_eta_without_a_derivative_is_refused(engine):
    integer = {**ETA, "steps": jnp.int32(3)}
    refuses(engine, integer, TypeError, "`eta['steps']` has dtype int32, and a meta-gradient")
    refuses(engine, {}, ValueError, "`eta` has no leaves, so there is nothing to learn.")


@pytest.mark.parametrize("engine", [ES(), PES(), InverseVariance()], ids=repr)
def test_an_eta_that_rounds_perturbations_away_is_refused(engine):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ETA)
    refuses(engine, half, TypeError, "`eta['rate']` has dtype bfloat16, and ")


def test_an_outer_loss_that_rounds_differences_away_is_refused():
    unroll = pursuit()
    half = unroll._replace(
        loss=lambda eta, state: (unroll.loss(eta, state)[0].astype(jnp.bfloat16), {})
    )
    with pytest.raises(TypeError, match=r"outer loss is bfloat16, .* Return it in float32"):
        ES().value_and_grad(half, ETA, BATCHES, KEY)


def test_a_mixture_takes_an_eta_with_an_empty_leaf():
    unroll = pursuit()
    eta = {**ETA, "none": np.zeros((0, 3), np.float32)}
    inner = unroll._replace(
        init=lambda eta: unroll.init({name: eta[name] for name in ETA}),
    )
    grads = InverseVariance(ES(2)).value_and_grad(inner, eta, BATCHES, KEY)[1]
    assert grads["none"].shape == (0, 3) and np.isfinite(grads["rate"])


def test_a_mixture_refuses_one_pair_and_what_is_no_estimator():
    message = "`InverseVariance` takes variances over pairs, and `ES(pairs=1, sigma=0.01)` has only"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        InverseVariance(ES())
    message = "`InverseVariance(estimator=)` takes `ES(pairs=n)` or `PES(pairs=n)`, not Reverse("
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        InverseVariance(Reverse())


@pytest.mark.parametrize("pathwise", [Forward(directions=2), ES()], ids=repr)
def test_a_mixture_refuses_a_pathwise_engine_with_a_state_of_its_own(pathwise):
    message = (
        f"`InverseVariance(pathwise={pathwise!r})`: an engine that carries a state of its own, "
        "such as random directions, cannot be the pathwise part."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        InverseVariance(ES(2), pathwise).init(KEY, pursuit(), ETA)
    assert InverseVariance(ES(2), MixedFlow("none")).init(KEY, pursuit(), ETA) is KEY
