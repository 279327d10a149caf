"""Training runs on data of the host: the bits of the device, by key and step, in any order."""

import contextlib
import dataclasses
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Forward, Layout, MixedFlow, Replay, Reverse, Trainer, Truncation, make_mesh
from metalearn.algorithms import (
    FDS,
    MAML,
    Hyperparameter,
    LearnedOptimizer,
    Quadratic,
    Supervised,
    TunedRule,
    read_rows,
)
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import HeldOut, HostHeldOut, HostTrainingRuns, TrainingRuns
from metalearn.tasks import Reads, draw_episode, draw_task, fetched
from metalearn.training import evaluation
from tests.helpers.checkpoints import bits
from tests.helpers.few_shot_data import Pairs, Records, differences, images, linear
from tests.helpers.processes import program
from tests.helpers.selection import quick

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
PIXELS, LABELS = images()
T, BATCH = 12, 8  # six steps and a quarter are an epoch of the 50 training examples
RATE = Hyperparameter(0.01, 1.0, 0.1)


def fds(inner_steps=T, **options):
    return FDS(linear(outputs=10), {"learning_rate": RATE}, inner_steps, BATCH, **options)


def learned(problem=None):
    problem = problem or Supervised(linear(outputs=10), batch=BATCH)
    return LearnedOptimizer(problem, TunedRule(optax.sgd, {"learning_rate": RATE}), T)


def trainer(algorithm=None, **options):
    options = {"engine": Reverse(), "tasks_per_step": 2, **options}
    return Trainer(algorithm or fds(), **options)


def on_device(**options):
    return TrainingRuns.create(PIXELS, LABELS, validation=10, **options)


def on_host(source=PIXELS, targets=LABELS, **options):
    return HostTrainingRuns.create(source, targets, validation=10, **options)


TEST = PIXELS[:7] ^ 1, LABELS[:7]


def final_runs():
    host = HostHeldOut.create(PIXELS, LABELS, test_source=TEST[0], test_targets=TEST[1])
    return HeldOut.create(PIXELS, LABELS, *TEST), host


def data_of(algorithm, tasks, key, steps):
    """What the inner steps and the outer loss of a task read."""
    episode, task = draw_episode(tasks, key), draw_task(algorithm, tasks, key)
    number_or_rows, rows = task.batches_at(steps)
    rows = rows if isinstance(algorithm, FDS) else number_or_rows
    return read_rows(episode.support, rows), read_rows(episode.query, episode.query[2])


def mapped(path):
    file = np.memmap(path, np.uint8, "w+", shape=PIXELS.shape)
    file[:] = PIXELS
    file.flush()
    return np.memmap(path, np.uint8, "r", shape=PIXELS.shape)


