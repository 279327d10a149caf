"""T = 0: an inner loop without steps. All that is computed is `init` and the outer loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Algorithm, Forward, MixedFlow, Reverse, Trainer, Truncation, Unroll
from metalearn.planning.plan import plan
from metalearn.planning.step_cost import Candidate
from metalearn.training.evaluation import ALL_STEPS, segments_of
from tests.cases import ENGINES, ESTIMATORS, TASKS
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
ETA = {"weights": np.array([0.3, -0.4]), "scale": np.array(-1.0)}


def unroll():
    """A state of three kinds of leaves, and an outer loss that reads it and eta."""

    def step(eta, state, batch, grad):
        grads = grad(lambda theta: jnp.sum(theta**2) * batch)(state["theta"])
        return {**state, "theta": state["theta"] - jnp.exp(eta["scale"]) * grads}

    def init(eta):
        return {"theta": jnp.sin(eta["weights"]), "key": KEY, "count": jnp.zeros((), jnp.int32)}

    def loss(eta, state):
        first = state["theta"][0]
        return jnp.sum(state["theta"] ** 3) * jnp.exp(eta["scale"]), {"first": first}

    return Unroll(init, step, loss)


def outer_loss_at_theta_0(eta):
    return unroll().loss(eta, unroll().init(eta))[0]


FIRST = ("Forward", "Reverse-nested", "MixedFlow", "MixedFlow-host")  # of each kind one


@pytest.mark.parametrize("name", quick(ENGINES, lambda name: name in FIRST))
def test_the_meta_gradient_is_that_of_the_outer_loss_at_theta_0(name):
    @jax.jit
    def solve(eta):
        return ENGINES[name].value_and_grad(unroll(), eta, jnp.arange(0.0))

    (loss, aux), grads = solve(ETA)
    expected, expected_grads = jax.value_and_grad(outer_loss_at_theta_0)(ETA)
    np.testing.assert_allclose(loss, expected, rtol=1e-14)
    for leaf, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-13)
    np.testing.assert_array_equal(aux.state["theta"], jnp.sin(ETA["weights"]))
    assert aux.inner.losses.shape == aux.inner.finite.shape == (0, 1)
    assert aux.metrics["first"] == aux.state["theta"][0]


@pytest.mark.parametrize("name", quick(ESTIMATORS, lambda name: name == "InverseVariance-PES"))
def test_estimators_see_the_outer_loss_at_theta_0(name):
    @jax.jit
    @jax.vmap
    def solve(key):
        state = ESTIMATORS[name].init(key, unroll(), ETA)
        (_, aux), grads = ESTIMATORS[name].value_and_grad(unroll(), ETA, jnp.arange(0.0), state)
        return ravel_pytree(grads)[0], aux.engine

    draws, _ = solve(jax.random.split(KEY, 2000))
    exact = ravel_pytree(jax.grad(outer_loss_at_theta_0)(ETA))[0]
    errors = draws.std(0) / np.sqrt(len(draws))
    assert (abs(draws.mean(0) - exact) <= 4 * errors + 1e-4).all()


@dataclasses.dataclass(frozen=True)
class Offsets(Algorithm):
    """Predict the mean of the support targets, times what is learned: no inner steps."""

    inner_steps: int = 0

    def init(self, key):
        return {"scale": jnp.ones(())}

    def unroll(self, episode, key):
        def loss(eta, mean):
            return jnp.mean((eta["scale"] * mean - episode.query[1]) ** 2), {}

        def step(eta, state, batch, grad):
            return state

        return Unroll(lambda eta: eta["scale"] * episode.support[1].mean(), step, loss)

    def batches(self, episode, key):
        return jnp.arange(self.inner_steps)

    def trained(self, eta, state):
        return {"prediction": eta["scale"] * state}, ()

    def predict(self, params, statistics, inputs, key):
        return jnp.full((len(inputs), 1), params["prediction"])


WAVES = TASKS["Sinusoid"]
TRAINER = Trainer(Offsets(), optimizer=optax.sgd(0.1), tasks_per_step=4)


def test_a_trainer_trains_saves_and_adapts_without_inner_steps(tmp_path):
    state = TRAINER.fit(WAVES, 30, key=KEY, progress=False)
    _, metrics = TRAINER.step(state, WAVES)
    assert metrics["loss"] > 0 and "inner_loss_first" not in metrics
    assert 0 < state.eta["scale"] < 0.9  # shrunk: three points say little of a wave
    loss = TRAINER.evaluate(state.eta, WAVES, KEY, 50)["loss"].mean
    assert loss < TRAINER.evaluate(TRAINER.init(KEY).eta, WAVES, KEY, 50)["loss"].mean
    support, query = WAVES.sample(KEY)
    learner = TRAINER.algorithm.adapt(state.eta, support, KEY)
    assert learner.steps == 0
    expected = state.eta["scale"] ** 2 * support[1].mean()
    np.testing.assert_allclose(learner.predict(query[0]), jnp.full((4, 1), expected), rtol=1e-6)


@pytest.mark.slow
def test_health_and_costs_do_without_inner_steps():
    state = TRAINER.init(KEY)
    report = TRAINER.check_health(state, WAVES)
    assert not report.errors and not report.warnings
    TRAINER.check_memory(WAVES)
    planned = plan(TRAINER, WAVES, candidates=[Candidate(Reverse()), Candidate(MixedFlow())])
    assert planned.inner_steps == 0 and all(row.cost is not None for row in planned.rows)
    assert segments_of(TRAINER.algorithm, WAVES, 4) == [ALL_STEPS]


@pytest.mark.parametrize("segment", [2, "auto"])
@pytest.mark.parametrize("engine", [MixedFlow(), Forward()], ids=repr)
def test_segments_of_no_steps_are_refused(engine, segment):
    trainer = dataclasses.replace(TRAINER, engine=engine, segment=segment)
    message = (
        rf"^`Trainer\(segment={segment}\)` cuts inner loops into programs, but these take no inner "
        r"steps \(T = 0\)\. Leave `segment`\."
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(WAVES, 1, key=KEY, progress=False)


def test_truncations_of_no_steps_are_refused():
    trainer = dataclasses.replace(TRAINER, truncation=Truncation(2))
    message = (
        r"^`Trainer\(truncation=Truncation\(2\)\)` cuts inner loops into truncations, but these "
        r"take no inner steps \(T = 0\)\. Leave `truncation`\."
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(WAVES, 1, key=KEY, progress=False)
