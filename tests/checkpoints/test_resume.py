"""A run that is killed and started again ends where one that was never killed does."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments import build
from tests.helpers.checkpoints import bits
from tests.helpers.logs import logged

STEPS, EVERY = 150, 10
COMMAND = (
    *(sys.executable, "-m", "metalearn", "train", "--config=maml_digits"),
    *(f"--config.steps={STEPS}", f"--config.checkpoint_every={EVERY}", "--config.log_every=3"),
    *("--config.eval_every=40", "--config.eval_tasks=4", "--config.test_tasks=8"),
    *("--config.model.filters=2", "--config.model.blocks=1", "--config.tasks_per_step=2"),
    *("--config.dataset.eval_queries=2", "--config.engine=reverse", "--config.wandb.mode=disabled"),
    "--config.health=False",
)


def start(workdir: pathlib.Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *options, f"--workdir={workdir}"],
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
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = re.findall(r'^{"step": (\d+)', text, re.MULTILINE)
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
    splits = build.splits(record["config"]["dataset"])
    trainer = build.trainer(record["config"], splits)
    shapes = jax.eval_shape(trainer.init, jax.random.key(record["config"]["seed"]), splits.train)
    state = checkpoints.restore_state(shapes)
    checkpoints.close()
    return state


def stop(process: subprocess.Popen, workdir: pathlib.Path, number: int) -> str:
    """Ask a run to stop once it has logged something new; return what it says."""
    begun, deadline = last_row(workdir), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and last_row(workdir) == begun:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    return errors


def same_in_the_end(one: pathlib.Path, other: pathlib.Path) -> None:
    """All that two finished runs have left is the same, bit for bit."""
    assert checkpoints_in(one)[-1] == checkpoints_in(other)[-1] == STEPS
    assert bits(final_state(one)) == bits(final_state(other))
    assert logged(one) == logged(other)
    assert (one / "test.json").read_bytes() == (other / "test.json").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((), id="killed"),  # experiments/test_cli.py has a signal in `make test`
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_run_that_is_killed_and_asked_to_stop_resumes_to_the_same_bits(stops, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    kill_beyond_a_checkpoint(process, killed)
    resumed_from = checkpoints_in(killed)[-1]
    assert EVERY <= resumed_from < STEPS
    assert not (killed / "test.json").exists()

    other = start(whole)
    for number in stops:
        said = stop(start(killed), killed, number)
        name, stopped_at = signal.Signals(number).name, checkpoints_in(killed)[-1]
        last = f"{name} after outer step {stopped_at} of {STEPS}. It is saved, and the same command"
        assert said.splitlines()[-1].startswith(last)
        assert resumed_from < stopped_at < STEPS
        resumed_from = stopped_at

    first_step = re.search(rf"(\d+)/{STEPS} ", end(start(killed)))
    end(other)
    assert first_step and int(first_step[1]) == resumed_from
    same_in_the_end(killed, whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(3, STEPS + 1, 3))
    assert [row["step"] for row in rows if "eval/loss" in row] == [40, 80, 120, 150]


# Inner runs that go on from step to step, W&B on disk, a checkpoint at almost every moment.
TRUNCATED = (
    *("--config.algorithm.inner_steps=6", "--config.truncation.steps=2"),
    *("--config.checkpoint_every=3", "--config.wandb.mode=offline"),
)
# Outer steps of three programs, saved between any two.
SEGMENTED = (
    *("--config.engine=forward", "--config.engine_options.directions=2", "--config.segment=2"),
    *("--config.algorithm.inner_steps=6", "--config.checkpoint_within=1"),
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "options", [(), TRUNCATED, SEGMENTED], ids=["whole", "truncated", "in segments"]
)
def test_runs_killed_at_twenty_random_moments_resume_to_the_same_bits(options, tmp_path):
    """At any moment of a run's life: importing, compiling, in a step, in a save, in a log."""
    killed, whole, draw = tmp_path / "killed", tmp_path / "whole", random.Random(0)
    end(start(whole, *options))
    for _ in range(20):
        process = start(killed, *options)
        begun, deadline = last_row(killed), time.monotonic() + 120
        if draw.random() < 0.8:  # the others die before their first step
            while time.monotonic() < deadline and process.poll() is None:
                if last_row(killed) > begun:
                    break
                time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
    end(start(killed, *options))
    same_in_the_end(killed, whole)


SOAK = """
import json, os, pathlib, sys
import jax
from metalearn.experiments.commands import run
from metalearn.experiments.configs import maml_digits
from metalearn.loggers import Logger

compiled, rows = [], []

def note(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        compiled.append(seconds)

jax.monitoring.register_event_duration_secs_listener(note)

class Gauge(Logger):
    def log(self, step, metrics):
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        rss = pages * os.sysconf("SC_PAGESIZE")
        rows.append((step, rss, len(os.listdir("/proc/self/fd")), len(compiled)))

config = maml_digits.get_config()
config.update_from_flattened_dict(json.loads(sys.argv[2]))
loggers = run._loggers
run._loggers = lambda *given: [*loggers(*given), Gauge()]
run.train(config, pathlib.Path(sys.argv[1]), progress=False)
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_thousand_steps_leak_no_memory_and_no_files_and_compile_once(tmp_path):
    config = {"steps": 2000, "checkpoint_every": 50, "log_every": 50, "wandb.mode": "disabled"}
    config |= {"eval_every": 0, "test_tasks": 16}
    command = [sys.executable, "-c", SOAK, str(tmp_path), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    warm, last = rows[len(rows) // 4], rows[-1]
    assert last[0] == 2000 and len(rows) == 40
    assert max(memory for _, memory, _, _ in rows[10:]) <= 1.02 * warm[1]
    assert max(files for _, _, files, _ in rows[10:]) <= warm[2]
    assert last[3] == rows[0][3]  # programs compiled by the first row, and no more
