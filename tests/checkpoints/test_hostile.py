"""Checkpoints that are not what their names say, that other runs wrote, or that vanish."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from metalearn.checkpoints import digests
from metalearn.checkpoints import store as checkpoint_store
from metalearn.checkpoints.manager import (
    ChangedConfigError,
    Checkpoints,
    DamagedError,
    OtherArraysError,
)
from metalearn.checkpoints.store import Store, UnreadableError
from metalearn.experiments.runs import load_run
from metalearn.train_state import TrainState
from tests.helpers.checkpoints import bits, restored, saved, state_at
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.selection import quick


@pytest.fixture(autouse=True)
def in_time():
    """Fail where a test goes round in circles."""

    def late(*_):
        pytest.fail("It goes round in circles.")  # which `except Exception` does not catch

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60, 1)  # again and again: one may be lost in a `__del__`
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def edit(place, change):
    """Change the record of a checkpoint, which then has no digests."""
    (place / "digests.json").unlink(missing_ok=True)
    path = place / "record" / "metadata"
    new = change(json.loads(path.read_text()))
    path.write_text(new if isinstance(new, str) else json.dumps(new))


def without(*keys):
    return lambda record: {key: value for key, value in record.items() if key not in keys}


def having(**values):
    return lambda record: record | values


KEYS = ("schema", "step", "arrays", "loggers", "config", "versions")
RECORDS = {
    **{f"no {key}": without(key) for key in KEYS},
    "no schema, step or loggers": without("schema", "step", "loggers"),
    **{f"step {value!r}": having(step=value) for value in (10**9, -1, True, "3", 3.0, None, [3])},
    **{f"schema {value!r}": having(schema=value) for value in (0, -3, True, "3", None)},
    **{f"loggers {value!r}": having(loggers=value) for value in ([], None, "x", 1)},
    "config null": having(config=None),
    "arrays a list": having(arrays=["step"]),
    "versions empty": having(versions={}),
    "a list": lambda record: [record],
    "a number": lambda record: 7,
    "null": lambda record: "null",
    "text": lambda record: '"record"',
    "truncated": lambda record: json.dumps(record)[:-40],
    "empty": lambda record: "",
    "deep": lambda record: "[" * 100_000,
    "deep but just so": lambda record: '{"a":' * 900 + "1" + "}" * 900,
    "zeros": lambda record: "\0" * 300,
}
QUICK = ("no step", "step True", "schema 0", "a list", "truncated", "deep")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("three") / "run", best="min eval/loss")


@pytest.mark.parametrize("change", quick(RECORDS, lambda name: name in QUICK))
def test_a_checkpoint_whose_record_is_none_is_passed_over(change, three, tmp_path, capsys):
    directory = shutil.copytree(three, tmp_path / "run")
    edit(directory / "3", RECORDS[change])
    assert restored(directory) == 2
    said = capsys.readouterr().out
    assert said.count(f"The checkpoint of outer step 3 in {directory} is damaged (") == 1
    with contextlib.closing(Checkpoints(directory, best="min eval/loss")) as opened:
        assert opened.best_step() == 2 and opened.latest() == 2


def test_where_every_record_is_of_another_step_that_is_said(three, tmp_path):
    directory = shutil.copytree(three, tmp_path / "run")
    for step in "123":
        edit(directory / step, having(step=10**9))
    why = "1: its record is of outer step 1000000000; 2: its record is of outer step 1000000000"
    with pytest.raises(DamagedError, match=rf"can be read \({why}; 3: .*Restore them from a copy"):
        restored(directory)


def move(directory):
    (directory / "3").rename(directory / "9")


def copy(directory):
    shutil.copytree(directory / "3", directory / "9")


def link(directory):
    (directory / "9").symlink_to(directory / "3")


@pytest.mark.parametrize(("change", "newest"), [(move, 2), (copy, 3), (link, 3)])
def test_a_checkpoint_under_another_number_is_damaged_and_in_nobodys_way(
    change, newest, three, tmp_path, capsys
):
    directory = shutil.copytree(three, tmp_path / "run")
    change(directory)
    with contextlib.closing(Checkpoints(directory, keep=2, best="min eval/loss")) as checkpoints:
        assert checkpoints.best_step() == newest
        state, record = checkpoints.read(state_at(0), best=True)
        assert int(state.step) == record["step"] == newest
        assert bits(checkpoints.restore(state_at(0))[0]) == bits(state_at(newest))
        said = "outer step 9 in .* is damaged .its record is of outer step 3.: "
        assert len(re.findall(said, capsys.readouterr().out)) == 1
        for step in range(newest + 1, 11):
            checkpoints.save(state_at(step), step, {}, {"eval/loss": 1.0})
        checkpoints.wait()
        assert checkpoints.latest() == 10
    assert restored(directory) == 10


@dataclasses.dataclass
class ShapesInside:
    """An outer step that is cut, whose state has the same shapes wherever it stands."""

    shapes: Any

    def restored_shapes(self, record):
        return self.shapes

    def restored(self, state, record):
        return state


def test_a_save_inside_a_step_whose_record_is_none_is_passed_over(tmp_path, capsys):
    inner = {"theta": jnp.ones(2)}
    whole, inside = state_at(1), state_at(1, inner=inner)
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        checkpoints.save(whole, 1, {})
        checkpoints.save_within(inside, 1, 5, {})
        checkpoints.save_within(inside, 1, 7, {})
    changes = {
        "null": lambda record: "null",
        "no inner_step": without("inner_step"),
        "a text": having(inner_step="7"),
        "inner_step 0": having(inner_step=0),
        "step in the future": having(step=10**9),
        "negative": having(step=-1),
    }
    for name, change in changes.items():
        directory = shutil.copytree(tmp_path / "run", tmp_path / name)
        edit(directory / "within" / "2", change)
        with contextlib.closing(Checkpoints(directory)) as checkpoints:
            state, _ = checkpoints.restore(
                state_at(0), ShapesInside(jax.eval_shape(lambda: inside))
            )
            assert bits(state) == bits(inside), name
            assert checkpoints.within_at() == (1, 0, "inner step 5"), name
    assert restored(tmp_path / "run") == 1


@pytest.mark.parametrize("name", ["007", "3.5", "-4", "٣", "4 (copy)", "five", "4.orbax"])
def test_names_that_are_no_numbers_of_steps_are_no_checkpoints(name, three, tmp_path):
    directory = shutil.copytree(three, tmp_path / "run")
    shutil.copytree(directory / "3", directory / name)
    assert restored(directory) == 3
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(state_at(4), 4, {})
    assert restored(directory) == 4 and (directory / name).is_dir()


def a_file(place):
    place.write_text("mine")


def nothing_in_it(place):
    place.mkdir()


def linked_to_nowhere(place):
    place.symlink_to(place.with_name("nowhere"))


@pytest.mark.parametrize("make", [a_file, nothing_in_it, linked_to_nowhere])
@pytest.mark.parametrize("step", quick([4, 5, 10**20], lambda step: step == 5))
def test_what_is_no_checkpoint_but_has_the_name_of_one_is_in_nobodys_way(
    make, step, three, tmp_path
):
    directory = shutil.copytree(three, tmp_path / "run")
    make(directory / str(step))
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        assert int(checkpoints.restore(state_at(0))[0].step) == 3
        for later in (4, 5, 6):
            checkpoints.save(state_at(later), later, {})
    assert restored(directory) == 6


def test_a_checkpoint_that_is_a_link_is_read_and_rotates_away_like_the_others(three, tmp_path):
    directory = shutil.copytree(three, tmp_path / "run")
    (directory / "3").rename(tmp_path / "elsewhere")
    (directory / "3").symlink_to(tmp_path / "elsewhere")
    with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
        assert int(checkpoints.restore(state_at(0))[0].step) == 3
        for later in (4, 5):
            checkpoints.save(state_at(later), later, {})
    assert [p.name for p in directory.iterdir() if p.name.isdigit()] == ["5"]
    assert (tmp_path / "elsewhere" / "record").is_dir()


@pytest.mark.parametrize("text", ["", "\0\0", "[1]", '{"eval/loss": NaN}', '{"eval/loss": "low"}'])
def test_metrics_that_cannot_be_read_are_damage_of_that_checkpoint_alone(
    text, three, tmp_path, capsys
):
    directory = shutil.copytree(three, tmp_path / "run")
    (directory / "3" / "digests.json").unlink()
    (directory / "3" / "metrics" / "metrics").write_text(text)
    (directory / "2" / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": "x"}')
    (directory / "2" / "digests.json").unlink()
    with contextlib.closing(Checkpoints(directory, best="min eval/loss")) as checkpoints:
        assert checkpoints.best_step() == 2
    assert "outer step 3 in" in capsys.readouterr().out
    assert restored(directory) == 2


OTHERS = {
    "adamw": (optax.adamw(0.1), "optimizer/2: '(absent)' -> '(nothing)'"),
    "clipped": (optax.chain(optax.clip(1.0), optax.adam(0.1)), "optimizer/0/count: 'int32[]' -> "),
    "sgd": (optax.sgd(0.1), "optimizer/0/count: 'int32[]' -> '(absent)'"),
}


@pytest.mark.parametrize(("optimizer", "names"), OTHERS.values(), ids=OTHERS)
def test_another_optimizer_is_another_configuration_and_no_damage(
    optimizer, names, three, tmp_path, capsys
):
    directory = shutil.copytree(three, tmp_path / "run")
    other = state_at(0, optimizer)
    message = "(?s)^The checkpoint of outer step 3 in .* it is of another configuration.*\n  "
    for allow in (False, True):
        with contextlib.closing(Checkpoints(directory, allow_change=allow)) as checkpoints:
            with pytest.raises(ChangedConfigError, match=message + re.escape(names)) as refused:
                checkpoints.restore(other)
            assert isinstance(refused.value, OtherArraysError)
            assert "--allow-config-change cannot mend this" in str(refused.value)
            with pytest.raises(OtherArraysError):
                checkpoints.restore_state(other)
            assert checkpoints.latest() == 3
            assert int(checkpoints.restore(state_at(0))[0].step) == 3
    assert "damaged" not in capsys.readouterr().out


def test_other_inner_runs_and_another_model_are_another_configuration(tmp_path):
    """As truncated training carries them: with another inner optimizer, or of more tasks."""
    sgd, adam = optax.sgd(0.1), optax.adam(0.1)
    runs = {"theta": jnp.ones((2, 3)), "optimizer": adam.init(jnp.ones((2, 3)))}
    directory = saved(tmp_path / "run", steps=(1,), inner=runs)
    others = {
        "inner/optimizer/0/count: 'int32[]' -> '(absent)'": runs | {"optimizer": sgd.init(0.0)},
        "inner/theta: 'float32[2, 3]' -> 'float32[4, 3]'": runs | {"theta": jnp.ones((4, 3))},
        "inner/theta: 'float32[2, 3]' -> '(absent)'": (),
    }
    for names, inner in others.items():
        with pytest.raises(ChangedConfigError, match=re.escape(names)):
            restored(directory, state_at(0, inner=inner))
    model = dataclasses.replace(state_at(0, inner=runs), eta={"w": jnp.zeros(4)})
    with pytest.raises(ChangedConfigError, match=r"(?s)eta/b: .*\n  eta/w: 'float32\[3\]' -> "):
        restored(directory, model)


def test_one_checkpoint_of_another_structure_among_others_is_damaged(three, tmp_path, capsys):
    for number, (optimizer, _) in enumerate(OTHERS.values()):
        directory = shutil.copytree(three, tmp_path / f"run {number}")
        shutil.rmtree(directory / "3")
        other = saved(tmp_path / f"other {number}", steps=(3,), optimizer=optimizer)
        shutil.copytree(other / "3", directory / "3")
        assert restored(directory) == 2
        assert "outer step 3 in" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_not_taken_for_another_configuration(three, monkeypatch):
    def torn(*_):
        raise UnreadableError("torn")

    monkeypatch.setattr(Store, "read_state", torn)
    with pytest.raises(DamagedError, match=r"can be read \(1: torn; 2: torn; 3: torn\)"):
        restored(three)


class Rotates:
    """Does what a run beside us does, at the moment when a function is called."""

    def __init__(self, monkeypatch, directory, of, name, times=1):
        self.directory, self.times, self.step = directory, times, 3
        self._real = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *given: self._called(*given))

    def _called(self, *given):
        if self.times:
            self.times -= 1
            self.rotate()
        return self._real(*given)

    def rotate(self):
        saving, self.times = self.times, 0  # not of the run's own reading
        self.step += 1
        with contextlib.closing(Checkpoints(self.directory, keep=1)) as run:
            run.save(state_at(self.step), self.step, {}, {"eval/loss": 1.0})
        for old in self.directory.iterdir():
            if old.name.isdigit() and int(old.name) < self.step:
                shutil.rmtree(old)
        self.times = saving


MOMENTS = [(Store, "read_record"), (Store, "read_state"), (digests, "problem"), (Store, "newest")]


@pytest.mark.parametrize(("of", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
@pytest.mark.parametrize("best", quick([False, True], lambda best: not best))
def test_a_checkpoint_that_rotates_away_while_it_is_read_is_replaced_by_the_newer_one(
    of, name, best, three, tmp_path, monkeypatch, capsys
):
    directory = shutil.copytree(three, tmp_path / "run")
    options = {"best": "min eval/loss"} if best else {}
    with contextlib.closing(Checkpoints(directory, **options)) as opened:
        run = Rotates(monkeypatch, directory, of, name)
        if best:  # judged by a run that keeps a best
            real = run.rotate
            monkeypatch.setattr(run, "rotate", lambda: (real(), judge(directory)))
        state, record = opened.read(state_at(0), best)
        assert run.times == (1 if (best and name == "newest") else 0)
    expected = 3 if run.times else 4
    assert bits(state) == bits(state_at(expected)) and record["step"] == expected
    assert "damaged" not in capsys.readouterr().out


def judge(directory):
    """Write the metric of step 4, as a run with a best would have."""
    (directory / "4" / "metrics").mkdir()
    (directory / "4" / "metrics" / "metrics").write_text('{"eval/loss": 1.0}')


def test_a_checkpoint_that_rotates_away_between_record_and_state_is_restored_from_the_newer_one(
    three, tmp_path, monkeypatch
):
    directory = shutil.copytree(three, tmp_path / "run")
    with contextlib.closing(Checkpoints(directory)) as opened:
        assert opened.record()["step"] == 3
        run = Rotates(monkeypatch, directory, Store, "read_state", times=3)
        assert int(opened.restore_state(state_at(0)).step) == 6
        assert run.times == 0
        assert opened.record()["step"] == 6


def test_a_run_that_always_rotates_first_is_not_waited_for_for_ever(three, tmp_path, monkeypatch):
    directory = shutil.copytree(three, tmp_path / "run")
    monkeypatch.setattr(checkpoint_store, "LISTINGS", 4)
    with contextlib.closing(Checkpoints(directory)) as opened:
        run = Rotates(monkeypatch, directory, Store, "read_state", times=1000)
        with pytest.raises(DamagedError, match="^No checkpoint in .* can be read"):
            opened.read(state_at(0))
        assert 1000 - run.times == 5


@pytest.mark.parametrize(("of", "name"), MOMENTS[:3], ids=[name for _, name in MOMENTS[:3]])
def test_where_all_checkpoints_are_removed_while_they_are_read_the_error_stays(
    of, name, three, tmp_path, monkeypatch
):
    directory = shutil.copytree(three, tmp_path / "run")
    with contextlib.closing(Checkpoints(directory)) as opened:
        real = getattr(of, name)

        def emptied(*given):
            for step in "123":
                shutil.rmtree(directory / step, ignore_errors=True)
            return real(*given)

        monkeypatch.setattr(of, name, emptied)
        with pytest.raises(
            DamagedError, match=r"^No checkpoint in .* can be read \(.*3: it is gone\)"
        ):
            opened.read(state_at(0))


def test_who_only_reads_removes_nothing(tmp_path):
    inside = state_at(1, inner={"theta": jnp.ones(2)})
    with contextlib.closing(Checkpoints(tmp_path / "run")) as run:
        run.save_within(inside, 1, 5, {})
        run.save(state_at(2), 2, {})
        run.wait()
        with contextlib.closing(Checkpoints(tmp_path / "run")) as reader:
            reader.read(state_at(0))
        assert (tmp_path / "run" / "within" / "1").is_dir()
    assert not (tmp_path / "run" / "within" / "1").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "sinusoid"
    assert call(*SINUSOID, "--noprogress", f"--workdir={workdir}") == 0
    return workdir


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_the_command_line_says_of_another_optimizer_that_it_is_another_configuration(
    finished, capsys
):
    words = (*SINUSOID, f"--workdir={finished}", "--noprogress", "--config.optimizer.name=adamw")
    capsys.readouterr()
    assert call(*words) == 2
    said = capsys.readouterr()
    assert "was started with another config" in said.err and "'adam' -> 'adamw'" in said.err
    assert call(*words, "--allow-config-change") == 2
    said = capsys.readouterr()
    assert "it is of another configuration, such as another optimizer" in said.err
    assert "--allow-config-change cannot mend this" in said.err
    assert "damaged" not in said.err + said.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_eval_beside_a_run_reads_the_newest_where_its_checkpoint_rotates_away(
    finished, tmp_path, monkeypatch, capsys
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    directory, real, passed = workdir / "checkpoints", Store.read_state, []

    def beside(self, step, shapes):
        if not passed:
            passed.append(step)
            state = real(self, step, shapes)
            state = TrainState(**state | {"step": state["step"] + 1})
            with contextlib.closing(Checkpoints(directory, keep=1)) as training:
                training.save(state, step + 1, {})
            assert not (directory / str(step)).exists()
        return real(self, step, shapes)

    monkeypatch.setattr(Store, "read_state", beside)
    assert call("eval", f"--workdir={workdir}", "--tasks=4") == 0
    shown = capsys.readouterr()
    assert f"{workdir}, outer step 3, on test tasks:" in shown.out and shown.err == ""
    assert passed == [2] and "damaged" not in shown.out


def test_eval_of_a_run_whose_record_names_no_config_says_so(tmp_path):
    saved(tmp_path / "checkpoints", steps=(1,))
    with pytest.raises(ValueError, match="was not trained by `metalearn train`: its checkpoints"):
        load_run(tmp_path)
