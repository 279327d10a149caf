"""A disk that is full takes nothing from a run but what it could not hold."""

import contextlib
import errno
import os
import pathlib
import re
import shutil

import orbax.checkpoint as ocp
import pytest

from metalearn._utils import disk
from metalearn._utils.intervals import Estimate
from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments.commands import run
from metalearn.loggers import ConsoleLogger, JsonlLogger, Logger, WandbLogger
from tests.helpers.checkpoints import restored, state_at
from tests.helpers.clock import clock, fit
from tests.helpers.command_line import SINUSOID, call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
needs_full = pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="has no /dev/full")


def full(*_, **__):
    raise FULL


def wrapped(error):
    """An error that another library made of one."""
    try:
        try:
            raise error
        except OSError as cause:
            raise RuntimeError("the save failed") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "is_of_disk"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "x"), True),
        (wrapped(FULL), True),
        (ExceptionGroup("saves", [ValueError("x"), wrapped(FULL)]), True),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), True),
        (OSError(errno.ENOENT, "x"), False),
        (ValueError("a bug"), False),
        (wrapped(FileNotFoundError("x")), False),
    ],
)
def test_errors_of_a_disk_are_told_from_others(error, is_of_disk):
    assert disk.at_fault(error) is is_of_disk


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "test.json"
    disk.write(path, "old")
    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["test.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "sinusoid"
    assert call(*SINUSOID, "--noprogress", f"--workdir={workdir}") == 0
    return workdir


class Leaky(Logger):
    """Has much left to write when the run ends."""

    def log(self, step, metrics):
        pass

    def finish(self, table=None):
        raise wrapped(FULL)


@pytest.mark.slow
@needs_full
def test_a_full_disk_at_the_very_end_costs_no_result(finished, tmp_path, monkeypatch, capsys):
    """Of its score, of a logger, of the wait for the last checkpoint; all of them at once."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "test.json").unlink()
    real, close = run._loggers, Checkpoints.close

    def closed(self):
        close(self)
        if self.every:
            raise FULL

    monkeypatch.setattr(run, "_loggers", lambda *given: [Leaky(), *real(*given)])
    monkeypatch.setattr(
        run, "_write", lambda path, found: pathlib.Path("/dev/full").write_text("x")
    )
    monkeypatch.setattr(Checkpoints, "close", closed)
    assert call(*SINUSOID, "--noprogress", f"--workdir={workdir}") == 0
    shown = capsys.readouterr()
    assert re.search(r"^test +loss .*\(95% interval, 4 tasks\)$", shown.out, re.MULTILINE)
    said = [line for line in shown.out.splitlines() if "could not be written" in line]
    assert [line.partition(" could")[0] for line in said] == [
        f"The last checkpoint in {workdir}",
        f"{workdir / 'test.json'}",
        "What Leaky had left",
    ]
    assert not (workdir / "test.json").exists() and "metalearn:" not in shown.err

    monkeypatch.undo()  # there is room again: the same command writes what was missing
    assert call(*SINUSOID, "--noprogress", f"--workdir={workdir}") == 0
    assert (workdir / "test.json").read_bytes() == (finished / "test.json").read_bytes()


@pytest.mark.slow
@needs_full
def test_a_score_on_a_full_disk_is_printed(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "test.json").unlink()
    (workdir / "test.json").symlink_to("/dev/full")
    assert call(*SINUSOID, "--noprogress", f"--workdir={workdir}") == 0
    shown = capsys.readouterr().out
    assert f"{workdir / 'test.json'} could not be written ([Errno 28] No space left" in shown
    assert "(95% interval, 4 tasks)" in shown


def test_errors_of_other_kinds_still_end_a_run(capsys):
    with pytest.raises(ValueError, match="a bug"), disk.forgiven("x"):
        raise ValueError("a bug")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["wait_until_finished", "check_for_errors", "save"])
def test_a_save_that_fails_beside_the_training_is_said_and_left_out(
    where, tmp_path, monkeypatch, capsys
):
    """As Orbax reports what went wrong in its threads."""
    with contextlib.closing(Checkpoints(tmp_path / "run")) as checkpoints:
        checkpoints.save(state_at(1), 1, {})
        checkpoints.wait()
        with monkeypatch.context() as broken:

            def fails(*_, **__):
                raise wrapped(FULL)

            broken.setattr(ocp.CheckpointManager, where, fails)
            checkpoints.save(state_at(2), 2, {})
            checkpoints.wait()
        assert "could not be written" in capsys.readouterr().out
        checkpoints.save(state_at(3), 3, {})
    assert restored(tmp_path / "run") == 3


@needs_full
def test_metrics_on_a_full_disk_end_no_run_and_are_missed_at_the_end(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    rows = JsonlLogger(path)
    state = fit(clock(), 4, rows, ConsoleLogger(), log_every=2)
    rows.finish({"loss": Estimate(1.0, 0.1, 4)})
    assert int(state.step) == 4
    said = capsys.readouterr().out
    assert said.count("its lines wait in memory") == 1
    assert f"{path} lacks its last 2 lines: the disk is full." in said


def test_a_run_goes_on_where_a_full_disk_lets_no_line_be_taken_back(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)]
    path.write_text("".join(lines))
    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "write_bytes", full)
        JsonlLogger(path).start(2, {}, {})  # lines at the end need no room
        assert path.read_text() == "".join(lines[:2])
        path.write_text("garbage\n" + "".join(lines))
        path.with_name("metrics.jsonl.bad").mkdir()
        JsonlLogger(path).start(2, {}, {})
    said = capsys.readouterr().out
    assert "line 1 cannot be read" in said and ": dropped, for metrics.jsonl.bad cannot be" in said
    assert "lines after 2 stay in it" in said
    assert path.read_text() == "garbage\n" + "".join(lines)


def test_a_line_to_a_full_disk_is_not_printed_and_ends_nothing(monkeypatch):
    monkeypatch.setattr("metalearn._utils.disk.tqdm.write", full)
    ConsoleLogger(1).log(1, {"loss": 1.0})
    ConsoleLogger().finish({"loss": Estimate(1.0, 0.1, 4)})


@pytest.mark.slow
def test_where_wandb_finds_a_full_disk_the_run_goes_on_without_it(tmp_path, monkeypatch, capsys):
    logger = WandbLogger(mode="offline", directory=tmp_path / "run")
    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "mkdir", full)
        logger.start(0, {}, {"wandb_id": "before"})
    assert "The files of W&B could not be written" in capsys.readouterr().out
    logger.log(1, {"loss": 1.0})
    logger.finish({"loss": Estimate(1.0, 0.1, 4)})
    assert logger.record() == {"wandb_id": "before"}


@needs_full
def test_what_is_exported_to_a_full_disk_is_named():
    out, message = (
        pathlib.Path("/dev/full"),
        "^/dev/full could not be written .*No space left.*Make",
    )
    with pytest.raises(OSError, match=message), run.named(out):
        out.write_text("x")
    with pytest.raises(FileNotFoundError), run.named(pathlib.Path("x")):
        pathlib.Path("/nowhere/at/all").read_text()
