"""What a meta-gradient predicts: measured against runs, and judged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Algorithm, Forward, Layout, Replay, Trainer, Unroll, make_mesh
from metalearn.algorithms import FDS, Hyperparameter
from metalearn.datasets import HostTrainingRuns, Quadratics, TrainingRuns
from metalearn.diagnostics import smoothness
from metalearn.diagnostics.perturbed_runs import PerturbedRuns, metasmoothness, scale_of
from metalearn.diagnostics.smoothness import growth, largest_jump, three_runs
from tests.helpers.few_shot_data import images, linear

KEY, TASKS = jax.random.key(0), Quadratics(2)
CURVATURE = jnp.array([1.0, 2.0])


@dataclasses.dataclass(frozen=True)
class Pull(Algorithm):
    """Descent on a quadratic of eigenvalues 1 and 2, whose minimum is eta."""

    inner_steps: int = 6

    def init(self, key):
        return {"target": jnp.array([1.0, -0.5])}

    def batches(self, episode, key):
        return jnp.arange(self.inner_steps)

    def unroll(self, episode, key):
        def step(eta, state, batch, grad):
            theta, count = state
            loss = lambda x: jnp.sum(CURVATURE * (x - eta["target"]) ** 2) / 2  # noqa: E731
            return theta - 0.3 * grad(loss)(theta), count + 1

        def loss(eta, state):
            return jnp.sum(jnp.sin(state[0])), {}

        return Unroll(lambda eta: (jnp.zeros(2), 0), step, loss)


@dataclasses.dataclass(frozen=True)
class Chaos(Pull):
    """The logistic map, of which eta is the rate: chaotic from 3.57 on."""

    inner_steps: int = 40

    def init(self, key):
        return jnp.array([3.9])

    def unroll(self, episode, key):
        def step(eta, x, batch, grad):
            return eta * x * (1 - x)

        return Unroll(lambda eta: jnp.linspace(0.1, 0.8, 50), step, lambda eta, x: (x[0], {}))


@functools.cache
def measured(algorithm, **options):
    trainer = Trainer(algorithm, optimizer=optax.sgd(0.1), tasks_per_step=1)
    return smoothness(trainer, trainer.init(KEY), TASKS, directions=1, **options)


def test_a_smooth_loop_has_a_useful_meta_gradient_and_a_metasmoothness_of_one():
    result = measured(Pull())
    assert result.worth == "useful" and result.metasmoothness == 1.0
    assert result.inner_steps == 6 and result.inner_losses.shape == (6,)
    assert [p.name for p in result.predictions] == ["meta-gradient", "outer step", "random 1"]
    low, high = result.reach
    assert low <= 1e-3 and high >= 0.3
    for prediction in result.predictions:
        at = prediction.sizes.index(0.01)
        assert abs(prediction.changes[at] / (0.01 * prediction.slope) - 1) < 0.02
    assert result.predictions[0].slope < 0  # descent
    assert result.verdict.startswith("Useful: it predicts a change of the outer loss within 25%")


def test_the_outer_step_is_as_long_as_the_first_update():
    algorithm = Pull()
    trainer = Trainer(algorithm, optimizer=optax.sgd(0.1), tasks_per_step=1)
    grads, _ = trainer.gradient(trainer.init(KEY), TASKS)
    scale = np.linalg.norm(scale_of(algorithm.init(KEY))["target"])
    length = 0.1 * np.linalg.norm(grads["target"]) / scale
    assert np.isclose(measured(algorithm).outer_step, length, rtol=1e-4)
    far = Trainer(algorithm, optimizer=optax.sgd(1e3), tasks_per_step=1)
    result = smoothness(far, far.init(KEY), TASKS, directions=1)
    assert result.worth == "doubtful"
    assert "beyond that: take a smaller outer learning rate" in result.verdict


def test_a_chaotic_loop_is_useless_and_the_verdict_says_why():
    result = measured(Chaos())
    assert result.worth == "useless" and abs(result.metasmoothness) < 0.5
    assert np.isfinite(result.predictions[0].slope)
    assert result.verdict.startswith("Useless: at no two neighbouring step sizes from 1e-04 to 1")
    assert "the loop is chaotic" in result.verdict and "fewer inner steps" in result.verdict
    assert str(result) == result.verdict


def test_three_runs_alone_give_the_metasmoothness_of_the_first_random_direction():
    for algorithm in (Pull(), Chaos()):
        trainer = Trainer(algorithm, optimizer=optax.sgd(0.1), tasks_per_step=1)
        runs = three_runs(trainer, trainer.init(KEY), TASKS)
        assert np.isclose(runs.metasmoothness, measured(algorithm).metasmoothness, atol=0.05)
        assert runs.losses.shape == (3,)


def test_the_same_arguments_give_the_same_bits():
    again = repr(measured.__wrapped__(Chaos()).predictions)  # a NaN differs from itself
    assert again == repr(measured(Chaos()).predictions)


@pytest.mark.usefixtures("x64")
def test_norms_by_step_are_those_of_forward_mode_and_of_the_rest_of_the_loop():
    trainer = Trainer(Pull(), tasks_per_step=1)
    runs = PerturbedRuns.create(trainer, trainer.init(KEY), TASKS)
    v = {"target": jnp.array([0.3, -0.7])}
    tangents, pulled = runs.tangents(v), runs.pull_back([], [v])

    unroll = Pull().unroll(None, KEY)
    along = Unroll(
        lambda h: unroll.init(None),
        lambda h, *rest: unroll.step({"target": jnp.array([1.0, -0.5]) + h * v["target"]}, *rest),
        unroll.loss,
    )
    (_, aux), slope = Forward().value_and_grad(along, jnp.float64(0), jnp.arange(6))
    np.testing.assert_allclose(tangents.theta, aux.inner.tangent_norm[:, 0], rtol=1e-5)
    np.testing.assert_allclose(tangents.slope, slope, rtol=1e-5)
    np.testing.assert_allclose(pulled.slopes[2], slope, rtol=1e-5)

    # d theta_t / d h is (1 - (1 - 0.3 c)^t) v, and the inner gradient c (theta - eta).
    powers = (1 - 0.3 * CURVATURE)[None] ** jnp.arange(6)[:, None]
    expected = jnp.linalg.norm((CURVATURE * v["target"])[None] * powers, axis=1)
    np.testing.assert_allclose(tangents.gradients, expected, rtol=1e-5)

    end = runs.run(v, 0.0).theta[0]
    rest = (1 - 0.3 * CURVATURE)[None] ** jnp.arange(5, -1, -1)[:, None]
    np.testing.assert_allclose(
        pulled.cotangents, jnp.linalg.norm(rest * jnp.cos(end)[None], axis=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([[0.0, 0.0], [1.0, 1.0], [2.0, 3.0]], 1.0),
        ([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]], (2 - 0.5) / 2.5),  # the second one turns back
        ([[0.0, 0.0], [1.0, 2.0], [-1.0, -1.0]], -1.0),
    ],
)
def test_metasmoothness_is_the_agreement_of_signs_weighted_by_movement(ends, expected):
    assert np.isclose(metasmoothness([jnp.array(ends)]), expected)


def test_the_scale_of_a_leaf_is_its_size_and_of_zeros_that_of_eta():
    eta = {"a": jnp.array([0.1, -0.1]), "b": jnp.full(3, -6.0), "c": jnp.zeros(2)}
    scale = scale_of(eta)
    np.testing.assert_allclose(scale["a"], 0.1, rtol=1e-6)
    assert (scale["b"] == 1).all() and (scale["c"] == 1).all()
    assert (scale_of(jnp.zeros(3)) == 1).all()


def test_growth_and_jumps_are_read_off_the_norms():
    assert largest_jump(np.array([0.0, 1.0, 2.0, 60.0])) == (30.0, 4)
    assert largest_jump(np.array([1.0])) == (1.0, 0)
    assert growth(np.array([1.0, 1.0, 4.0, 8.0])) == 2.0 and growth(np.zeros(3)) == 1.0


SLOW = pytest.mark.slow


def equal_numbers(results):
    """Compare two results of `smoothness`, leaf by leaf."""
    parts = [
        [*jax.tree.leaves(result._replace(predictions=())), [p[1:] for p in result.predictions]]
        for result in results
    ]
    for part, expected in zip(*parts, strict=True):
        for leaf, other in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "segment", [2, pytest.param(4, marks=SLOW), pytest.param("auto", marks=SLOW)], ids=str
)
def test_a_run_in_segments_has_the_numbers_of_one_program(segment):
    """Of 6 inner steps; in segments of 4, the last one is shorter."""
    results, directions = [], {"direction": {"target": jnp.array([0.3, -0.7])}, "sizes": (0.1, 0.5)}
    for trainer in (
        Trainer(Pull(), optimizer=optax.sgd(0.1), tasks_per_step=1),
        Trainer(Pull(), optimizer=optax.sgd(0.1), tasks_per_step=1, segment=segment),
    ):
        results.append(smoothness(trainer, trainer.init(KEY), TASKS, **directions))
        assert results[-1].inner_steps == len(results[-1].cotangents) == 6
    equal_numbers(results)
    runs = three_runs(trainer, trainer.init(KEY), TASKS)
    assert np.isclose(runs.losses[0], results[0].loss, rtol=1e-6) and runs.metasmoothness == 1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_training_runs_on_the_host_are_read_a_segment_at_a_time(monkeypatch):
    algorithm = FDS(linear(outputs=10), {"learning_rate": Hyperparameter(0.01, 1.0, 0.1)}, 12, 8)
    reads, results, fetch_steps = [], [], HostTrainingRuns.fetch_steps

    def spied(tasks, keys, first, algorithm, read):
        reads.append(read.steps)
        return fetch_steps(tasks, keys, first, algorithm, read)

    monkeypatch.setattr(HostTrainingRuns, "fetch_steps", spied)
    replay = Replay(states=1)
    for kind, options in (
        (TrainingRuns, {}),
        (HostTrainingRuns, {"segment": 3, "replay": replay}),
    ):
        trainer = Trainer(algorithm, tasks_per_step=1, **options)
        tasks = kind.create(*images(), validation=10)
        results.append(smoothness(trainer, trainer.init(KEY), tasks, sizes=(0.1,)))
    equal_numbers(results)
    assert {*reads} == {0, 3}  # and the queries alone


def test_segments_of_a_run_are_on_one_device():
    trainer = Trainer(Pull(), tasks_per_step=1, segment=2, layout=Layout(make_mesh(1)))
    with pytest.raises(ValueError, match="whose segments run on one device, and this trainer has"):
        smoothness(trainer, trainer.init(KEY), TASKS)


def refused(message, algorithm=Pull(), eta=None, error=ValueError, **options):
    trainer = Trainer(algorithm, tasks_per_step=1)
    state = trainer.init(KEY)
    state = state if eta is None else dataclasses.replace(state, eta=eta)
    with pytest.raises(error, match=message):
        smoothness(trainer, state, TASKS, **options)


def test_bad_input_is_refused():
    wrong = r"`smoothness\(direction=\)` is a direction in eta, .* but `direction\['target'\]` has"
    refused(rf"{wrong} shape \[3\]. eta has \['target'\] \[2\]", direction={"target": jnp.ones(3)})
    refused("but it lacks leaves", direction={})
    refused("is zero everywhere, so that nothing moves", direction={"target": jnp.zeros(2)})
    for h in (0.0, -0.1, float("nan")):
        refused(rf"`smoothness\(step={h}\)`: it is a number above 0", step=h)
    refused(r"`smoothness\(sizes=0\)`: it is a number above 0", sizes=(0, 0.1))
    refused(r"`smoothness\(directions=0\)`: it is an integer, 1 or more", directions=0)
    refused("`Pull` takes no inner steps", Pull(inner_steps=0))
    refused("has dtype int32", eta={"target": jnp.arange(2)}, error=TypeError)
