"""Learned optimizers: what they are trained for, and on what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Episode, MixedFlow, Reverse, Trainer, Truncation
from metalearn.algorithms import (
    Gradient,
    HypergradientRule,
    Hyperparameter,
    LearnedOptimizer,
    PerParameter,
    PointwiseGRU,
    Problem,
    Quadratic,
    StepFeatures,
    StepLoss,
    Streamed,
    Supervised,
    Together,
    TunedRule,
)
from metalearn.datasets import HeldOut, Quadratics, SideBySide, TrainingRuns
from metalearn.engines.inner_loop import rollout
from tests.cases import TASKS, Float64, Tokenwise, mlp

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
RATE = Hyperparameter(1e-3, 10.0, 0.1, space="log")
SGD = TunedRule(optax.sgd, {"learning_rate": RATE})
BOWL = LearnedOptimizer(Quadratic(3), SGD, inner_steps=4)
CLASSIFIER = Float64(mlp("linen", width=5))


def solved(learner, tasks, engine=None, eta=None):
    """Return ((loss, aux), gradient) of one task, and the task."""
    episode = jax.jit(tasks.sample)(jax.random.key(3))
    eta = learner.init(KEY) if eta is None else eta

    @jax.jit
    def solve(eta, episode):
        unroll = learner.unroll(episode, KEY)
        return (engine or Reverse()).value_and_grad(unroll, eta, learner.batches(episode, KEY))

    return solve(eta, episode), episode


def test_the_outer_loss_is_the_mean_training_loss_of_a_run_one_can_write_by_hand():
    ((loss, aux), _), episode = solved(BOWL, Quadratics(3))
    curvatures, minimum = episode.support
    theta, losses = jax.random.normal(KEY, (3,)), []
    for _ in range(4):
        losses.append(0.5 * jnp.mean(curvatures * (theta - minimum) ** 2))
        theta = theta - 0.1 * curvatures * (theta - minimum) / 3
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(aux.state.params, theta, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["training_loss_last"], losses[-1], rtol=1e-6)
    final = 0.5 * jnp.mean(curvatures * (theta - minimum) ** 2)
    np.testing.assert_allclose(aux.metrics["validation_loss"], final, rtol=1e-6)


def test_judged_by_validation_the_outer_loss_is_that_of_the_last_theta():
    judged = dataclasses.replace(BOWL, judge="validation")
    ((loss, aux), _), _ = solved(judged, Quadratics(3))
    assert loss == aux.metrics["validation_loss"]


def test_a_loss_above_the_cap_counts_as_the_cap_and_has_no_derivative():
    wild = {"learning_rate": jnp.log(jnp.asarray(9.0))}
    steep = Quadratics(3, curvature=(9.0, 10.0))
    ((loss, _), grads), _ = solved(BOWL, steep, eta=wild)
    assert loss > 100 and abs(grads["learning_rate"]) > 100
    capped = dataclasses.replace(BOWL, cap=1e-3)
    ((loss, _), grads), _ = solved(capped, steep, eta=wild)
    np.testing.assert_allclose(loss, 1e-3)
    assert grads["learning_rate"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        TunedRule(optax.adamw, {"learning_rate": RATE, "b1": Hyperparameter(0, 1, 0.9)}),
        HypergradientRule(),
        PerParameter((Gradient(), StepFeatures((3,))), PointwiseGRU(3), step_scale=0.1),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_whole_unroll_has_one_meta_gradient_under_reverse_and_mixed_flow(rule):
    learner = LearnedOptimizer(Supervised(CLASSIFIER, batch=2), rule, inner_steps=5)
    (_, expected), _ = solved(learner, TASKS["TrainingRuns"])
    (_, grads), _ = solved(learner, TASKS["TrainingRuns"], MixedFlow())
    expected, grads = ravel_pytree(expected)[0], ravel_pytree(grads)[0]
    assert jnp.linalg.norm(expected) > 1e-6
    assert jnp.linalg.norm(grads - expected) < 1e-10 * jnp.linalg.norm(expected)


@pytest.mark.slow
def test_truncations_judge_each_part_by_the_losses_of_its_own_steps():
    learner = dataclasses.replace(BOWL, inner_steps=6)
    still = Trainer(learner, Reverse(), optax.sgd(0.0), tasks_per_step=1)
    cut = dataclasses.replace(still, truncation=Truncation(2))
    state, losses = cut.init(KEY, Quadratics(3)), []
    for _ in range(3):
        state, metrics = cut.step(state, Quadratics(3))
        losses.append(metrics["loss"])
    _, expected = still.step(still.init(KEY), Quadratics(3))
    np.testing.assert_allclose(np.mean(losses), expected["loss"], rtol=1e-12)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
def test_the_parts_of_a_mixture_are_capped_one_by_one():
    steep = Quadratics(2, curvature=(9.0, 10.0))
    both = SideBySide({"a": steep, "b": Quadratics(2)})
    mixture = Together({"a": Quadratic(2), "b": Quadratic(2)})
    wild = {"learning_rate": jnp.log(jnp.asarray(3.0))}
    capped = LearnedOptimizer(mixture, SGD, inner_steps=8, cap=10.0)
    (_, grads), episode = solved(capped, both, eta=wild)
    batches, noise = capped.batches(episode, KEY)
    alone = dataclasses.replace(capped, problem=Quadratic(2))

    def outer(eta):
        task = Episode(episode.support["b"], episode.query["b"])
        unroll = alone.unroll(task, jax.random.fold_in(KEY, 1))
        return rollout(unroll, eta, (batches["b"], noise))[0]

    expected = jax.jit(jax.grad(outer))(wild)["learning_rate"]
    assert abs(expected) > 0
    # What is left of the steep one are its steps below the cap.
    assert jnp.isfinite(grads["learning_rate"]) and grads["learning_rate"] != 0


def test_a_batch_size_larger_than_the_data_is_refused():
    learner = LearnedOptimizer(Supervised(CLASSIFIER, batch=64), SGD, inner_steps=2)
    with pytest.raises(ValueError, match="^batch=64, but there are 3 training examples"):
        solved(learner, TASKS["TrainingRuns"])


# Problems side by side.

MIXTURE = Together(
    {"bowl": Quadratic(2), "digits": Supervised(CLASSIFIER, batch=2)}, {"bowl": 3.0, "digits": 1.0}
)
BOTH = SideBySide({"bowl": Quadratics(2), "digits": TASKS["TrainingRuns"]})


@pytest.mark.slow
def test_a_mixture_trains_each_part_as_if_it_were_alone():
    mixed = LearnedOptimizer(MIXTURE, SGD, inner_steps=3)
    ((loss, aux), grads), episode = solved(mixed, BOTH)
    alone, slopes = {}, {}
    for i, (name, part) in enumerate(MIXTURE.parts.items()):
        learner = LearnedOptimizer(part, SGD, inner_steps=3)
        task = Episode(episode.support[name], episode.query[name])
        batches, noise = mixed.batches(episode, KEY)

        def outer(eta, learner=learner, task=task, batches=(batches[name], noise), i=i):
            return rollout(learner.unroll(task, jax.random.fold_in(KEY, i)), eta, batches)

        run = jax.jit(jax.value_and_grad(outer, has_aux=True))
        (alone[name], own), slope = run(mixed.init(KEY))
        slopes[name] = slope["learning_rate"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
            aux.state.params[name],
            own.state.params,
        )
        np.testing.assert_allclose(
            aux.metrics[f"{name}/validation_loss"], own.metrics["validation_loss"], rtol=1e-12
        )
    np.testing.assert_allclose(loss, 0.75 * alone["bowl"] + 0.25 * alone["digits"], rtol=1e-12)
    expected = 0.75 * slopes["bowl"] + 0.25 * slopes["digits"]
    np.testing.assert_allclose(grads["learning_rate"], expected, rtol=1e-10)


def test_a_mixture_and_its_tasks_have_the_same_names():
    other = SideBySide({"bowl": Quadratics(2), "text": TASKS["Text"]})
    with pytest.raises(ValueError, match=r"are \['bowl', 'digits'\], and the tasks bring \['bowl'"):
        solved(LearnedOptimizer(MIXTURE, SGD, 2), other)
    with pytest.raises(ValueError, match=r"weights for \['bowl'\] and problems \['bowl', 'digits"):
        Together(MIXTURE.parts, {"bowl": 1.0})
    with pytest.raises(ValueError, match="at least one problem"):
        Together({})
    with pytest.raises(ValueError, match="at least one distribution"):
        SideBySide({})


@pytest.mark.slow
def test_a_text_is_read_a_batch_a_step():
    model = Float64(Tokenwise(mlp("linen", width=4)))
    learner = LearnedOptimizer(Streamed(model), SGD, inner_steps=3)
    ((loss, aux), grads), _ = solved(learner, TASKS["Text"])
    assert jnp.isfinite(loss) and grads["learning_rate"] != 0
    assert aux.metrics.keys() == {"training_loss_last", "validation_loss", "accuracy"}
    with pytest.raises(ValueError, match="bring 3 batches, one a step, .* takes 5 steps"):
        solved(dataclasses.replace(learner, inner_steps=5), TASKS["Text"])


def test_a_noisy_bowl_shows_the_step_a_minimum_that_is_off_and_judges_by_the_true_one():
    problem = Quadratic(2, noise=1.0)
    support = jnp.ones(2), jnp.zeros(2)
    shifts = problem.batches(support, jnp.arange(1000), KEY)
    np.testing.assert_allclose(shifts.std(), 1.0, atol=0.05)
    found = problem.loss(jnp.ones(2), (), support, jnp.asarray([1.0, 1.0]), KEY)
    assert found.loss == 0 and found.measure == 0.5


def test_curvatures_are_log_uniform_in_their_range():
    curvatures, _ = Quadratics(4000, curvature=(0.01, 1.0)).sample(KEY).support
    assert 0.01 <= curvatures.min() and curvatures.max() <= 1.0
    assert abs((curvatures < 0.1).mean() - 0.5) < 0.03


@dataclasses.dataclass(frozen=True)
class Rosenbrock(Problem):
    """A problem of a user's own: no model, no data."""

    def init(self, key):
        return jax.random.normal(key, (2,)), ()

    def batches(self, support, steps, key):
        return steps

    def loss(self, params, statistics, support, batch, key):
        value = self.validate(params, statistics, support)[0]
        return StepLoss(value, value, statistics)

    def validate(self, params, statistics, query):
        x, y = params
        return (1 - x) ** 2 + (y - x**2) ** 2, {}


