"""Lists and streams of episodes: the order of their visits, and what is refused."""

import contextlib
import dataclasses
import re

import jax
import numpy as np
import pytest

from metalearn import Episode, Masked, MixedFlow, Truncation
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import GivenTasks, TaskStream
from metalearn.unroll import task_keys
from tests.helpers.checkpoints import bits
from tests.helpers.few_shot_data import differences, trainer

KEY = jax.random.key(0)


def episode(number, support=3, query=3):
    """An episode of three classes whose inputs tell its number."""

    def part(n):
        return np.full((n, 16), number, np.float32), np.arange(n) % 3

    return Episode(part(support), part(query))


EPISODES = [episode(number) for number in range(5)]


def visited(tasks, first, count):
    """The numbers of the episodes that a trainer reads."""
    keys = jax.random.split(jax.random.fold_in(KEY, first), count)
    inputs = jax.vmap(tasks.fetch(keys, first).sample)(keys).support[0]
    return inputs[:, 0, 0].astype(int).tolist()


def test_a_list_is_visited_once_per_pass_in_its_order():
    tasks = GivenTasks.create(EPISODES)
    assert visited(tasks, 0, 4) == [0, 1, 2, 3] and visited(tasks, 4, 8) == [4, 0, 1, 2, 3, 4, 0, 1]


