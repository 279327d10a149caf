"""Outer steps cut into segments with a backward pass: the same gradient within any budget."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import random
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Faults, Forward, MixedFlow, Replay, Reverse, Trainer, Unroll
from metalearn.checkpoints import state_files
from metalearn.checkpoints.manager import ChangedConfigError, Checkpoints, OtherArraysError
from metalearn.loggers import Logger
from metalearn.training import outer_loop
from metalearn.training.faults import NonFiniteError
from metalearn.training.outer_loop import Interrupted
from metalearn.training.replay_schedule import replays
from metalearn.training.segment_run import SegmentRun
from tests import cases
from tests.helpers.checkpoints import bits
from tests.helpers.compilations import compilations
from tests.helpers.selection import quick
from tests.helpers.walks import MIXED, Aims, Walk, trainer_of

KEY, AIMS = jax.random.key(0), Aims()
STEPS, SEGMENT = 13, 2  # the last of seven segments has one step


@functools.cache  # and with a trainer its compiled programs
def trainer(engine=MIXED, segment=SEGMENT, **options):
    return trainer_of(Walk(options.pop("steps", STEPS)), engine, segment, **options)


def with_replay(made, replay, folder=None, tasks=AIMS):
    """The programs of a trainer, with states kept elsewhere."""
    run = made.segments(tasks)
    return SegmentRun(run.segments, run._programs, replay, run._shapes, folder)


def taken(run, state, tasks=AIMS):
    """Take an outer step: (state, metrics, the phases of its programs)."""
    phases, metrics = [], None
    of = run.progress(state).of
    while metrics is None:
        place = run.progress(state)
        assert (place.programs, place.of) == (len(phases), of)
        phases.append(place.phase)
        state, metrics = run.take(state, tasks)
    assert len(phases) == of
    return state, metrics, phases


def assert_close(found, expected, tolerance=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# The same meta-gradient.


@functools.cache
def uncut():
    with jax.enable_x64(True):
        whole = trainer(Reverse(), None)
        return whole.step(whole.init(KEY), Aims())


ENGINES = {
    name: engine
    for name, engine in (cases.ENGINES | {"reconstruct": MixedFlow(store="host")}).items()
    if not name.startswith("Forward")
}


def test_copies_of_shards_count_on_the_devices_and_not_in_host_memory():
    replay = Replay(device=100, host=100, gradients=1000)
    capacity = replay.capacity(10, 8, 20, on_devices=(40, 80))
    assert (capacity.device, capacity.host, capacity.disk) == (2, 4, 0)
    assert (capacity.device_gradients, capacity.host_gradients) == (0, 3)


@pytest.mark.parametrize(
    ("engine", "segment"),
    quick(
        [(name, segment) for name in ENGINES for segment in (1, 2, 6, 13)],
        lambda name, segment: (name, segment) == ("MixedFlow", 2),
    ),
)
def test_an_outer_step_in_segments_is_the_one_in_a_single_program(engine, segment, x64):
    made, (expected, seen) = trainer(ENGINES[engine], segment), uncut()
    state, metrics = made.step(made.init(KEY), Aims())
    assert_close(state.eta, expected.eta)
    assert_close(metrics, seen)
    assert jnp.abs(state.eta["rate"] - made.init(KEY).eta["rate"]).min() > 1e-3


ALGORITHMS = quick(
    [
        (name, engine, segment)
        for name in cases.ALGORITHMS
        # Refused, as their own tests see: they anneal, or take no inner steps.
        if not name.startswith(("MAML++", "MetaNTK", "ProtoNet", "R2D2"))
        for engine, segment in (("Reverse-step", 1), ("Forward", 1), ("MixedFlow", 2))
    ],
    lambda name, engine, segment: (name, engine) == ("Meta-SGD", "MixedFlow"),
)


@pytest.mark.parametrize(("name", "engine", "segment"), ALGORITHMS)
def test_every_algorithm_is_cut_as_it_is(name, engine, segment, x64):
    algorithm, tasks = cases.ALGORITHMS[name].problem("linen")
    whole = Trainer(algorithm, Reverse(), optax.sgd(1.0), tasks_per_step=2)
    cut = dataclasses.replace(whole, engine=cases.ENGINES[engine], segment=segment)
    state = whole.init(KEY)
    expected, seen = whole.step(state, tasks)
    found, metrics = cut.step(state, tasks)
    assert_close(found.eta, expected.eta)
    seen.pop("inner_tangent_norm", None), metrics.pop("inner_tangent_norm", None)
    assert_close(metrics, seen)


GRADIENTS = 2 * SEGMENT * 3 * 8  # bytes of a segment: two tasks, two steps, three float64
BUDGETS = {
    **{f"{count} states": Replay(states=count) for count in (1, 2, 3, 5, 100)},
    "device": Replay(device="1MB", host=0),
    "disk": Replay(host=0, disk="1MB"),
    "all three": Replay(device=150, host=150, disk="1MB"),
    "all gradients": Replay(gradients="1MB"),
    "gradients of 3": Replay(gradients=3 * GRADIENTS),
    "gradients on both": Replay(device=5 * 74 + 2 * GRADIENTS, gradients=5 * GRADIENTS),
    "a state, and gradients of 2": Replay(states=1, gradients=2 * GRADIENTS),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_and_store_gives_the_same_bits(name, x64):
    made, run = trainer(), with_replay(trainer(), BUDGETS[name])
    expected, _ = made.step(made.init(KEY), Aims())
    state, metrics, phases = taken(run, made.init(KEY))
    assert bits(state) == bits(expected)
    states = min(BUDGETS[name].states or 100, 5)
    assert phases.count("replay") == replays(7, states)
    assert phases.count("backward") == 6 and phases.count("forward") == 7
    assert metrics["inner_finite"] == 1


@pytest.mark.parametrize(
    ("name", "again"),
    [("5 states", 6), ("all gradients", 0), ("gradients of 3", 3), ("gradients on both", 1)],
)
def test_segments_whose_gradients_are_not_kept_are_advanced_once_more(name, again, x64):
    made, advanced = trainer(), []

    def advance(*args, **options):
        advanced.append(int(args[6]) // SEGMENT)
        return made._programs.advance(*args, **options)

    run = with_replay(made, BUDGETS[name])
    run._programs = run._programs._replace(advance=advance)
    taken(run, made.init(KEY))
    assert run.planned.recomputed == again
    assert len(advanced) == run.planned.programs - 7 + again
    assert advanced[6:] == list(range(again))[::-1]  # those that are kept are the last ones


def test_inner_gradients_spill_from_the_device_to_the_host(x64):
    run, state = with_replay(trainer(), BUDGETS["gradients on both"]), trainer().init(KEY)
    for _ in range(6):
        state, _ = run.take(state, Aims())
    kept = [(each.segment, each.place) for each in state.inner.kept_gradients]
    assert kept == [(1, "device"), (2, "device"), (3, "host"), (4, "host"), (5, "host")]
    state.inner.kept_gradients[3].arrays = None  # lost
    while state.inner != ():
        state, _ = run.take(state, Aims())
    assert bits(state) == bits(trainer().step(trainer().init(KEY), Aims())[0])


@pytest.mark.slow
def test_inner_gradients_of_tasks_in_chunks_are_handed_out_only_to_be_kept(x64):
    made = dataclasses.replace(trainer(), chunk=1)
    assert made.segments(AIMS).planned.gradient_bytes == 0
    kept = dataclasses.replace(made, replay=Replay(gradients="1MB"))
    assert kept.segments(AIMS).planned.gradient_bytes == GRADIENTS
    (found, _), (expected, _) = (each.step(each.init(KEY), Aims()) for each in (kept, made))
    assert_close(found.eta, expected.eta)


@pytest.mark.parametrize("engine", ["Reverse-step", "MixedFlow-host", "MixedFlow-segments"])
def test_an_engine_that_does_not_save_all_inner_gradients_reads_none(engine):
    made = trainer(ENGINES[engine], replay=Replay(gradients="1MB"))
    plan = made.segments(AIMS).planned
    assert plan.gradient_bytes == plan.recomputed == plan.host_gradients == 0


def test_states_spill_from_the_device_to_the_host_and_the_disk():
    run = with_replay(trainer(), Replay(device=60, host=60, disk="1MB"))  # a state: 50
    state = trainer().init(KEY)
    while len(getattr(state.inner, "kept", ())) < 5:
        state, _ = run.take(state, Aims())
    assert [each.place for each in state.inner.kept] == ["disk"] * 3 + ["host", "device"]
    while state.inner != ():
        state, _ = run.take(state, Aims())
    assert not [path for path in run._opened._folder().path.iterdir() if path.name != "lock"]


def test_two_programs_serve_every_horizon_and_a_third_a_shorter_last_segment():
    for steps, last in ((12, 0), (13, 1)):
        made = trainer(Reverse(), steps=steps)
        for _ in range(2):
            made.step(made.init(KEY), Aims())
        programs = made._programs
        sizes = [programs.advance._cache_size(), programs.pull_back._cache_size()]
        assert sizes == [1, 1] and programs.last._cache_size() == last


def test_the_backward_pass_is_compiled_once_and_beside_the_first_segments():
    made = trainer(MixedFlow(), steps=STEPS + 2)
    with compilations() as programs:
        for _ in range(2):
            made.step(made.init(KEY), Aims())
    threads = [thread for name, thread in programs if name == "pull_back"]
    assert len(threads) == 1 and threads[0].startswith("compile"), programs
    assert [name for name, _ in programs].count("advance") == 1


@pytest.mark.slow
def test_tasks_in_chunks_are_cut_as_all_at_once(x64):
    made = dataclasses.replace(trainer(), chunk=1)
    (state, metrics), (expected, seen) = made.step(made.init(KEY), Aims()), uncut()
    assert_close((state.eta, metrics), (expected.eta, seen))


@dataclasses.dataclass(frozen=True)
class Numbers(Walk):
    """A walk whose first state has a number of Python's, which is no array."""

    def unroll(self, episode, key):
        walk = super().unroll(episode, key)

        def step(eta, state, batch, grad):
            return {**walk.step(eta, state, batch, grad), "rate": state["rate"]}

        return walk._replace(init=lambda eta: {**walk.init(eta), "rate": 0.1}, step=step)


