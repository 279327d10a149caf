"""The loop of a sweep: begin trials, follow their evaluations, stop those that are pruned.

A trial is followed by its `metrics.jsonl`, from which its evaluations are read as they are written.
A trial ends in one of four ways:

    done      its run has taken all outer steps; its value is the last evaluation
    pruned    the pruner stopped it: others were better at the same number of evaluations
    diverged  its loss or metric is no longer finite; for the sampler, worse than any other
    failed    its process ended with an error; the sampler does not see it
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
import subprocess
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

from metalearn._utils.checks import first_line
from metalearn.experiments.report.run_logs import log_of
from metalearn.experiments.sweep import processes
from metalearn.experiments.sweep.study import Study, shown
from metalearn.loggers import read_lines
from metalearn.loggers.console import EVALUATION, INTERVAL
from metalearn.training.outer_loop import Interrupted
from metalearn.training.signals import EXIT_STATUS, heard_signals

POLL = 0.2  # seconds between two looks at the trials
HOPELESS = 3  # trials that fail before any other has ended, after which the sweep stops


class UnknownMetricError(ValueError):
    """A trial was evaluated, and its evaluation has no such metric."""


@dataclasses.dataclass
class Job:
    """A trial whose process runs.

    Args:
      trial: Optuna's.
      process: of the run.
      share: of the machine.
      evaluations: how many have been reported.
      pruned: whether it was asked to stop.
      size: bytes of its metrics.jsonl when it was last read.
    """

    trial: Any
    process: subprocess.Popen[bytes]
    share: processes.Share
    evaluations: int
    pruned: bool = False
    size: int = -1


class Loop:
    """Runs the trials of a study, several at a time."""

    def __init__(
        self,
        study: Study,
        trials: int,
        jobs: int,
        say: Callable[[str], None] = print,
        wandb: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        """Make the loop.

        Args:
          study: of the sweep.
          trials: how many in all, those of earlier processes among them.
          jobs: trials that run at a time.
          say: prints a line.
          wandb: that section of the config, whose `group` and `name` the trials keep.
        """
        self.study, self.trials, self.say, self.wandb = study, trials, say, wandb
        self._free = [processes.Share(job, jobs) for job in range(jobs)]
        self._jobs: list[Job] = []

    def run(self) -> None:
        """Run the trials that are left.

        Raises:
          Interrupted: where a signal asked to stop, once all trials are saved.
          UnknownMetricError: where the trials do not log the metric.
          ValueError: where the first trials all fail.
        """
        resumed = self.study.running()
        try:
            with heard_signals() as heard:
                while resumed or self._jobs or len(self.study.trials()) < self.trials:
                    while self._free and (resumed or len(self.study.trials()) < self.trials):
                        self._begin(resumed.pop(0) if resumed else self.study.ask())
                    time.sleep(POLL)
                    for job in [*self._jobs]:
                        self._follow(job)
                    if heard:
                        raise Interrupted(self._stopped())
        finally:
            processes.ended([job.process for job in self._jobs])

    def _stopped(self) -> str:
        running = ", ".join(f"{job.trial.number:03d}" for job in self._jobs) or "none"
        return (
            f"Asked to stop: the trials that run ({running}) save and end now. The same command "
            "resumes the sweep, and them from their checkpoints."
        )

    def _begin(self, trial: Any) -> None:
        """Begin a trial, or go on with one whose process is gone."""
        number = trial.number
        folder, values = self.study.folder(number), trial.params
        verb = "resumes" if (folder / "metrics.jsonl").exists() else "begins"
        text = "  ".join(f"{key}={shown(value)}" for key, value in values.items())
        self.say(f"trial {number:03d}  {verb}  {text}")
        processes.wait_until_free(folder, self.say)
        share = self._free.pop(0)
        words = [
            *("train", *self.study.words(trial), *self._group(number)),
            *(f"--workdir={folder}", "--noprogress", "--notest"),
        ]
        reported = len(self.study.trials()[number].intermediate_values)
        process = processes.start(words, folder, share)
        self._jobs.append(Job(trial, process, share, reported))

    def _group(self, number: int) -> list[str]:
        """Return the options that group the trials in W&B, but for those that the user set."""
        name = self.study.workdir.resolve().name
        options = {"group": name, "name": f"{name}-{number:03d}"}
        given = [word.partition("=")[0] for word in self.study.settings.config]
        return [
            f"--config.wandb.{key}={value}"
            for key, value in options.items()
            if f"--config.wandb.{key}" not in given and not self.wandb.get(key)
        ]

    def _follow(self, job: Job) -> None:
        """Report the new evaluations of a trial, prune it if it is due, and end it if it ended."""
        status = job.process.poll()  # before its file is read: then that is complete
        self._report(job)
        if status is None:
            return
        self._jobs.remove(job)
        self._free.insert(0, job.share)
        assert job.process.stdin is not None
        job.process.stdin.close()
        if status == EXIT_STATUS and not job.pruned:  # somebody else asked it to stop
            self._begin(job.trial)
        else:
            self._end(job, status)

    def _report(self, job: Job) -> None:
        path = self.study.folder(job.trial.number) / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == job.size:
            return
        job.size = size
        rows = evaluations(path)
        metric = self.study.settings.metric
        for number, row in enumerate(rows[job.evaluations :], job.evaluations + 1):
            if metric not in row:
                known = [name for name in row if _is_metric(name)]
                raise UnknownMetricError(
                    f"The runs of this config log no {metric!r}. Their evaluations have: "
                    f"{', '.join(known)}. Take one of those: --metric={known[0]}."
                )
            job.evaluations = number
            job.trial.report(float(row[metric]), number)
            last = number >= self.study.evaluations  # the run has ended, or is about to
            if not last and not job.pruned and job.trial.should_prune():
                job.pruned = True
                processes.stop(job.process)

    def _end(self, job: Job, status: int) -> None:
        """Record how a trial ended, and say it."""
        number, settings = job.trial.number, self.study.settings
        folder = self.study.folder(number)
        rows = evaluations(folder / "metrics.jsonl")
        value = float(rows[-1][settings.metric]) if rows else math.nan
        seconds, steps, loss = _progress(folder)
        steps = max(steps, rows[-1]["step"] if rows else 0)  # log_every=0 logs evaluations alone
        job.trial.set_user_attr("seconds", seconds)
        job.trial.set_user_attr("steps", steps)
        text = f"{settings.metric} {value:.4g}" if rows else f"outer step {steps}"
        if status == 0 and math.isfinite(value):
            self._tell(job, "done", value)
            best = self.study.best()
            text += "  (the best so far)" if best is not None and best.number == number else ""
        elif (rows and not math.isfinite(value)) or not math.isfinite(loss):
            self._tell(job, "diverged")
            text += f", loss {loss:.4g}, at outer step {steps}"
        elif job.pruned and status in (0, EXIT_STATUS):
            self._tell(job, "pruned")
            text += f" at outer step {rows[-1]['step']}"
        else:
            why = _status(status, folder)
            self._tell(job, "failed", why=why)
            text = why.partition("\n")[0]
        self.say(f"trial {number:03d}  {job.trial.user_attrs['ended']}  {text}  {seconds:.0f} s")
        self._check_hope()

    def _tell(self, job: Job, ended: str, value: float | None = None, why: str = "") -> None:
        job.trial.set_user_attr("ended", ended)
        if why:
            job.trial.set_user_attr("why", why)
        state = {"done": "COMPLETE", "failed": "FAIL"}.get(ended, "PRUNED")
        self.study.tell(job.trial, value, state)

    def _check_hope(self) -> None:
        """Raise ValueError where the first trials have all failed."""
        over = [trial for trial in self.study.trials() if trial.state.is_finished()]
        failed = [trial for trial in over if trial.state.name == "FAIL"]
        if failed == over and len(failed) >= min(HOPELESS, self.trials):
            words = shlex.join(["metalearn", "train", *self.study.words(failed[0])])
            raise ValueError(
                f"The first {len(failed)} trials failed, and so would the others. Trial "
                f"{failed[0].number:03d}: {failed[0].user_attrs['why']}\n  {words}\nis what it "
                "ran. Mend it, and begin the sweep in another workdir."
            )


def evaluations(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl that are evaluations, in their order."""
    rows = [line.row for line in read_lines(path) if line.row and line.text.endswith(b"\n")]
    return [row for row in rows if any(map(_is_metric, row))]


def _is_metric(name: str) -> bool:
    return name.startswith(EVALUATION) and not name.endswith(INTERVAL)


def _progress(folder: pathlib.Path) -> tuple[float, int, float]:
    """Return (seconds of training, outer steps, last training loss) that a trial has logged."""
    try:
        log = log_of(folder, {}, {})
    except ValueError:  # nothing
        return 0.0, 0, 0.0
    seconds = log.seconds if math.isfinite(log.seconds) else 0.0
    return seconds, log.steps, float(log.train["loss"].values[-1])


def _status(status: int, folder: pathlib.Path) -> str:
    """Return why a process ended with a status other than 0."""
    if status < 0:
        return f"ended by signal {-status} (9: mostly for lack of memory)"
    try:
        return processes.last_words(folder)
    except OSError as error:
        return f"status {status} ({first_line(error)})"
