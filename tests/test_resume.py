"""A run that is killed and started again ends where one that was never killed does."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from metalearn.checkpoint import Checkpoints
from metalearn.experiments import build
from tests.test_checkpoint import bits

STEPS, EVERY = 150, 10
COMMAND = (
    *(sys.executable, "-m", "metalearn", "train", "--config=maml_digits"),
    *(f"--config.steps={STEPS}", f"--config.checkpoint_every={EVERY}", "--config.log_every=3"),
    *("--config.eval_every=40", "--config.eval_tasks=4", "--config.test_tasks=8"),
    *("--config.model.filters=2", "--config.model.blocks=1", "--config.tasks_per_step=2"),
    *("--config.dataset.eval_queries=2", "--config.engine=reverse", "--config.wandb.mode=disabled"),
)


def start(workdir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def end(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return errors


def checkpoints_in(workdir: pathlib.Path) -> list[int]:
    """The checkpoints that are whole: one that is being written has another name."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def last_row(workdir: pathlib.Path) -> int:
    rows = re.findall(r'^{"step": (\d+)', (workdir / "metrics.jsonl").read_text(), re.MULTILINE)
    return max(map(int, rows), default=0)


def kill_beyond_a_checkpoint(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Wait for a checkpoint and for rows after it, which resuming must take back."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        kept = checkpoints_in(workdir)
        if kept and last_row(workdir) > kept[-1] + 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def final_state(workdir: pathlib.Path):
    checkpoints = Checkpoints(workdir / "checkpoints")
    record = checkpoints.record()
    trainer = build.trainer(record["config"], build.splits(record["config"]["dataset"]))
    shapes = jax.eval_shape(trainer.init, jax.random.key(record["config"]["seed"]))
    state = checkpoints.restore_state(shapes)
    checkpoints.close()
    return state


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_in_mid_training_resumes_to_the_same_bits(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    kill_beyond_a_checkpoint(process, killed)
    resumed_from = checkpoints_in(killed)[-1]
    assert EVERY <= resumed_from < STEPS
    assert not (killed / "test.json").exists()

    again, other = start(killed), start(whole)
    first_step = re.search(rf"(\d+)/{STEPS} ", end(again))
    end(other)
    assert first_step and int(first_step[1]) == resumed_from

    assert checkpoints_in(killed)[-1] == checkpoints_in(whole)[-1] == STEPS
    assert bits(final_state(killed)) == bits(final_state(whole))
    for name in ("metrics.jsonl", "test.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [row["step"] for row in rows if "loss" in row]
    assert logged == list(range(3, STEPS + 1, 3))
    assert [row["step"] for row in rows if "eval/loss" in row] == [40, 80, 120, 150]
