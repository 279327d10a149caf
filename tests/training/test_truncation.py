"""Truncated training: inner runs that go on from one outer step to the next."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import (
    ES,
    PES,
    Algorithm,
    Episode,
    Forward,
    MixedFlow,
    Reverse,
    Tasks,
    Trainer,
    Truncation,
    Unroll,
)
from metalearn.algorithms import Hyperparameter, LearnedOptimizer, Quadratic, TunedRule
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import Quadratics
from metalearn.engines.inner_loop import rollout
from metalearn.training.faults import NonFiniteError
from tests.cases import ALGORITHMS, ENGINES
from tests.helpers.checkpoints import bits
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
T = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bowls(Tasks):
    """Quadratics about a random centre; one in three has none, if `broken`."""

    broken: bool = dataclasses.field(default=False, metadata={"static": True})

    def sample(self, key):
        centre = jax.random.normal(key, (3,))
        bad = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.3) & self.broken
        return Episode(jnp.where(bad, jnp.nan, centre), centre)


@dataclasses.dataclass(frozen=True)
class Descent(Algorithm):
    """Learn a rate and a starting point; the state holds a key and a counter too."""

    steps: int = T

    def init(self, key):
        return {"rate": jnp.asarray(0.1), "start": 0.1 * jax.random.normal(key, (3,))}

    def unroll(self, episode, key):
        def init(eta):
            return {"theta": eta["start"], "total": jnp.zeros(()), "key": key, "count": 0}

        def step(eta, state, batch, grad):
            def loss(theta):
                value = ((theta - episode.support) ** 2 * (1 + 0.1 * batch)).sum()
                return value, value

            slope, value = grad(loss, has_aux=True)(state["theta"])
            theta = state["theta"] - eta["rate"] * jnp.tanh(slope)
            now, key = jax.random.split(state["key"])
            theta = theta + 0.01 * jax.random.normal(now, (3,))
            return {
                "theta": theta,
                "total": state["total"] + value,
                "key": key,
                "count": state["count"] + 1,
            }

        def loss(eta, state):
            final = ((state["theta"] - episode.query) ** 2).sum()
            return final + 0.1 * state["total"], {"count": state["count"]}

        def resume(state):
            return {**state, "total": jnp.zeros(())}

        return Unroll(init, step, loss, resume=resume)

    def batches(self, episode, key):
        del episode
        return jax.random.uniform(key, (self.steps,))


@functools.cache  # and with a trainer its compiled step
def trainer(truncation, **options):
    options = {"optimizer": optax.sgd(0.01), "tasks_per_step": 4, **options}
    return Trainer(Descent(), options.pop("engine", Reverse()), truncation=truncation, **options)


def together(steps, **options):
    """A truncation whose tasks begin and end together."""
    return Truncation(steps, staggered=False, **options)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def run(trainer, steps, tasks=Bowls()):
    state, seen = trainer.init(KEY, tasks), []
    for _ in range(steps):
        state, metrics = trainer.step(state, tasks)
        seen.append((state, metrics))
    return seen


# The other two are quick in the pairs of `test_every_algorithm_runs_in_truncations...`.
WHOLE = quick([Reverse(), Forward(), MixedFlow()], lambda engine: engine == MixedFlow())


@pytest.mark.slow
@pytest.mark.parametrize("engine", WHOLE, ids=str)
def test_a_truncation_as_long_as_the_horizon_is_a_whole_unroll(engine):
    whole = run(trainer(None, engine=engine), 3)
    cut = run(trainer(Truncation(T), engine=engine), 3)
    for (state, metrics), (expected, expected_metrics) in zip(cut, whole, strict=True):
        np.testing.assert_allclose(flat(state.eta), flat(expected.eta), rtol=1e-12)
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-12)


def test_inner_runs_go_on_to_where_a_whole_unroll_ends_and_then_begin_anew():
    still = trainer(together(3), optimizer=optax.sgd(0.0))
    seen = run(still, 5)
    assert [float(m["count"]) for _, m in seen] == [3, 6, 9, 12, 3]
    start = still.init(KEY, Bowls())
    keys = still.task_keys(start)

    @jax.jit
    @jax.vmap
    def ends(key):
        sample_key, unroll_key, batch_key, _ = jax.random.split(key, 4)
        episode = Bowls().sample(sample_key)
        unroll = Descent().unroll(episode, unroll_key)
        return rollout(unroll, start.eta, Descent().batches(episode, batch_key))[1].state

    expected = ends(keys)
    carried = seen[3][0].inner
    np.testing.assert_allclose(carried.state["theta"], expected["theta"], rtol=1e-12)
    assert (jax.random.key_data(carried.state["key"]) == jax.random.key_data(expected["key"])).all()
    assert (jax.random.key_data(carried.key) == jax.random.key_data(keys)).all()
    assert (jax.random.key_data(seen[4][0].inner.key) != jax.random.key_data(keys)).any(1).all()


def test_the_meta_gradient_is_that_of_the_steps_taken_with_the_past_a_constant():
    made = trainer(together(3), tasks_per_step=1)
    (before, _), (after, metrics) = run(made, 2)
    carried = jax.tree.map(lambda x: x[0], before.inner)
    sample_key, unroll_key, batch_key, _ = jax.random.split(carried.key, 4)
    episode = Bowls().sample(sample_key)
    unroll = Descent().unroll(episode, unroll_key)
    batches = Descent().batches(episode, batch_key)[3:6]

    def outer(eta):
        state = {**carried.state, "total": jnp.zeros(())}  # as `resume` says
        for batch in batches:
            state = unroll.step(eta, state, batch, jax.grad)
        return unroll.loss(eta, state)[0]

    loss, grads = jax.jit(jax.value_and_grad(outer))(before.eta)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(flat(after.eta), flat(before.eta) - 0.01 * flat(grads), rtol=1e-12)
    assert (grads["start"] == 0).all()  # where the run began is past


@pytest.mark.slow
def test_the_start_of_a_run_is_learned_in_its_first_truncation():
    (after, _), *_ = run(trainer(together(3)), 1)
    assert (flat(after.eta) != flat(trainer(together(3)).init(KEY, Bowls()).eta)).all()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 2])
def test_truncations_in_chunks_are_the_same(chunk):
    expected = run(trainer(Truncation(3)), 5)[-1]
    state, metrics = run(trainer(Truncation(3), chunk=chunk), 5)[-1]
    np.testing.assert_allclose(flat(state.eta), flat(expected[0].eta), rtol=1e-12)
    np.testing.assert_allclose(state.inner.state["theta"], expected[0].inner.state["theta"])
    assert (state.inner.step == expected[0].inner.step).all()
    assert metrics.keys() == expected[1].keys()


def test_staggered_tasks_end_at_different_times_and_every_one_runs_its_horizon_later():
    seen = run(trainer(Truncation(3)), 8)
    steps = np.stack([state.inner.step for state, _ in seen])
    horizons = np.stack([state.inner.horizon for state, _ in seen])
    assert horizons[0].tolist() == [3, 6, 9, 12]
    assert (horizons[4:] == T).all()
    # From the fourth step on there is a task of every age.
    assert all(sorted(row) == [3, 6, 9, 12] for row in steps[3:])


def test_horizons_are_log_uniform_multiples_of_the_truncation():
    truncation, longest = Truncation(5, shortest=10), 1000
    keys = jax.random.split(KEY, 4000)
    drawn = np.asarray(jax.vmap(lambda key: truncation.draw(key, longest, jnp.ones(())))(keys))
    assert drawn.min() == 10 and drawn.max() == 1000 and (drawn % 5 == 0).all()
    below = (drawn < 100).mean()  # half of the range of logarithms, 10 to 1005
    assert abs(below - np.log(10) / np.log(100.5)) < 4 * 0.5 / np.sqrt(len(drawn))
    few = jax.vmap(lambda key: Truncation(10, shortest=11).draw(key, 40, jnp.ones(())))(keys)
    chances = np.log(np.asarray([3, 4, 5]) / [2, 3, 4]) / np.log(5 / 2)  # of 20, 30, 40
    found = [(few == n).mean() for n in (10, 20, 30, 40)]
    np.testing.assert_allclose(found, [0, *chances], atol=4 * 0.5 / np.sqrt(len(keys)))


@pytest.mark.slow
def test_a_task_that_is_not_finite_is_left_out_counted_and_replaced():
    made = trainer(together(3), tasks_per_step=8)
    tasks = Bowls(broken=True)
    start = made.init(KEY, tasks)
    state, metrics = made.step(start, tasks)
    finite = np.isfinite(np.asarray(state.inner.state["theta"])).all(1)
    assert 0 < metrics["tasks_reset"] == (~finite).sum() < 8
    assert all(np.isfinite(value) for value in metrics.values())

    # The others count as if they had been alone,
    @jax.jit
    def alone(key):
        sample_key, unroll_key, batch_key, _ = jax.random.split(key, 4)
        episode = tasks.sample(sample_key)
        unroll = Descent().unroll(episode, unroll_key)
        batches = Descent().batches(episode, batch_key)[:3]
        return Reverse().value_and_grad(unroll, start.eta, batches)

    found = [alone(key) for key in made.task_keys(start)[finite]]
    grads, losses = [flat(grad) for _, grad in found], [loss for (loss, _), _ in found]
    np.testing.assert_allclose(flat(state.eta), flat(start.eta) - 0.01 * np.mean(grads, 0))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses))
    # go on, and new tasks begin in the place of those that broke.
    after, _ = made.step(state, tasks)
    assert (np.asarray(after.inner.step) == np.where(finite, 6, 3))[
        np.isfinite(np.asarray(after.inner.state["theta"])).all(1)
    ].all()
    same = (jax.random.key_data(after.inner.key) == jax.random.key_data(state.inner.key)).all(1)
    assert (same == finite).all()


@pytest.mark.slow
def test_a_step_in_which_no_task_is_finite_says_so_and_leaves_eta_alone():
    made, tasks = trainer(together(3), tasks_per_step=1), Bowls(broken=True)
    init = jax.jit(made.init)
    starts = [init(key, tasks) for key in jax.random.split(KEY, 20)]
    steps = [(start, *made.step(start, tasks)) for start in starts]
    broken = [step for step in steps if step[2]["tasks_reset"] == 1]
    assert broken
    for before, after, metrics in broken:
        assert np.isnan(metrics["loss"]) and metrics["meta_grad_norm"] == 0
        np.testing.assert_array_equal(flat(after.eta), flat(before.eta))
    before = broken[0][0]
    message = "In this step all 1 inner runs became NaN or infinite .* lower the inner learning"
    with pytest.raises(NonFiniteError, match=message):
        made.fit(tasks, 1, state=before, progress=False)


@pytest.mark.slow
def test_a_task_whose_meta_gradient_has_no_finite_norm_is_left_out():
    """Its entries are finite, the sum of their squares is not."""
    with jax.enable_x64(False):
        steep = dataclasses.replace(trainer(together(3)), algorithm=Steep(), tasks_per_step=2)
        _, metrics = steep.step(steep.init(KEY, Bowls()), Bowls())
    assert metrics["tasks_reset"] == 2 and metrics["meta_grad_norm"] == 0


class Steep(Descent):
    """An outer loss with a slope of 1e19."""

    def unroll(self, episode, key):
        unroll = super().unroll(episode, key)
        return unroll._replace(loss=lambda eta, state: (1e19 * eta["start"].sum(), {}))


def test_a_metric_that_is_not_finite_takes_its_task_out_too():
    sick = dataclasses.replace(trainer(together(3)), algorithm=Sick(), tasks_per_step=2)
    _, metrics = sick.step(sick.init(KEY, Bowls()), Bowls())
    assert metrics["tasks_reset"] == 2


class Sick(Descent):
    """A metric of infinity beside a finite loss."""

    def unroll(self, episode, key):
        unroll = super().unroll(episode, key)
        return unroll._replace(loss=lambda eta, state: (eta["start"].sum(), {"worst": jnp.inf}))


# The cheapest problem is quick.
PROBLEMS = quick(["supervised", "quadratic", "fds"], lambda problem: problem == "quadratic")


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_truncation_costs_what_its_own_steps_cost_whatever_the_horizon(problem):
    def temporaries(horizon):
        algorithm, tasks = long_run(problem, horizon)
        made = Trainer(algorithm, Reverse(), tasks_per_step=2, truncation=together(10))
        state = jax.eval_shape(made.init, KEY, tasks)
        return made.step.lower(state, tasks).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(20_000) < 1.1 * temporaries(200)


def long_run(problem, horizon):
    if problem == "fds":
        algorithm, tasks = ALGORITHMS["FDS"].problem("linen")
        free = {
            name: dataclasses.replace(h, windows=1, start=np.mean(h.start))
            for name, h in algorithm.hyperparameters.items()
        }
        return dataclasses.replace(algorithm, inner_steps=horizon, hyperparameters=free), tasks
    rule = TunedRule(optax.sgd, {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log")})
    if problem == "quadratic":
        return LearnedOptimizer(Quadratic(3, noise=0.1), rule, horizon), Quadratics(3)
    learner, tasks = ALGORITHMS["LearnedOptimizer"].problem("linen")
    return dataclasses.replace(learner, rule=rule, inner_steps=horizon), tasks


@pytest.mark.slow
def test_a_truncation_reads_what_the_whole_run_reads_there():
    for problem in ("supervised", "quadratic", "fds"):
        algorithm, tasks = long_run(problem, 40)
        episode = tasks.sample(KEY)
        whole = jax.jit(algorithm.batches)(episode, KEY)
        part = jax.jit(algorithm.batches_at)(episode, KEY, jnp.arange(7, 17))
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b[7:17])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_truncated_step_keeps_the_dtypes_of_its_state(dtype):
    narrow = dataclasses.replace(trainer(together(3)), algorithm=Narrow(dtype=dtype))
    narrow = dataclasses.replace(narrow, optimizer=optax.adam(0.01))
    state = narrow.init(KEY, Bowls())
    after, _ = narrow.step(state, Bowls())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    narrow.step(after, Bowls())
    assert narrow.step._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class Narrow(Descent):
    """The same with an eta of fewer bits."""

    dtype: type = jnp.bfloat16

    def init(self, key):
        return jax.tree.map(lambda x: x.astype(self.dtype), super().init(key))

    def unroll(self, episode, key):
        unroll = super().unroll(episode, key)

        def wide(function):
            return lambda eta, *rest: function(jax.tree.map(lambda x: x.astype(float), eta), *rest)

        return unroll._replace(
            init=wide(unroll.init), step=wide(unroll.step), loss=wide(unroll.loss)
        )


# Two pairs in `make test`: inner runs of one state, and of many batches.
LEARNERS = ("MAML-adam", "LearningRates", "token-weights", "FDS", "LearnedOptimizer")
PAIRS = quick(
    [(name, engine) for name in LEARNERS for engine in ("Reverse-nested", "Forward", "MixedFlow")],
    lambda *pair: pair == ("MAML-adam", "Reverse-nested"),
)


@pytest.mark.parametrize(("name", "engine"), PAIRS)
@pytest.mark.slow
def test_every_algorithm_runs_in_truncations_under_every_engine(name, engine):
    algorithm, tasks = ALGORITHMS[name].problem("linen")
    options = {"truncation": together(1), "tasks_per_step": 2, "optimizer": optax.sgd(1e-3)}
    made = Trainer(algorithm, ENGINES[engine], **options)
    reverse = dataclasses.replace(made, engine=Reverse(remat="step"))
    state = made.init(KEY, tasks)
    state, _ = made.step(state, tasks)
    (ours, metrics), (expected, _) = made.step(state, tasks), reverse.step(state, tasks)
    np.testing.assert_allclose(flat(ours.eta), flat(expected.eta), rtol=1e-9, atol=1e-12)
    assert metrics["tasks_reset"] == 0 and (ours.inner.step == 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [ES(), PES()], ids=["ES", "PES"])
def test_estimators_carry_their_particles_on_and_begin_anew_with_the_task(engine):
    made = trainer(together(3), engine=engine, optimizer=optax.sgd(0.0))
    seen = run(made, 5)
    assert [float(m["count"]) for _, m in seen] == [3, 6, 9, 12, 3]
    if isinstance(engine, PES):
        xi = [np.abs(flat(state.inner.engine.xi)).max() for state, _ in seen]
        assert xi[0] < xi[3] and xi[4] < xi[3]  # perturbations add up until the task ends
        assert not any(state.inner.engine.fresh.any() for state, _ in seen)


def test_truncated_training_compiles_one_step():
    made = trainer(Truncation(3))
    run(made, 4)
    assert made.step._cache_size() == 1


def test_a_run_resumed_in_mid_truncation_ends_where_it_would_have(tmp_path):
    made = trainer(Truncation(3, shortest=3))
    whole = made.fit(Bowls(), 7, key=KEY, progress=False)
    for steps in (4, 7):
        checkpoints = Checkpoints(tmp_path / "run", every=2)
        resumed = made.fit(Bowls(), steps, key=KEY, progress=False, checkpoints=checkpoints)
        checkpoints.close()
    assert bits(made.restore(tmp_path / "run", Bowls())) == bits(whole)
    ours, theirs = (jax.tree.leaves(state) for state in (resumed, whole))
    for a, b in zip(ours, theirs, strict=True):
        keys = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        a, b = (jax.random.key_data(x) if keys else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_truncated_unrolls_have_learned_is_read_without_their_tasks(tmp_path):
    made = trainer(Truncation(3))
    checkpoints = Checkpoints(tmp_path / "run", best="min eval/loss")
    state = made.fit(
        *(Bowls(), 2),
        key=KEY,
        progress=False,
        checkpoints=checkpoints,
        held_out=Bowls(),
        eval_every=1,
        eval_tasks=2,
    )
    checkpoints.close()
    restored = made.restore(tmp_path / "run")
    assert bits(restored) == bits(dataclasses.replace(state, inner=()))
    with pytest.raises(ValueError, match="was read without its tasks. Begin with `Trainer.init"):
        made.fit(Bowls(), 3, state=restored, progress=False)
    other = dataclasses.replace(made, optimizer=optax.adam(1e-3))
    with pytest.raises(ValueError, match="holds other arrays than"):
        other.restore(tmp_path / "run")


@pytest.mark.parametrize(
    ("truncation", "message"),
    [
        (Truncation(13), "A truncation of 13 inner steps is longer than the horizon, which is 12."),
        (Truncation(5), r"does not divide into truncations of 5. Lengths that fit: 1, 2, 3, 4, 6,"),
        (Truncation(3, shortest=20), "shortest=20, but the longest horizon, .* steps, is 12."),
    ],
)
def test_a_truncation_that_does_not_fit_the_horizon_is_refused(truncation, message):
    made = trainer(truncation)
    with pytest.raises(ValueError, match=message):
        made.step(made.init(KEY, Bowls()), Bowls())


def test_a_truncation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="takes at least one inner step, not 0"):
        Truncation(0)
    with pytest.raises(ValueError, match="No horizon is shorter than a truncation: shortest=2"):
        Truncation(3, shortest=2)


def test_each_task_has_a_transformation_of_its_own_before_the_mean():
    """By hand: an Adam for each task, whose state outlives its inner loop."""
    adam, made = optax.scale_by_adam(), {}
    outer = optax.chain(optax.trace(0.0), optax.scale(-0.01))  # its state is the mean
    for name, truncation in (("plain", Truncation(6)), ("adam", Truncation(6, transform=adam))):
        made[name] = trainer(truncation, optimizer=outer, tasks_per_step=2)
    states = {name: each.init(KEY, Bowls()) for name, each in made.items()}
    eta = states["plain"].eta
    slots, still = [adam.init(eta)] * 2, made["plain"].unrolls

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def each_task(eta, run):
        (grads, *_), carried = still._advance(eta, Bowls(), run)
        return grads, carried

    for step in range(4):  # the first task begins anew after one step, the second after two
        state = states["adam"]
        keys = made["adam"].task_keys(state)
        shares = still.truncation.shares(2, jnp.asarray(step == 0))
        plain = state.inner._replace(transform=states["plain"].inner.transform)
        grads, _ = each_task(state.eta, (plain, keys, shares))
        updates = []
        for task in range(2):
            mine = jax.tree.map(lambda leaf, task=task: leaf[task], grads)
            update, slots[task] = adam.update(mine, slots[task])
            updates.append(update)
        expected = jax.tree.map(lambda a, b: (a + b) / 2, *updates)
        states["adam"], metrics = made["adam"].step(state, Bowls())
        np.testing.assert_allclose(
            flat(states["adam"].optimizer[0].trace), flat(expected), rtol=1e-9
        )
    assert states["adam"].inner.transform.count.tolist() == [4, 4]
    assert metrics["tasks_reset"] == 0


@pytest.mark.slow
def test_the_transformation_of_a_task_that_is_not_finite_stays_as_it_was():
    transform = optax.scale_by_adam()
    made = trainer(together(3, transform=transform), optimizer=optax.sgd(0.0), tasks_per_step=8)
    state, metrics = made.step(made.init(KEY, Bowls(broken=True)), Bowls(broken=True))
    counts = state.inner.transform.count
    assert counts.sum() == 8 - metrics["tasks_reset"] and 0 < metrics["tasks_reset"] < 8
    assert np.isfinite(flat((state.inner.transform.mu, state.inner.transform.nu))).all()


def test_a_transformation_that_descends_is_refused():
    message = (
        r"`Truncation\(transform=\)` turns the meta-gradient 1 into -0.5: it descends, .* "
        r"would go uphill. Take a transformation that rescales, such as `optax.scale_by_adam\(\)`"
    )
    with pytest.raises(ValueError, match=message):
        Truncation(3, transform=optax.sgd(0.5))
    assert Truncation(3) == Truncation(3) and "identity()" in repr(Truncation(3))
    by_name = optax.partition({"a": optax.scale(2.0)}, {"rate": "a", "start": "a"})
    assert Truncation(3, transform=by_name).transform is by_name


def test_inner_runs_need_tasks_to_begin_with():
    with pytest.raises(ValueError, match=r"call `Trainer.init\(key, tasks\)`"):
        trainer(Truncation(3)).init(KEY)