SOURCES = {
    "array": lambda path: on_host(),
    "memmap": lambda path: on_host(mapped(path)),
    "pairs": lambda path: on_host(Pairs(PIXELS, LABELS), None),
    "threads": lambda path: on_host(Pairs(PIXELS, LABELS), None, threads=3),
    "records": lambda path: on_host(Records(PIXELS, LABELS), None, inputs="image"),
    "parts": lambda path: on_host(
        Records(PIXELS, LABELS), None, inputs=lambda item: item["image"], target="label"
    ),
    "beside": lambda path: on_host(Records(PIXELS, 0 * LABELS), LABELS, inputs="image"),
    "list": lambda path: on_host([*zip(PIXELS, LABELS, strict=True)], None),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_step_reads_the_bits_of_the_device_from_any_source(source, tmp_path):
    algorithm, steps = fds(), jnp.arange(T)
    host = fetched(SOURCES[source](tmp_path / "data"), KEYS, 0, algorithm)
    for key in KEYS[:2]:
        expected = bits(data_of(algorithm, on_device(), key, steps))
        assert bits(data_of(algorithm, host, key, steps)) == expected


@pytest.mark.parametrize(
    ("algorithm", "runs"),
    quick([(fds(), "splits"), (learned(), "final")], lambda algorithm, runs: runs == "final"),
    ids=["splits", "final"],
)
def test_segments_read_the_bits_of_the_device_in_any_order_and_again(algorithm, runs):
    device, host = (on_device(), on_host()) if runs == "splits" else final_runs()
    for start, count in ((8, 4), (0, 4), (8, 4), (11, 1)):
        small = fetched(host, KEYS, 0, algorithm, Reads(start, count))
        steps = start + jnp.arange(count)
        for key in KEYS[1:]:
            expected = bits(data_of(algorithm, device, key, steps))
            assert bits(data_of(algorithm, small, key, steps)) == expected


def test_truncated_runs_read_from_a_step_of_their_own_each():
    algorithm, starts = fds(), np.array([8, 0, 4])
    small = fetched(on_host(), KEYS, 0, algorithm, Reads(starts, 4))
    for key, start in zip(KEYS, starts, strict=True):
        steps = int(start) + jnp.arange(4)
        expected = bits(data_of(algorithm, on_device(), key, steps))
        assert bits(data_of(algorithm, small, key, steps)) == expected


def test_a_program_of_the_outer_loss_alone_reads_the_query_and_knows_the_horizon():
    small = fetched(on_host(), KEYS, 0, fds(), Reads(T, 0))
    assert small.data[0].shape == (30, 4, 4, 1)  # three queries
    assert draw_task(fds(), small, KEYS[1]).batches()[1].shape == (T, BATCH)
    _, query = data_of(fds(), small, KEYS[1], jnp.arange(1))
    assert bits(query) == bits(data_of(fds(), on_device(), KEYS[1], jnp.arange(1))[1])
    neither = fetched(on_host(), KEYS, 0, fds(), Reads(0, 0, query=False))
    assert neither.data[0].shape == (1, 4, 4, 1)


def test_only_the_rows_of_a_segment_are_read_each_once():
    source = Pairs(PIXELS, LABELS)
    tasks = on_host(source, None)
    source.reads.clear()
    small = fetched(tasks, KEYS[:1], 0, fds(), Reads(6, 3, query=False))
    rows = draw_task(fds(), on_device(), KEYS[0]).batches_at(6 + jnp.arange(3))[1]
    assert source.reads == np.unique(rows).tolist()
    assert small.data[0].shape == (3 * BATCH, 4, 4, 1) and small.query.shape == (1, 0)


@pytest.mark.slow
def test_segments_of_one_length_share_a_program():
    traced = []

    @jax.jit
    def program(tasks, start):
        traced.append(start)
        return data_of(fds(), tasks, KEYS[0], start + jnp.arange(3))[0]

    for start in (0, 3, 6, 9):
        small = fetched(on_host(), KEYS, 0, fds(), Reads(start, 3))
        jax.block_until_ready(program(small, start))
    assert len(traced) == 1


def test_what_was_not_read_is_no_data():
    small = fetched(on_host(np.float32(PIXELS)), KEYS, 0, fds(), Reads(3, 2))
    support, _ = data_of(fds(), small, KEYS[0], jnp.array([2, 3, 4, 5]))
    inputs, targets = map(np.asarray, support)
    assert np.isnan(inputs[[0, 3]]).all() and np.isfinite(inputs[1:3]).all()
    assert (targets[[0, 3]] == 2**31 - 1).all()
    (_, targets), (query, _) = data_of(fds(), small, jax.random.key(9), jnp.array([3, 4]))
    assert (targets == 2**31 - 1).all() and np.isnan(query).all()


@pytest.mark.slow
def test_types_are_those_of_the_device():
    with jax.enable_x64(True):
        inputs, targets = np.linspace(-1, 1, 180).reshape(60, 3), np.linspace(0, 1, 60)
        device = TrainingRuns.create(inputs, targets, validation=10)
        host = HostTrainingRuns.create(inputs, targets, validation=10)
        small = fetched(host, KEYS, 0, fds())
        for tasks in (small, host):
            ours = data_of(fds(), tasks, KEYS[0], jnp.arange(2))
            assert bits(ours) == bits(data_of(fds(), device, KEYS[0], jnp.arange(2)))


def test_noisy_training_targets_are_for_the_inner_loop_alone():
    told = (LABELS + 1) % 10
    small = fetched(on_host(training_targets=told), KEYS, 0, fds())
    ours = data_of(fds(), small, KEYS[0], jnp.arange(T))
    device = on_device(training_targets=told)
    assert bits(ours) == bits(data_of(fds(), device, KEYS[0], jnp.arange(T)))


KINDS = {
    "full": {},
    "chunk": {"chunk": 1},
    "truncated": {"truncation": Truncation(4)},
    "segmented": {"segment": 5, "engine": Forward()},
    "replayed": {"segment": 2, "engine": Reverse(), "replay": Replay(states=1)},
    "replayed, the last segment shorter": {"segment": 5, "engine": MixedFlow()},
    "mesh": {"layout": Layout(make_mesh())},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [*((kind, fds) for kind in KINDS), ("truncated", learned)],
)
def test_every_kind_of_outer_step_trains_as_on_the_device(kind, algorithm):
    device, host = final_runs()
    etas = []
    for tasks, held_out in ((on_device(), device), (on_host(), host)):
        options = {"key": KEY, "progress": False, "eval_every": 2, "eval_tasks": 2}
        learner = trainer(algorithm(), **KINDS[kind])
        etas.append(learner.fit(tasks, 4, held_out=held_out, **options).eta)
    assert differences(*etas) < 1e-6 < differences(etas[0], algorithm().init(KEY))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step_is_fetched_or_calls_back(kind):
    learner, tasks = trainer(**KINDS[kind]), on_host()
    state = learner.init(KEY, tasks)
    expected, _ = learner.step(state, on_device())
    ours, _ = learner.step(state, learner.fetch(tasks, state))
    assert differences(ours.eta, expected.eta) < 1e-6
    if kind == "full":
        called_back, _ = learner.step(state, tasks)
        assert differences(called_back.eta, expected.eta) < 1e-6
        assert learner.check_health(state, tasks).healthy
        learner.check_memory(tasks)


@pytest.mark.slow
def test_an_evaluation_in_segments_gives_the_numbers_of_one_program(monkeypatch):
    learner = trainer(tasks_per_step=3)
    eta = learner.algorithm.init(KEY)
    device, host = final_runs()
    whole = learner.evaluate(eta, host, KEY, 4)["loss"].mean
    monkeypatch.setattr(evaluation, "SEGMENT", 3 * 5 * BATCH * (16 + 8 + 8))
    segments = evaluation.segments_of(learner.algorithm, host, 3)
    assert [(s.start, s.steps, s.query) for s in segments] == [
        *((0, 4, False), (4, 4, False), (8, 4, True))
    ]
    parts = learner.evaluate(eta, host, KEY, 4)["loss"].mean
    assert parts == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(learner.evaluate(eta, device, KEY, 4)["loss"].mean, rel=1e-6)


@pytest.mark.slow
def test_a_run_that_stops_between_segments_resumes_to_the_same_bits(tmp_path):
    states = []
    for name, stops in (("stopped", True), ("whole", False)):
        learner = trainer(segment=5, engine=Forward())
        with contextlib.closing(Checkpoints(tmp_path / name, every=9)) as checkpoints:
            options = {"key": KEY, "progress": False, "checkpoints": checkpoints}
            if stops:
                stop = {"asked_to_stop": lambda parts: "Stopped" if parts == 5 else None}
                with pytest.raises(Exception, match="after inner step 10 of 12 of outer step 2"):
                    learner.fit(on_host(), 3, **options, **stop)
            states.append(learner.fit(on_host(), 3, **options))
    assert bits(states[0]) == bits(states[1])


class Changing(Pairs):
    """A source with another image in every row once it has been read a number of times."""

    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return (image ^ np.uint8(len(self.reads) > 150)), label


def test_a_source_that_changes_is_refused_where_a_run_is_read_again():
    tasks = on_host(Changing(PIXELS, LABELS), None)
    fetched(tasks, KEYS, 0, fds(), Reads(0, 4))
    fetched(tasks, KEYS, 0, fds(), Reads(0, 4))
    with pytest.raises(
        ValueError,
        match=r"Row \d+ of the source `Changing` has other data than when it was read before.*"
        "silently wrong",
    ):
        for _ in range(4):
            fetched(tasks, KEYS, 0, fds(), Reads(0, 4))


def test_an_error_of_the_source_ends_the_run_and_the_thread():
    class Breaking(Pairs):
        def __getitem__(self, row):
            if len(self.reads) > 150:
                raise OSError("the disk is gone")
            return super().__getitem__(row)

    with pytest.raises(OSError, match="the disk is gone"):
        trainer().fit(on_host(Breaking(PIXELS, LABELS), None), 9, key=KEY, progress=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            MAML(linear(outputs=10)),
            "of which MAML would read rows, but it does not say which: `MAML.rows_at.*"
            "FDS and LearnedOptimizer define it",
        ),
        (learned(Quadratic(3)), "`Quadratic` reads none: the problem for them is `Supervised`"),
    ],
)
def test_an_algorithm_that_reads_no_rows_is_refused(algorithm, message):
    with pytest.raises(TypeError, match=message):
        fetched(on_host(), KEYS, 0, algorithm)