@pytest.mark.slow
def test_a_number_in_the_first_state_is_an_array_of_it():
    made = Trainer(Numbers(3), MIXED, optax.sgd(1.0), tasks_per_step=1, segment=2)
    _, metrics = made.step(made.init(KEY), Aims())
    whole = dataclasses.replace(made, segment=None)
    _, expected = whole.step(whole.init(KEY), Aims())
    assert_close(metrics, expected, 1e-5)


def test_a_segment_may_be_chosen_by_the_horizon():
    run = trainer(segment="auto", steps=10_000).segments(AIMS)
    assert (run.segments.length, run.segments.count) == (100, 100)
    with pytest.raises(ValueError, match=r"`Trainer\(segment=often\)`: it is an integer"):
        trainer(segment="often")


# Saved, stopped and gone on from.


class Asked:
    """Asks a run to stop after so many programs, once."""

    def __init__(self, at):
        self.at = at

    def __call__(self, number):
        return "SIGTERM" if number == self.at else None


def fit(made, steps, directory=None, **options):
    keeps = None
    if directory is not None:
        keeps = Checkpoints(directory, every=1, within=options.pop("within", 0))
    try:
        return made.fit(Aims(), steps, key=KEY, checkpoints=keeps, progress=False, **options)
    finally:
        if keeps is not None:
            keeps.close()


