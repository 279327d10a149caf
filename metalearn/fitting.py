"""Opening a run and closing it: its newest checkpoint, its loggers, its progress bar.

What happens in between is the loop's (`metalearn.outer_loop`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from metalearn.fit import Fit
from metalearn.loggers import Logger
from metalearn.outer_loop import Interrupted, OuterLoop, Steps
from metalearn.processes import is_first
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState

if TYPE_CHECKING:
    from metalearn.checkpoint import Checkpoints


def run(
    fit: Fit,
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
        `fit.faults` says stop or has had enough. What was logged until then is kept.
      DivergedError: at inner runs that diverge, where `fit.faults` says stop.
      Interrupted: where `fit.asked_to_stop` said so, once the state is saved.
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
        with _bar(fit, first, trainer.tasks_per_step) as bar:
            return OuterLoop(fit, trainer, tasks, loggers, checkpoints, bar).run(state)
    except Interrupted:
        for logger in loggers:
            logger.finish()
        raise
    except BaseException:
        for logger in loggers:
            logger.abandon()
        raise


@contextlib.contextmanager
def _bar(fit: Fit, first: int, tasks_per_step: int) -> Iterator[tqdm]:
    with tqdm(
        total=fit.steps,
        initial=first,
        unit="step",
        desc=f"outer steps of {tasks_per_step} tasks",
        disable=not (fit.progress and is_first()),
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
    ) as bar:
        bar.set_postfix_str("compiling the first step")
        yield bar