def test_rows_read_for_another_batch_are_refused():
    small = fetched(on_host(), KEYS, 0, fds())
    other = dataclasses.replace(fds(), batch=4)
    with pytest.raises(ValueError, match="inner steps of 8 examples, and the algorithm takes 4"):
        draw_task(other, small, KEYS[0]).batches()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: on_host(iter([])), "`HostTrainingRuns` reads its examples by row"),
        (lambda: on_host(PIXELS, None), "got arrays and no targets. Pass `targets`"),
        (lambda: on_host(PIXELS, LABELS[:5]), "got 60 inputs and 5 targets"),
        (lambda: on_host(training_targets=LABELS[:5]), "60 inputs and 5 training targets"),
        (lambda: on_host(PIXELS.reshape(60, 16)), "uint8 inputs, an example of which has"),
        (
            lambda: HostTrainingRuns.create(PIXELS, LABELS, validation=60),
            "`HostTrainingRuns` got validation=60 of 60 examples",
        ),
        (
            lambda: on_host({"a": PIXELS, "b": PIXELS}, LABELS),
            r"inputs of several arrays, \[a\] uint8\[..., 4, 4, 1\], .* a training run reads one",
        ),
        (
            lambda: on_host(Records(PIXELS, LABELS), None, inputs="image", target="class"),
            "of which target='class' is no part",
        ),
        (
            lambda: on_host(Records(PIXELS, LABELS), None, inputs="image", target="id"),
            "has a target of <U5.*, but targets are numbers. Say where they are with `target=`",
        ),
        (
            lambda: HostHeldOut.create(
                PIXELS, LABELS, test_source=PIXELS[:, :1], test_targets=LABELS
            ),
            r"training inputs of uint8\[..., 4, 4, 1\] and test inputs of uint8\[..., 1, 4, 1\]",
        ),
        (lambda: on_host().fetch(KEYS, 0), "depends on the algorithm and its inner steps"),
    ],
)
def test_a_source_that_makes_no_runs_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_range_of_labels_is_known_of_arrays():
    assert on_host().label_range() == (0, 9)
    assert on_host(Pairs(PIXELS, LABELS), None).label_range() is None
    assert final_runs()[1].label_range() == (0, 9)