@pytest.mark.slow
def test_a_problem_of_ones_own_is_one_small_class_and_a_learned_rate_gets_better_on_it():
    learner = LearnedOptimizer(Rosenbrock(), SGD, inner_steps=10)
    trainer = Trainer(learner, optimizer=optax.adam(0.1), tasks_per_step=4)
    state = trainer.init(KEY)
    eta = {"learning_rate": jnp.log(jnp.asarray(0.002))}
    state = dataclasses.replace(state, eta=eta)
    first = None
    for _ in range(30):
        state, metrics = trainer.step(state, Quadratics(2))  # its data are not looked at
        first = metrics["loss"] if first is None else first
    before, after = (
        trainer.evaluate(e, Quadratics(2), KEY, 64)["loss"].mean for e in (eta, state.eta)
    )
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "test"}, "No judge is called 'test'. There are: training, validation."),
        ({"inner_steps": 0}, "takes at least one step, not inner_steps=0"),
    ],
)
def test_a_learner_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BOWL, **options)


def test_an_optax_optimizer_is_no_rule_and_a_class_no_network():
    for make in (
        lambda: dataclasses.replace(BOWL, rule=optax.adam(1e-3)),
        lambda: PerParameter(base=optax.adam(1e-3)),
    ):
        with pytest.raises(TypeError, match=r"UpdateRule, not .*`TunedRule\(optax.adam"):
            make()
    with pytest.raises(TypeError, match=r"such as `PointwiseMLP\(\)`, not <class"):
        PerParameter(network=PointwiseGRU)
    for features in (Gradient(), (Gradient,)):
        with pytest.raises(TypeError, match="take tuples of features"):
            PerParameter(features)


