"""Trials as processes that share a machine.

Each is `metalearn train` in a workdir and a session of its own: it has its own memory, files and
compiled programs, so that one that fails, or is stopped, touches no other. With several jobs each
has its share of the processor cores, to which it is bound where the system can (Linux), so that the
threads of XLA do not contend; and GPUs are dealt out, memory included where jobs share one.
"""

from __future__ import annotations

import fcntl
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

CONSOLE = "console.txt"  # what a trial prints, in its workdir
MODULE = "metalearn.experiments.sweep.trial"
PATIENCE = 600.0  # seconds that a trial has to finish its outer step and save
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Share:
    """The part of a machine that one of several jobs may use.

    Args:
      job: which one, from 0.
      jobs: how many there are.
    """

    def __init__(self, job: int, jobs: int):
        self.job, self.jobs = job, jobs

    def cores(self) -> list[int]:
        """Return the processor cores of the job; [] for all: one job, or no way to bind it."""
        if self.jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return []
        there = sorted(os.sched_getaffinity(0))
        if self.jobs >= len(there):
            return [there[self.job % len(there)]]
        return there[self.job :: self.jobs]

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """Return the variables of the job's processes.

        Args:
          gpus: of the machine, by index or name.
        """
        if self.jobs == 1:
            return {}
        cores = len(self.cores()) or max(1, (os.cpu_count() or 1) // self.jobs)
        variables = dict.fromkeys(THREADS, str(cores))
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = gpus[self.job % len(gpus)]
            together = math.ceil(self.jobs / len(gpus))
            if together > 1:  # JAX takes three quarters of a GPU unless it is told otherwise
                variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / together:.2f}"
        return variables


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use; none is opened."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(n) for n, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU")]


def start(words: Sequence[str], workdir: pathlib.Path, share: Share) -> subprocess.Popen[bytes]:
    """Start a trial.

    Args:
      words: of the command line behind `metalearn`.
      workdir: of the trial, where its console.txt is.
      share: of the machine.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / CONSOLE).open("ab") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *words],
            stdin=subprocess.PIPE,  # whose end says that the sweep is gone; see `trial`
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **share.environment(gpus())},
            start_new_session=True,  # ctrl-C is for the sweep, which stops its trials
        )
    if cores := share.cores():
        try:
            os.sched_setaffinity(process.pid, cores)  # before it has any threads
        except OSError:  # it has ended already, or may not be bound
            pass
    return process


def wait_until_free(workdir: pathlib.Path, say: Callable[[str], None]) -> None:
    """Wait until no process holds the workdir of a trial: one of a killed sweep may be saving."""
    if not (workdir / "lock").exists():
        return
    deadline, told = time.monotonic() + PATIENCE, False
    with (workdir / "lock").open("a") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say(f"{workdir}: waiting for the process of the sweep before to save and end")
                told = True
                time.sleep(0.1)
                continue
            except OSError:  # a file system without locks
                pass
            return


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a trial to save and end."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def ended(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask trials to save and end, and wait until they have; kill those that take too long."""
    for process in processes:
        stop(process)
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            assert process.stdin is not None
            process.stdin.close()


def last_words(workdir: pathlib.Path) -> str:
    """Return the error that a trial ended with, or the last line that it printed."""
    path = workdir / CONSOLE
    text = path.read_text(errors="replace") if path.is_file() else ""
    _, marked, error = text.rpartition("\nmetalearn: ")
    if marked:
        return error.partition("\n(--traceback")[0].strip()
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