LARGE = """
import sys
import jax, numpy as np
from metalearn import Forward, Trainer
from metalearn.algorithms import FDS, Hyperparameter
from metalearn.datasets import HostHeldOut, HostTrainingRuns
from tests.helpers.anonymous_memory import printed_peak
from tests.helpers.few_shot_data import linear

with printed_peak():
    rows = 2 * 10**9 // 3072
    file = np.memmap(sys.argv[1], np.uint8, "r", shape=(rows, 32, 32, 3))
    labels = np.arange(rows, dtype=np.int32) % 10
    runs = HostTrainingRuns.create(file, labels, validation=1000)
    final = HostHeldOut.create(file, labels, test_source=file[:1000], test_targets=labels[:1000])
    rate = Hyperparameter(1e-3, 1.0, 0.01)
    algorithm = FDS(linear(outputs=10, width=3072), {"learning_rate": rate}, 4000, 64)
    learner = Trainer(algorithm, Forward(), tasks_per_step=1, segment=200)
    state = learner.fit(runs, 1, key=jax.random.key(0), progress=False)
    learner.evaluate(state.eta, final, jax.random.key(1), 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in /proc")
def test_runs_on_a_file_of_2_gb_take_less_than_1_gb_of_anonymous_memory(tmp_path):
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", 2 * 10**9)  # sparse
    process = program(LARGE, str(tmp_path / "data"), timeout=1200)
    assert process.returncode == 0, process.stderr
    assert 10**8 < int(process.stdout) < 10**9