def test_bowls_without_a_dimension_or_with_a_negative_curvature_are_refused():
    with pytest.raises(ValueError, match="dimension=0"):
        Quadratics(0)
    with pytest.raises(ValueError, match=r"curvature=\(-1.0, 1.0\)"):
        Quadratics(2, curvature=(-1.0, 1.0))


# Runs that break.


@pytest.mark.slow
def test_a_run_whose_loss_becomes_nan_is_replaced_and_the_others_go_on():
    """Some data sets of the batch have a NaN; the rate is learned from the rest."""
    inputs = np.random.default_rng(0).normal(size=(6, 5))
    inputs[0] = np.nan
    tasks = Halved.create(inputs, np.arange(6) % 5, validation=1)
    learner = LearnedOptimizer(Supervised(CLASSIFIER, batch=2), SGD, inner_steps=4)
    trainer = Trainer(learner, optimizer=optax.sgd(0.1), tasks_per_step=8, truncation=Truncation(2))
    start = trainer.init(KEY, tasks)
    state, metrics = trainer.step(start, tasks)
    assert 0 < metrics["tasks_reset"] < 8
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert state.eta["learning_rate"] != start.eta["learning_rate"]
    fine = np.isfinite(np.asarray(ravel_pytree(state.inner.state.params)[0]).reshape(-1))
    assert not fine.all()
    state, _ = trainer.step(state, tasks)
    assert set(state.inner.step.tolist()) == {2, 4}  # anew, or further


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Halved(TrainingRuns):
    """Trains on two rows out of six, validates on the last: a NaN row is often in neither."""

    def sample(self, key):
        rows = 1 + jax.random.permutation(key, jnp.arange(5))[:2]
        rows = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), rows.at[0].set(0), rows)
        told = self.inputs, self.training_targets
        return Episode((*told, rows), (self.inputs, self.targets, jnp.arange(5, 6)))


@pytest.mark.slow
def test_a_run_on_held_out_data_reads_the_same_shapes():
    held_out = HeldOut.create(np.eye(5), np.arange(5), np.ones((2, 5)), [0, 1])
    learner = LearnedOptimizer(Supervised(CLASSIFIER, batch=2), SGD, inner_steps=2)
    ((loss, _), _), _ = solved(learner, held_out)
    assert jnp.isfinite(loss)