PLACES = {
    2: "inner step 4 of 13 of",
    7: "inner step 12 of 13, replaying of",  # the outer loss is known
    8: "inner step 10 of 13, going backward of",
    11: "inner step 4 of 13, replaying of",
}


@functools.cache
def two_states():
    return dataclasses.replace(trainer(), replay=Replay(states=2))


@functools.cache
def two_states_on_disk():
    return dataclasses.replace(trainer(), replay=Replay(states=2, host=0, disk="1MB"))


@pytest.mark.slow
def test_a_run_goes_on_with_the_states_that_are_on_disk(tmp_path, capfd):
    made = two_states_on_disk()
    with pytest.raises(Interrupted):
        fit(made, 1, tmp_path, asked_to_stop=Asked(6))
    asked = []
    found = fit(made, 1, tmp_path, asked_to_stop=lambda number: asked.append(number))
    assert len(asked) == 10 and "lost" not in capfd.readouterr().out
    assert bits(found) == bits(fit(two_states(), 1))


def test_a_run_that_fails_leaves_the_states_of_its_checkpoints_and_no_others(tmp_path):
    made = two_states_on_disk()

    def fails(number):
        if number == 12:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(made, 1, tmp_path / "not saved", asked_to_stop=fails)
    assert names_in(tmp_path / "not saved" / "states") == ["lock"]
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(made, 1, tmp_path / "saved", asked_to_stop=fails, within=5)
    assert names_in(tmp_path / "saved" / "states") == ["0-1.state", "0-4.state", "lock"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_states_that_a_killed_run_has_left_are_deleted(on_disk, tmp_path):
    (tmp_path / "states").mkdir()
    for name in ("0-3.state", "0-3.state.part"):
        (tmp_path / "states" / name).touch()
    with pytest.raises(Interrupted):
        made = two_states_on_disk() if on_disk else two_states()
        fit(made, 1, tmp_path, asked_to_stop=Asked(6))
    assert names_in(tmp_path / "states") == ["0-1.state", "0-4.state", "lock"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", quick([6, 10], lambda at: at == 6))
@pytest.mark.slow
def test_a_resumed_run_compiles_each_program_once(at, tmp_path):
    made = two_states_on_disk()
    with pytest.raises(Interrupted):
        fit(made, 2, tmp_path, asked_to_stop=Asked(at))
    resumed = dataclasses.replace(made)  # with programs of its own
    fit(resumed, 2, tmp_path)
    compiled = {name: each._cache_size() for name, each in resumed._programs._asdict().items()}
    assert compiled.pop("outer_loss") == 0 and set(compiled.values()) == {1}, compiled


@pytest.mark.parametrize("at", PLACES)
def test_a_run_stopped_in_any_direction_goes_on_with_the_same_bits(at, tmp_path):
    made = two_states()
    with pytest.raises(Interrupted) as caught:
        fit(made, 2, tmp_path, asked_to_stop=Asked(at))
    message = str(caught.value)
    assert PLACES[at] in message and "It is saved, and the same command goes on" in message
    asked = []
    found = fit(made, 2, tmp_path, asked_to_stop=lambda number: asked.append(number))
    assert asked[0] == at + 1
    assert bits(found) == bits(fit(made, 2))
    assert not list((tmp_path / "states").glob("*.state*"))


def in_a_process(directory, *arguments):
    """Run `helpers.killed_replays`: (exit status, what it printed)."""
    command = [sys.executable, "-m", "tests.helpers.killed_replays", directory, *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode, ended.stdout


# Programs of an outer step: 6 go forward, then the outer loss; 8 and from 11 on there are replays.
MOMENTS = {"forward": range(1, 6), "replay": (7, 10, 11), "backward": (8, 9, 12)}


@pytest.mark.parametrize(
    ("phase", "kills"), quick([(p, 20) for p in MOMENTS] + [("replay", 1)], lambda p, n: n == 1)
)
def test_a_run_that_is_killed_in_any_phase_ends_with_the_same_bits(phase, kills, tmp_path):
    made = trainer_of(Walk(), replay=Replay(states=2, host=0, disk="1MB"))
    expected = hashlib.sha256(repr(bits(fit(made, 2))).encode()).hexdigest()
    moments = random.Random(phase)
    for kill in range(kills):
        if kill % 4 == 0:  # up to four kills of one run
            directory = tmp_path / str(kill)
        status, _ = in_a_process(directory, moments.choice(MOMENTS[phase]) + 13 * (kill % 2), kill)
        if status == 0 or kill % 4 == 3 or kill == kills - 1:
            assert expected in in_a_process(directory)[1]


def test_a_run_is_saved_every_so_many_programs_and_keeps_the_files_of_two_saves(tmp_path):
    with pytest.raises(Interrupted):
        fit(two_states(), 1, tmp_path, asked_to_stop=Asked(11), within=3)
    names = sorted(path.name for path in (tmp_path / "states").glob("*"))
    # Saves after 9 and after 11 programs: the state before segment 4 was dropped after the first.
    assert names == ["0-1.state", "0-2.state", "0-4.state", "lock"]
    fit(two_states(), 1, tmp_path, within=1)
    assert [path.name for path in (tmp_path / "states").glob("*")] == ["lock"]


@pytest.mark.slow
def test_a_resumed_run_computes_inner_gradients_again_and_keeps_those_to_come(tmp_path):
    made = dataclasses.replace(trainer(), replay=Replay(gradients="1MB"))
    for at in (4, 9):
        with pytest.raises(Interrupted):
            fit(made, 1, tmp_path / str(at), asked_to_stop=Asked(at))
        found = fit(made, 1, tmp_path / str(at))
        assert bits(found) == bits(fit(trainer(), 1))


def test_a_lost_state_is_computed_again(tmp_path, capfd):
    with pytest.raises(Interrupted):
        fit(two_states(), 1, tmp_path, asked_to_stop=Asked(6))
    (first, second) = sorted((tmp_path / "states").glob("*.state"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = fit(two_states(), 1, tmp_path)
    assert bits(found) == bits(fit(two_states(), 1))
    said = capfd.readouterr().out
    assert "1 of the kept states are lost: their segments are run again." in said
    assert "A kept state is lost (0-4.state is too short): its segments are run again." in said


def test_the_number_of_programs_does_not_fall_where_lost_states_are_computed_again(tmp_path):
    made, asked = two_states(), []
    with pytest.raises(Interrupted):
        fit(made, 2, tmp_path, asked_to_stop=Asked(6))
    for each in (tmp_path / "states").glob("*.state"):
        each.unlink()
    fit(made, 2, tmp_path, asked_to_stop=lambda number: asked.append(number))
    planned = made.segments(Aims()).programs_in_all
    assert asked[0] == 7 and asked == sorted(asked) and asked[-1] == 2 * planned
    assert asked.count(planned - 1) > 1  # more programs ran than were planned


def test_another_segment_does_not_go_on_inside_a_step(tmp_path):
    with pytest.raises(Interrupted):
        fit(two_states(), 1, tmp_path, asked_to_stop=Asked(8))
    with pytest.raises(ValueError, match="step 10 of an outer step that is cut into segments of 2"):
        fit(trainer(segment=6), 1, tmp_path)


@pytest.mark.parametrize("kept", range(4))
def test_a_disk_that_fills_up_costs_replays_and_nothing_else(kept, monkeypatch, capfd, x64):
    run = with_replay(trainer(), Replay(host=0, disk="1MB"))
    real, written = state_files.write, []

    def write(path, arrays):
        written.append(path)
        if len(written) > kept:
            raise OSError(28, "No space left on device")
        return real(path, arrays)

    monkeypatch.setattr(state_files, "write", write)
    state, metrics = trainer().init(KEY), None
    while metrics is None:
        state, metrics = run.take(state, Aims())
    assert bits(state) == bits(trainer().step(trainer().init(KEY), Aims())[0])
    said = capfd.readouterr().out
    assert "could not be written to" in said and "No space left on device" in said
    assert said.count("no further states are kept there") == 1


def test_a_folder_that_is_lost_costs_replays_and_nothing_else(tmp_path, capfd, x64):
    run = with_replay(trainer(), Replay(host=0, disk="1MB", folder=tmp_path / "states"))
    state, metrics = trainer().init(KEY), None
    while metrics is None:
        state, metrics = run.take(state, Aims())
        if metrics is None and state.inner.programs == 3:
            (tmp_path / "states").rename(tmp_path / "gone")  # at once, beside a writer
    run.close()
    assert bits(state) == bits(trainer().step(trainer().init(KEY), Aims())[0])
    assert "([Errno 2] No such file or directory" in capfd.readouterr().out


def test_a_disk_that_is_full_at_a_save_inside_a_step_does_not_end_the_run(
    tmp_path, monkeypatch, capfd
):
    real = pathlib.Path.mkdir

    def mkdir(path, *args, **options):
        if path.name == "states":
            raise OSError(28, "No space left on device")
        real(path, *args, **options)

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    found = fit(two_states(), 1, tmp_path, within=5)
    said = capfd.readouterr().out
    assert "A checkpoint could not be written" in said and "No space left on device" in said
    assert bits(found) == bits(fit(two_states(), 1))


def test_a_folder_that_is_lost_before_a_save_does_not_end_the_run(tmp_path, capfd):
    def asked(number):
        if number == 4:
            (tmp_path / "states").rename(tmp_path / "gone")  # at once, beside a writer

    found = fit(two_states(), 1, tmp_path, within=3, asked_to_stop=asked)
    assert "A checkpoint could not be written" in capfd.readouterr().out
    assert bits(found) == bits(fit(two_states(), 1))


@pytest.mark.parametrize("device", [0, 1])
def test_states_that_a_full_disk_refuses_stay_in_host_memory(device, monkeypatch):
    def write(path, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_files, "write", write)
    run = with_replay(trainer(), Replay(device=50 * device, host=0, disk="1MB"))  # a state: 50
    state, places = trainer().init(KEY), []
    for _ in range(2):  # outer steps
        metrics = None
        while metrics is None:
            state, metrics = run.take(state, Aims())
            places.append([each.place for each in getattr(state.inner, "kept", ())])
    assert max(each.count("device") for each in places) == device
    assert max(each.count("host") for each in places) >= 1
    assert run._opened.disk_refused and run._opened.most == max(map(len, places))


class Rows(Logger):
    """Remembers the rows of metrics."""

    def __init__(self):
        self.rows = []

    def log(self, step, metrics):
        self.rows.append({"step": step, **metrics})


def test_inner_losses_are_logged_along_a_long_run(monkeypatch):
    logger, made = Rows(), trainer()
    fit(made, 1, loggers=[logger], log_every=1)
    assert len(logger.rows) == 1  # a run of a second needs no more
    monkeypatch.setattr(outer_loop, "ROW_SECONDS", 0)
    fit(made, 1, loggers=[logger], log_every=1)
    along, last = logger.rows[1:-1], logger.rows[-1]
    assert [row["run/inner_step"] for row in along] == [2, 4, 6, 8, 10, 12]
    assert {row["step"] for row in along} == {1} and "loss" in last
    assert along[0]["run/inner_loss"] > along[-1]["run/inner_loss"] > 0


def test_a_run_goes_on_with_another_store_than_its_states_were_kept_in(x64):
    for replay in (Replay(states=2), Replay(states=2, host=0, disk="1MB", gradients="1MB")):
        run, (state, metrics) = with_replay(trainer(), replay), (trainer().init(KEY), None)
        while metrics is None:
            state, metrics = run.take(state, Aims())
            if metrics is None and state.inner.programs in (3, 8, 12):
                run.close()  # states on disk are deleted: no checkpoint refers to them
        assert bits(state) == bits(trainer().step(trainer().init(KEY), Aims())[0])


@dataclasses.dataclass(frozen=True)
class Still(Walk):
    """An inner loop whose state has no leaves."""

    def unroll(self, episode, key):
        def loss(eta, state):
            return jnp.sum((eta["start"] - episode.query) ** 2) * eta["rate"].sum(), {}

        return Unroll(lambda eta: (), lambda eta, state, batch, grad: state, loss)


@pytest.mark.parametrize("engine", [MIXED, Reverse(), Forward()])
def test_a_state_without_leaves_is_cut_as_any_other(engine):
    made = trainer_of(Still(5), engine)
    whole = dataclasses.replace(made, segment=None)
    (found, metrics), (expected, seen) = (each.step(each.init(KEY), AIMS) for each in (made, whole))
    assert_close((found.eta, metrics), (expected.eta, seen), 1e-5)


# Bad input.


def test_a_state_inside_a_step_is_stepped_from_once():
    run, state, fewer = with_replay(trainer(), Replay(states=2)), trainer().init(KEY), False
    while not fewer:
        before, (state, _) = state, run.take(state, Aims())
        fewer = len(getattr(before.inner, "kept", ())) > len(state.inner.kept)
    with pytest.raises(ValueError, match="a step was taken from it before: its arrays"):
        run.take(before, Aims())
    with pytest.raises(ValueError, match="or begin the outer step anew, from `dataclasses"):
        run.saved(before)


def test_a_budget_below_one_state_is_refused():
    made = dataclasses.replace(trainer(), replay=Replay(host=10))
    with pytest.raises(ValueError, match=r"one takes 50 B, and the budget is device=0 B, host=10 "):
        made.step(made.init(KEY), Aims())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": 0}, r"`Replay\(states=0\)`: it is an integer, 1 or more"),
        ({"host": -1}, r'`Replay\(host=-1\)`: it is an amount of memory, such as "4GiB"'),
        ({"disk": "a lot"}, "'a lot' is no amount of memory"),
        ({"gradients": -1}, r"`Replay\(gradients=-1\)`: it is an amount of memory"),
        ({"device": 1.5}, r"`Replay\(device=1.5\)`: it is an amount of memory"),
    ],
)
def test_amounts_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Replay(**options)


@pytest.mark.slow
def test_a_run_resumed_inside_a_step_backs_off(tmp_path):
    def explodes(grads, state, eta=None):
        return jax.tree.map(lambda x: jnp.full_like(x, 1e38), grads), state

    optimizer = optax.GradientTransformation(lambda eta: (), explodes)
    made = dataclasses.replace(two_states(), optimizer=optimizer)
    with pytest.raises(Interrupted):
        fit(made, 2, tmp_path, asked_to_stop=Asked(6))
    with pytest.raises(NonFiniteError, match="after 2 times of backing off"):
        fit(made, 2, tmp_path, faults=Faults(nonfinite="back_off", most=2))


def test_forward_mode_keeps_no_states():
    with pytest.raises(ValueError, match="for a backward pass, and `Forward` has none. Leave"):
        trainer(Forward(), replay=Replay(states=3))


def test_a_step_in_segments_inside_a_program_is_refused():
    made = trainer()
    with pytest.raises(TypeError, match=r"can be no part of a program of yours \(`jit`, `vmap`"):
        jax.eval_shape(made.step, made.init(KEY), AIMS)


def test_a_replay_without_segments_is_refused():
    with pytest.raises(ValueError, match="but an outer step is one program. Set `segment` too"):
        trainer(segment=None, replay=Replay(states=3))


def kept_in(folder):
    """Open a store on disk in a folder."""
    return with_replay(trainer(), Replay(host=0, disk="1MB", folder=folder))._states(
        trainer().init(KEY)
    )


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which cannot be written to"):
        kept_in(tmp_path / "file" / "states")


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        kept_in(tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "lock").write_text("run 1234")
    (tmp_path / "0-1.state").touch()
    with pytest.raises(ValueError, match="holds the states of another run. Delete them if"):
        kept_in(tmp_path)


def test_a_folder_of_another_run_of_the_same_seed_is_refused(tmp_path):
    def opened(name):
        replay = Replay(host=0, disk=100, folder=tmp_path / "shared")
        run = with_replay(trainer(), replay, tmp_path / name)
        return run._states(trainer().init(KEY))

    opened("a").close()
    (tmp_path / "shared" / "0-1.state").touch()
    with pytest.raises(ValueError, match="holds the states of another run. Delete them if"):
        opened("b")
    opened("a").close()
    assert names_in(tmp_path / "shared") == ["0-1.state", "lock"]


def test_a_resume_that_is_refused_lets_the_folder_go_and_leaves_what_is_kept(tmp_path):
    made = trainer_of(Walk(STEPS), replay=Replay(disk="1MB", host=0))
    at = made.segments(AIMS).programs_in_all + 9  # inside the second step

    def run(made, stop=None, seed=0):
        with contextlib.closing(Checkpoints(tmp_path, {"seed": seed}, every=1)) as keeps:
            asked = {"asked_to_stop": lambda number: "SIGTERM" if number == stop else None}
            made.fit(AIMS, 2, key=KEY, progress=False, checkpoints=keeps, **asked)

    def kept():
        return sorted(path.name for path in (tmp_path / "states").rglob("*.state"))

    with pytest.raises(Interrupted):
        run(made, at)
    before = kept()
    assert before
    other = dataclasses.replace(made, optimizer=optax.adam(1.0))
    with pytest.raises(OtherArraysError):
        run(other)
    assert kept() == before
    run(dataclasses.replace(made))  # to its end: nothing is kept any more
    with pytest.raises(ChangedConfigError):
        run(other, seed=1)
    run(dataclasses.replace(made))


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tmp_path):
    store = kept_in(tmp_path)
    with pytest.raises(ValueError, match="Another process keeps the states of its inner run in"):
        kept_in(tmp_path)
    store.close()
    kept_in(tmp_path)
