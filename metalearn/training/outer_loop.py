"""The loop over outer steps, on the host: logging, evaluation, checkpoints, faults, stopping.

The host does not wait for the device: it reads the metrics of a step, and detects faults, while the
next step runs. Where it must wait (it evaluates, saves, checks, or is asked to stop), it reads the
metrics first, so that no checkpoint is saved after a fault. An outer step of several programs
(`Trainer(segment=)`) can be saved and stopped between two of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import MOST_TASKS, at_least, at_most, counts
from metalearn._utils.intervals import Estimate
from metalearn.checkpoints.manager import Checkpoints
from metalearn.diagnostics.health import DIVERGES, Report
from metalearn.loggers import Logger
from metalearn.sharding.distributed import is_first, say
from metalearn.tasks import ALL_STEPS, Read, Reads, Tasks
from metalearn.train_state import TrainState
from metalearn.training.faults import DivergedError, Faults, NonFiniteError, Watch, broken
from metalearn.training.progress import Bars, Clock
from metalearn.training.segment_run import SegmentRun

ROW_SECONDS = 30  # between two rows of metrics inside an outer step that is cut into segments


@dataclasses.dataclass(frozen=True)
class Fit:
    """The settings of one run; see `Trainer.fit`, whose arguments they are."""

    steps: int
    held_out: Tasks | None
    eval_every: int | None
    eval_tasks: int
    log_every: int
    check_every: int | None
    faults: Faults
    asked_to_stop: Callable[[int], str | None] | None
    progress: bool

    def __post_init__(self) -> None:
        never = {"eval_every": self.eval_every, "check_every": self.check_every}
        counts("Trainer.fit", 0, steps=self.steps, log_every=self.log_every)
        at_least("Trainer.fit", 0, **never)
        counts("Trainer.fit", 1, eval_tasks=self.eval_tasks)
        at_most("Trainer.fit", MOST_TASKS, eval_tasks=self.eval_tasks)


class Fetch(NamedTuple):
    """How the tasks of outer steps are read on the host.

    Args:
      ahead: (key of the run, outer step counted from 1, what a program reads) -> its tasks; known
        before the run, so a thread may call it. None: they are known from the state alone.
      now: (state, what a program reads) -> the tasks of its outer step, on all devices.
      place: tasks of `ahead` -> the same on all devices.
      each_program: whether every program of an outer step reads other data.
    """

    ahead: Callable[[jax.Array, int, Reads], Tasks] | None
    now: Callable[[TrainState, Reads], Tasks]
    place: Callable[[Tasks], Tasks]
    each_program: bool


class OuterStep(NamedTuple):
    """The functions of a `Trainer` that the loop calls.

    Args:
      tasks_per_step: tasks of an outer step.
      step: (state, tasks) -> (state, metrics), an outer step that is one program.
      segments: the programs of an outer step that is cut into segments; None: it is one program.
      evaluate: state -> the metrics of held-out tasks.
      check: state -> the health check of the next outer step.
      diagnose: state -> a sentence: what is not finite in the outer step taken from it.
      doubts: metrics of an outer step -> why the engine's meta-gradient may be wrong.
      fetch: reads the tasks of outer steps on the host; None: the tasks are on the device.
    """

    tasks_per_step: int
    step: Callable[[TrainState, Tasks], tuple[TrainState, Any]]
    segments: SegmentRun | None
    evaluate: Callable[[TrainState], dict[str, Estimate]]
    check: Callable[[TrainState], Report]
    diagnose: Callable[[TrainState], str]
    doubts: Callable[[Mapping[str, float]], dict[str, str]]
    fetch: Fetch | None


class Interrupted(Exception):
    """A run was asked to stop; the message says whether its state was saved."""


class _Pending(NamedTuple):
    """An outer step whose metrics have not been read yet.

    Args:
      step: its number.
      metrics: of the step, on the device.
      before: the state before the step, without the states of the outer optimizer and inner loops.
    """

    step: int
    metrics: Any
    before: TrainState


class _BacksOff(Exception):
    """An outer step must be undone, and all later ones."""


class OuterLoop:
    """The outer loop of one run."""

    def __init__(
        self,
        fit: Fit,
        outer: OuterStep,
        reads: Callable[[int, TrainState], Read],
        loggers: Sequence[Logger],
        checkpoints: Checkpoints | None,
        bars: Bars,
    ):
        """Make the loop; `reads`: (outer step from 1, state) -> what reads its tasks."""
        self.fit, self.outer, self.reads, self.bars = fit, outer, reads, bars
        self.loggers, self.checkpoints = loggers, checkpoints
        self._segments = outer.segments
        self._reached: int | None = None  # the inner step of the last program; see `newest_step`
        self._row_at = time.perf_counter()  # when a row was logged last
        self._watch = Watch(fit.faults)
        self._clock = Clock(outer.tasks_per_step)
        self._pending: _Pending | None = None

    def run(self, state: TrainState) -> TrainState:
        """Take the remaining outer steps, and return the last state."""
        backs_off = self.fit.faults.nonfinite == "back_off"
        first, step = state if backs_off else None, int(state.step)
        if first is not None and self._segments is not None:
            # A resumed run may be inside of an outer step. Going back begins that step anew.
            first = dataclasses.replace(first, inner=())
        while step < self.fit.steps:
            step += 1
            try:
                state = self._take(step, state)
            except _BacksOff:
                state = self._backed_off(first, state.pace)
                step = int(state.step)
        return state

    def _take(self, step: int, state: TrainState) -> TrainState:
        """Take an outer step, or the rest of one, and what is due after it."""
        before, metrics = dataclasses.replace(state, optimizer=None, inner=()), None
        segments = self._segments
        if segments is None:
            state, metrics = self.outer.step(state, self.reads(step, state)(ALL_STEPS))
            self._read_metrics()
        while segments is not None and metrics is None:
            self.bars.stands_at(segments.progress, state)
            state, metrics = segments.take_reading(state, self.reads(step, state))
            self._log_inner_loss(step, segments.complete)
            self._reached = segments.newest_step(state)
            self._read_metrics()
            if metrics is None:
                self._after_program(segments, step, state)
        self._pending = _Pending(step, metrics, before)
        self._after_step(step, state)
        return state

    def _log_inner_loss(self, step: int, inner_loss: Any) -> None:
        """Log a row of the program before the last one, which is complete, if due.

        Args:
          step: the outer step.
          inner_loss: of the program; see `SegmentRun.complete`.
        """
        reached = self._reached
        due = time.perf_counter() - self._row_at > ROW_SECONDS
        if due and reached is not None and self.fit.log_every:
            row = {"run/inner_step": float(reached), "run/inner_loss": float(inner_loss)}
            for logger in self.loggers:
                logger.log(step, row)
            self._row_at = time.perf_counter()

    def _after_program(self, segments: SegmentRun, step: int, state: TrainState) -> None:
        """Save and stop, if due, after a program of an outer step."""
        fit, checkpoints = self.fit, self.checkpoints
        programs, planned = state.inner.programs, segments.programs_in_all
        # More may run than are planned, if states are lost; the last one is `_after_step`'s.
        number = (step - 1) * planned + min(programs, planned - 1)
        reason = fit.asked_to_stop(number) if fit.asked_to_stop else None
        every = 0 if checkpoints is None else checkpoints.within
        if checkpoints is not None and (reason or (every and programs % every == 0)):
            self._save_within(checkpoints, segments, step, state)
        if reason:
            raise Interrupted(
                f"{reason} after {segments.progress(state)} of outer step {step} of {fit.steps}. "
                f"{self._saved(step - 1, programs)}"
            )

    def _save_within(
        self, checkpoints: Checkpoints, segments: SegmentRun, step: int, state: TrainState
    ) -> None:
        """Save a state between two programs; a full disk does not end the run."""
        progress, arrays = segments.progress(state), segments.arrays(state)
        checkpoints.save_within(
            *(arrays, step - 1, progress.inner_step, self._records()),
            where=str(progress),
            run=lambda: segments.saved(state),
        )
        segments.checkpointed(checkpoints.saved_within)

    def _records(self) -> dict[str, Any]:
        """Return the records of the loggers."""
        return {type(logger).__name__: logger.record() for logger in self.loggers}

    def _after_step(self, step: int, state: TrainState) -> None:
        """Evaluate, check, save and stop, if due after this step."""
        fit = self.fit
        evaluates = fit.held_out is not None and self._due(step, fit.eval_every)
        checks = self._due(step, fit.check_every)
        programs = 1 if self._segments is None else self._segments.programs_in_all
        reason = fit.asked_to_stop(step * programs) if fit.asked_to_stop else None
        checkpoints = self.checkpoints
        saves = checkpoints is not None and (
            bool(reason)
            or self._due(step, checkpoints.every)
            or (evaluates and checkpoints.best is not None)
        )
        if not (evaluates or saves or checks or reason or step == fit.steps):
            return
        self._read_metrics()
        if checks:
            report = self.outer.check(state)
            if is_first():
                report.warn()
        metrics = self._evaluate(state, step) if evaluates else {}
        if saves and checkpoints is not None:
            checkpoints.save(state, step, self._records(), metrics)
            if self._segments is not None:
                self._segments.checkpointed(None)
        if reason:
            saved = self._saved(step)
            raise Interrupted(f"{reason} after outer step {step} of {fit.steps}. {saved}")

    def _saved(self, step: int, programs: int = 0) -> str:
        """Return a sentence: whether the state of a run that stops here was saved."""
        if self.checkpoints is None:
            return "Nothing is saved."
        self.checkpoints.wait()
        newest, inside = self.checkpoints.latest() or 0, self.checkpoints.within_at()
        at = None if inside is None else (inside.step, inside.programs)
        if (step, programs) in ((newest, 0), at):
            return "It is saved, and the same command goes on."
        where = f"outer step {newest}" if inside is None else f"outer step {inside.step}, "
        if inside is not None:
            where += inside.where
        return f"It could NOT be saved: the same command goes on from {where}."

    def _due(self, step: int, every: int | None) -> bool:
        return bool(every) and (step % (every or 1) == 0 or step == self.fit.steps)

    def _read_metrics(self) -> None:
        """Read the metrics of the pending step, log them, and check them for faults."""
        if self._pending is None:
            return
        (step, metrics, before), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.bars.step_done(values["loss"])
        self._clock.step_done(step)
        names = broken(values)
        answer = self._watch.answer(bool(names), float(before.pace))
        if answer == "stop" or self._due(step, self.fit.log_every):
            row, self._row_at = values | self._clock.row(step), time.perf_counter()
            for logger in self.loggers:
                logger.log(step, row)
        if answer == "stop":
            if self.checkpoints is not None:
                self.checkpoints.drop_within()  # they would resume the step that failed
            raise NonFiniteError(self._why(names[0], values, step, before))
        if answer == "back_off":
            say(f"`{names[0]}` became {values[names[0]]} at outer step {step}: backing off.")
            raise _BacksOff
        self._watch_inner(step, values)

    def _watch_inner(self, step: int, values: Mapping[str, float]) -> None:
        """Report inner loops that diverge, or stop the run; report doubts of the engine once."""
        for text in self._watch.new(self.outer.doubts(values)):
            say(f"At outer step {step}: {text}")
        message = self._watch.diverges(step, values)
        if message and self.fit.faults.diverged == "stop":
            raise DivergedError(message)
        if message:
            say(message)

    def _why(self, name: str, values: Mapping[str, float], step: int, before: TrainState) -> str:
        faults = self.fit.faults
        tried = {
            "skip": f", after {faults.most} steps in a row that were skipped",
            "back_off": f", after {faults.most} times of backing off",
        }
        return (
            f"`{name}` became {values[name]} at outer step {step}"
            f"{tried.get(faults.nonfinite, '')}, so training stopped before it could spread; "
            "metrics up to this step are logged, and the last checkpoint is from before it "
            "(`Faults(nonfinite=...)` says what else can be done: skip, back_off, pass). "
            f"{_cause(values, self.outer, before)}"
        )

    def _backed_off(self, first: TrainState | None, pace: jax.Array) -> TrainState:
        """Return the last good state, with a smaller pace than the run had."""
        smaller = self._watch.pace(float(pace))
        assert first is not None and smaller is not None
        state = first
        if self.checkpoints is not None:
            self.checkpoints.drop_within()  # they may be of the step that is undone
            state, _ = self.checkpoints.restore(first)
        self._pending, step = None, int(state.step)
        for logger in self.loggers:
            logger.back_to(step)
        self.bars.back_to(step)
        say(f"On from outer step {step}, with outer updates times {smaller:.3g}.")
        return dataclasses.replace(state, pace=jnp.full_like(state.pace, smaller))

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        with self._clock.paused():
            estimates = self.outer.evaluate(state)
        means = {f"eval/{name}": value.mean for name, value in estimates.items()}
        errors = {f"eval/{name}_ci95": value.ci95 for name, value in estimates.items()}
        for logger in self.loggers:
            logger.log(step, means | errors)
        return means


def _cause(values: Mapping[str, float], outer: OuterStep, before: TrainState) -> str:
    """Return a sentence: what was not finite in an outer step."""
    left_out = values.get("tasks_reset", values.get("tasks_left_out"))
    if left_out == outer.tasks_per_step:
        return (
            f"In this step all {outer.tasks_per_step} inner runs became NaN or infinite (those "
            f"that do are left out, but none was left). {DIVERGES}"
        )
    return outer.diagnose(before)
