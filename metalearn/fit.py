"""The host side of training: the loop around `Trainer.step`, and what it reports to.

The device is never waited for: the metrics of a step are read while the next one runs,
which is also when a loss that is not finite is noticed; a step is looked at before it is
checkpointed. A step that failed is looked at once more, task by task, to say where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
from tqdm import tqdm

from metalearn import health
from metalearn.evaluation import Estimate
from metalearn.loggers import Logger
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState

if TYPE_CHECKING:
    from metalearn.checkpoint import Checkpoints

WATCHED = ("loss", "meta_grad_norm", "meta_update_norm")
EVALUATION = 2**32 - 1  # folded into the run's key; outer steps count up from 0


class Steps(health.Looks, Protocol):
    """What this loop needs of a `Trainer`."""

    @property
    def tasks_per_step(self) -> int: ...
    @property
    def step(self) -> Callable[[TrainState, Tasks], tuple[TrainState, Any]]: ...
    def evaluate(
        self, eta: Any, tasks: Tasks, key: jax.Array, count: int = ...
    ) -> dict[str, Estimate]: ...


class NonFiniteError(FloatingPointError):
    """The outer loss or the meta-gradient became NaN or infinite."""


class _Taken(NamedTuple):
    """An outer step whose metrics have not been read yet."""

    step: int
    metrics: Any
    before: TrainState  # the state it was taken from, but for the outer optimizer's and inner runs


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long to train, what to look at on the way, and where to keep it."""

    steps: int  # outer steps, counted from the beginning of the run
    held_out: Tasks | None = None  # evaluated on the way: validation tasks, not test
    eval_every: int | None = None  # outer steps; None or 0: never
    eval_tasks: int = 200
    log_every: int = 10  # outer steps
    check_every: int | None = None  # outer steps; a `HealthWarning` for what is found
    stop_on_nonfinite: bool = True
    progress: bool = True  # a bar with the rate and the loss

    def run(
        self,
        trainer: Steps,
        state: TrainState,
        tasks: Tasks,
        loggers: Sequence[Logger] = (),
        checkpoints: Checkpoints | None = None,
    ) -> TrainState:
        """Train from `state` (or from the newest checkpoint) and return the last state.

        The loggers are left open for a final table (`logger.finish(table)`), unless
        training fails.

        Raises:
          NonFiniteError: at the first outer loss or meta-gradient that is NaN or infinite.
            What was logged until then is kept.
          ChangedConfigError: if the checkpoints are of another config.
        """
        record: dict[str, Any] = {}
        if checkpoints is not None:
            state, record = checkpoints.restore(state)
        first = int(state.step)
        config = checkpoints.config if checkpoints else {}
        try:
            for logger in loggers:
                logger.start(first, config, record.get(type(logger).__name__, {}))
            with self._bar(first, trainer.tasks_per_step) as bar:
                return self._loop(trainer, state, tasks, loggers, checkpoints, bar, first)
        except BaseException:
            for logger in loggers:
                logger.finish()
            raise

    def _loop(
        self,
        trainer: Steps,
        state: TrainState,
        tasks: Tasks,
        loggers: Sequence[Logger],
        checkpoints: Checkpoints | None,
        bar: tqdm,
        first: int,
    ) -> TrainState:
        waiting: _Taken | None = None
        for step in range(first + 1, self.steps + 1):
            before = dataclasses.replace(state, optimizer=None, inner=())
            state, metrics = trainer.step(state, tasks)
            if waiting is not None:
                self._report(waiting, trainer, tasks, loggers, bar)
            waiting = _Taken(step, metrics, before)
            evaluates = self._due(step, self.eval_every) and self.held_out is not None
            saves = checkpoints is not None and self._due(step, checkpoints.every)
            checks = self._due(step, self.check_every)
            if not (evaluates or saves or checks or step == self.steps):
                continue
            self._report(waiting, trainer, tasks, loggers, bar)
            waiting = None
            if checks:
                health.check(trainer, state, tasks).warn()
            if evaluates:
                self._evaluate(trainer, state, step, loggers)
            if saves and checkpoints is not None:
                kept = {type(logger).__name__: logger.record() for logger in loggers}
                checkpoints.save(state, step, kept)
        return state

    def _due(self, step: int, every: int | None) -> bool:
        return bool(every) and (step % (every or 1) == 0 or step == self.steps)

    def _report(
        self, taken: _Taken, trainer: Steps, tasks: Tasks, loggers: Sequence[Logger], bar: tqdm
    ) -> None:
        step, metrics, before = taken
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        bar.update()
        broken = [name for name in WATCHED if not math.isfinite(values[name])]
        stops = bool(broken) and self.stop_on_nonfinite
        if stops or self._due(step, self.log_every):
            for logger in loggers:
                logger.log(step, values)
        if stops:
            raise NonFiniteError(
                f"`{broken[0]}` became {values[broken[0]]} at outer step {step}, so training "
                "stopped before it could spread; metrics up to this step are logged, and the "
                "last checkpoint is from before it (`stop_on_nonfinite=False` goes on). "
                f"{_why(values, trainer, before, tasks)}"
            )

    def _evaluate(
        self, trainer: Steps, state: TrainState, step: int, loggers: Sequence[Logger]
    ) -> None:
        assert self.held_out is not None
        key = jax.random.fold_in(state.key, EVALUATION)  # the same tasks at every evaluation
        found = trainer.evaluate(state.eta, self.held_out, key, self.eval_tasks)
        values = {f"eval/{name}": value.mean for name, value in found.items()}
        values |= {f"eval/{name}_ci95": value.ci95 for name, value in found.items()}
        for logger in loggers:
            logger.log(step, values)

    @contextlib.contextmanager
    def _bar(self, first: int, tasks_per_step: int) -> Iterator[tqdm]:
        with tqdm(
            total=self.steps,
            initial=first,
            unit="step",
            desc=f"outer steps of {tasks_per_step} tasks",
            disable=not self.progress,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
        ) as bar:
            bar.set_postfix_str("compiling the first step")
            yield bar


def _why(values: Mapping[str, float], trainer: Steps, before: TrainState, tasks: Tasks) -> str:
    """Say what was not finite in an outer step."""
    if values.get("tasks_reset") == trainer.tasks_per_step:
        return (
            f"In this step all {trainer.tasks_per_step} inner runs became NaN or infinite (those "
            f"that do are left out and begin anew, but none was left). {health.DIVERGES}"
        )
    return health.diagnose(trainer, before, tasks)
