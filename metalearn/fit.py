"""How a run is trained: for how long, what is looked at on the way, and where it is kept.

`Fit` opens what a run reports to, goes on from the newest checkpoint, and hands over to the
loop (`metalearn.outer_loop`). What happens on a fault is said by `metalearn.faults`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from metalearn.checks import at_least
from metalearn.faults import Faults
from metalearn.loggers import Logger
from metalearn.outer_loop import OuterLoop, Steps
from metalearn.processes import is_first
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState

if TYPE_CHECKING:
    from metalearn.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long to train, what to look at on the way, and what to do when something breaks."""

    steps: int  # outer steps, counted from the beginning of the run
    held_out: Tasks | None = None  # evaluated on the way: validation tasks, not test
    eval_every: int | None = None  # outer steps; None or 0: never
    eval_tasks: int = 200
    log_every: int = 10  # outer steps
    check_every: int | None = None  # outer steps; a `HealthWarning` for what is found
    faults: Faults = Faults()
    # Asked after every outer step, with its number: None, or why the run is to stop. It then
    # saves and raises Interrupted.
    asked_to_stop: Callable[[int], str | None] | None = None
    progress: bool = True  # a bar with the rate and the loss

    def __post_init__(self) -> None:
        never = {"eval_every": self.eval_every, "check_every": self.check_every}
        at_least("Fit", 0, steps=self.steps, log_every=self.log_every, **never)
        at_least("Fit", 1, eval_tasks=self.eval_tasks)

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
          NonFiniteError: at an outer loss or meta-gradient that is NaN or infinite, where
            `faults` says stop or has had enough. What was logged until then is kept.
          DivergedError: at inner runs that diverge, where `faults` says stop.
          Interrupted: where `asked_to_stop` said so, once the state is saved.
          ChangedConfigError: if the checkpoints are of another config.
        """
        record: dict[str, Any] = {}
        loggers = loggers if is_first() else ()
        if checkpoints is not None:
            state, record = checkpoints.restore(state)
        first = int(state.step)
        config = checkpoints.config if checkpoints else {}
        try:
            for logger in loggers:
                logger.start(first, config, record.get(type(logger).__name__, {}))
            with self._bar(first, trainer.tasks_per_step) as bar:
                return OuterLoop(self, trainer, tasks, loggers, checkpoints, bar).run(state)
        except BaseException:
            for logger in loggers:
                logger.finish()
            raise

    @contextlib.contextmanager
    def _bar(self, first: int, tasks_per_step: int) -> Iterator[tqdm]:
        with tqdm(
            total=self.steps,
            initial=first,
            unit="step",
            desc=f"outer steps of {tasks_per_step} tasks",
            disable=not (self.progress and is_first()),
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
        ) as bar:
            bar.set_postfix_str("compiling the first step")
            yield bar