def test_a_shuffled_list_is_visited_once_per_pass_in_an_order_that_changes():
    tasks = GivenTasks.create(iter(EPISODES), shuffle=1)
    passes = [visited(tasks, 5 * number, 5) for number in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert passes[0][3:] + passes[1][:2] == visited(tasks, 3, 4)


def test_a_key_by_itself_draws_any_of_them():
    tasks = GivenTasks.create(EPISODES)
    keys = jax.random.split(KEY, 200)
    inputs = jax.jit(lambda tasks, keys: jax.vmap(tasks.sample)(keys))(tasks, keys).support[0]
    assert set(inputs[:, 0, 0].astype(int).tolist()) == {0, 1, 2, 3, 4}
    assert tasks.label_range() == (0, 2)


@pytest.mark.parametrize("segment", [None, 1])
def test_query_gradients_are_of_the_task_that_the_key_draws(segment):
    learner, tasks = trainer(engine=MixedFlow(), segment=segment), GivenTasks.create(EPISODES)
    eta, key = learner.init(KEY).eta, jax.random.key(3)
    drawn = tasks.sample(task_keys(key).episode)
    assert drawn.query[0][0, 0] > 0  # not the first
    expected, metrics = dataclasses.replace(learner, segment=None).task_gradient(eta, tasks, key)
    queries = jax.tree.map(lambda x: x[None], drawn.query)
    found, losses = learner.query_gradients(eta, tasks, key, queries)
    np.testing.assert_allclose(losses["loss"][0], metrics["loss"], rtol=1e-5)
    assert differences(jax.tree.map(lambda x: x[0], found), expected) < 1e-5


@pytest.mark.parametrize("segment", [None, 1])
def test_a_perturbed_run_is_of_the_task_that_the_key_draws(segment):
    learner, tasks = trainer(engine=MixedFlow(), segment=segment), GivenTasks.create(EPISODES)
    state, key = learner.init(KEY), jax.random.key(3)
    run = learner.perturbed_runs(state, tasks, key)
    nothing = jax.tree.map(np.zeros_like, state.eta)
    _, metrics = dataclasses.replace(learner, segment=None).task_gradient(state.eta, tasks, key)
    np.testing.assert_allclose(run.run(nothing, 0.1).loss, metrics["loss"], rtol=1e-5)


def test_a_stream_has_no_task_for_a_key():
    learner, stream = trainer(), TaskStream(EPISODES)
    queries = jax.tree.map(lambda x: x[None], EPISODES[0].query)
    with pytest.raises(Exception, match="draws none by a key inside a"):
        jax.block_until_ready(
            learner.query_gradients(learner.init(KEY).eta, stream, jax.random.key(3), queries)
        )


def test_an_evaluation_reads_no_episode_that_it_does_not_need():
    learner = trainer(tasks_per_step=4)
    stream = TaskStream(iter([*EPISODES, *EPISODES]))  # ends after ten
    found = learner.evaluate(learner.init(KEY).eta, stream, KEY, 10)
    listed = learner.evaluate(learner.init(KEY).eta, GivenTasks.create(EPISODES), KEY, 10)
    np.testing.assert_allclose(found["loss"].mean, listed["loss"].mean, rtol=1e-6)
    assert found["loss"].tasks == 10


def test_fetching_for_truncated_training_leaves_tasks_to_the_program():
    learner = trainer(truncation=Truncation(1, staggered=False), inner_steps=3)
    tasks = GivenTasks.create(EPISODES)
    state = learner.init(KEY, tasks)
    for _ in range(3):
        state, metrics = learner.step(state, learner.fetch(tasks, state))
        assert np.isfinite(metrics["loss"]) and metrics["tasks_reset"] == 0


@pytest.mark.slow
def test_a_run_is_resumed_with_the_same_visits(tmp_path):
    tasks = GivenTasks.create(EPISODES, shuffle=0)
    whole = trainer().fit(tasks, 6, key=KEY, progress=False)
    options = {"key": KEY, "progress": False}
    for steps in (2, 6):
        with contextlib.closing(Checkpoints(tmp_path, every=2)) as checkpoints:
            resumed = trainer().fit(tasks, steps, checkpoints=checkpoints, **options)
    assert bits(resumed) == bits(whole)


@pytest.mark.slow
def test_an_evaluation_of_as_many_tasks_as_there_are_visits_each_once():
    learner = trainer(chunk=1)
    state = learner.init(KEY)
    tasks = GivenTasks.create(EPISODES)
    each = [
        learner.evaluate(state.eta, GivenTasks.create([e]), KEY, 1)["loss"].mean for e in EPISODES
    ]
    assert learner.evaluate(state.eta, tasks, KEY, 5)["loss"].mean == pytest.approx(
        np.mean(each), rel=1e-6
    )


def test_unequal_episodes_are_padded_with_a_mask():
    tasks = GivenTasks.create([episode(0), episode(1, 7, 4)], pad=True)
    (inputs, targets), query = jax.tree.map(lambda leaf: leaf[0], tasks.episodes)
    assert inputs.shape == (7, 16) and targets.mask.tolist() == [True] * 3 + [False] * 4
    assert (inputs == 0).all() and targets.values.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert isinstance(query[1], Masked) and query[1].mask.tolist() == [True] * 3 + [False]
    assert tasks.label_range() == (0, 2)


class Loader:
    """A loader of episodes as lists, which can be iterated over again, and counts what it gave."""

    def __init__(self, episodes=EPISODES):
        self.episodes, self.given = episodes, 0

    def __iter__(self):
        for support, query in self.episodes:
            self.given += 1
            yield [list(support), list(query)]


class Seekable:
    """An endless stream that can go anywhere."""

    def __init__(self):
        self.position = 0

    def seek(self, number):
        self.position = number

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return EPISODES[(self.position - 1) % 5]


def test_a_stream_is_read_in_order_and_a_loader_again_from_its_beginning():
    tasks = TaskStream(Loader())
    assert visited(tasks, 0, 3) == [0, 1, 2] and visited(tasks, 3, 4) == [3, 4, 0, 1]
    assert visited(tasks, 3, 4) == [3, 4, 0, 1]  # they are still there


@pytest.mark.slow
def test_training_on_a_stream_is_training_on_its_list():
    learner = trainer()
    options = {"key": KEY, "progress": False}
    etas = [
        learner.fit(tasks, 4, **options).eta
        for tasks in (
            GivenTasks.create(EPISODES),
            TaskStream(Loader()),
            TaskStream(e for e in EPISODES * 2),
            TaskStream(Seekable()),
        )
    ]
    assert max(differences(etas[0], eta) for eta in etas[1:]) < 1e-6
    state = learner.init(KEY)
    stream = TaskStream(iter(EPISODES))
    assert (
        learner.check_health(state, stream).healthy == learner.check_health(state, stream).healthy
    )
    assert learner.fit(stream, 2, state=state, progress=False).step == 2


@pytest.mark.slow
def test_a_stream_that_can_seek_is_resumed(tmp_path):
    for steps in (2, 6):
        with contextlib.closing(Checkpoints(tmp_path, every=2)) as checkpoints:
            options = {"key": KEY, "progress": False, "checkpoints": checkpoints}
            resumed = trainer().fit(TaskStream(Seekable()), steps, **options)
    whole = trainer().fit(TaskStream(Seekable()), 6, key=KEY, progress=False)
    assert bits(resumed) == bits(whole)


def test_a_stream_that_cannot_seek_is_refused_with_checkpoints(tmp_path):
    message = (
        "`Trainer.fit(checkpoints=)` resumes a run from its last checkpoint, but its tasks are a "
        "`TaskStream` that cannot go back to the tasks of a step. Give the stream a `seek`, pass"
    )
    with (
        contextlib.closing(Checkpoints(tmp_path)) as checkpoints,
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        trainer().fit(TaskStream(Loader()), 1, key=KEY, progress=False, checkpoints=checkpoints)


def fit(tasks, steps=9, **options):
    return trainer(**options).fit(tasks, steps, key=KEY, progress=False)


def test_a_stream_cannot_go_back_or_beyond_its_end():
    stream = TaskStream(iter(EPISODES * 20))
    learner = trainer()
    state = learner.init(KEY)
    learner.evaluate(state.eta, stream, KEY, 100)
    with pytest.raises(ValueError, match="stands at task 100, and task 0 is asked for: a stream"):
        learner.evaluate(state.eta, stream, KEY, 100)
    with pytest.raises(ValueError, match="ended after 5 tasks, and more are asked for: outer st"):
        fit(TaskStream(iter(EPISODES)))


def test_truncated_unrolls_do_not_read_a_stream():
    with pytest.raises(Exception, match="has its tasks in one order, and draws none by a key"):
        fit(TaskStream(Loader()), truncation=Truncation(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GivenTasks.create([]), "`GivenTasks` got no episodes. Pass a list of at least"),
        (
            lambda: GivenTasks.create([*EPISODES, episode(5, 4)]),
            r"episode 0 is support\[0\] float32\[3, 16\], .* and episode 5 is support\[0\] "
            r"float32\[4, 16\], .*Pass pad=True for sets of unequal size",
        ),
        (
            lambda: GivenTasks.create([np.ones(3)]),
            "takes episodes, but number 0 is a ndarray. An ep",
        ),
        (lambda: GivenTasks.create([(1, 2, 3)]), "number 0 is a tuple of 3. An episode is"),
        (lambda: GivenTasks.create([(["a"], [1])]), "got episode 0 with <U1 in it, but episodes"),
        (
            lambda: GivenTasks.create([Episode(np.ones(3), np.ones(3))], pad=True),
            r"Episodes are padded whose support and query are pairs .*`metalearn.Masked\(targets",
        ),
        (lambda: TaskStream(3), "reads an iterable of episodes, such as a generator or a loader"),
        (lambda: TaskStream([]), "ended after 0 tasks, and more are asked for"),
        (
            lambda: visited(TaskStream([episode(0), episode(1, 4)]), 0, 2),
            "`TaskStream` got episodes of unequal shapes: episode 0 is .*Pad them, with",
        ),
    ],
)
def test_what_are_no_episodes_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
