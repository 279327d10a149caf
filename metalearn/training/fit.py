"""Opening a run and closing it: its newest checkpoint, its loggers, its progress bar.

What happens in between is the loop's (`metalearn.training.outer_loop`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalearn._utils import disk
from metalearn.checkpoints.manager import Checkpoints
from metalearn.loggers import Logger
from metalearn.sharding.distributed import is_first, say
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState
from metalearn.training.outer_loop import Fit, Interrupted, OuterLoop, OuterStep
from metalearn.training.progress import bars


def run(
    fit: Fit,
    outer: OuterStep,
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
    parts = outer.parts
    if checkpoints is not None and checkpoints.within and parts[-1].steps is None:
        raise ValueError(
            f"`Checkpoints(within={checkpoints.within})` (`checkpoint_within`) saves between two "
            "segments of an outer step, but it is one program: set `Trainer(segment=)` too, with "
            "`Forward`, or leave both."
        )
    record: dict[str, Any] = {}
    loggers = loggers if is_first() else ()
    if checkpoints is not None:
        state, record = checkpoints.restore(state, outer.partway())
    first, taken = int(state.step), outer.parts_taken(state)
    if (first or taken) and first < fit.steps:
        inside = f", inner step {parts[taken - 1].steps} of the next" if taken else ""
        say(f"Going on from outer step {first} of {fit.steps}{inside}.")
    config = checkpoints.config if checkpoints else {}
    try:
        for logger in loggers:
            kept = record.get(type(logger).__name__)
            logger.start(first, config, kept if isinstance(kept, dict) else {})
        shown = fit.progress and is_first()
        with bars(fit.steps, first, outer.tasks_per_step, parts[-1].steps, shown) as shows:
            return OuterLoop(fit, outer, tasks, loggers, checkpoints, shows).run(state)
    except Interrupted:
        for logger in loggers:
            with disk.forgiven(f"What {type(logger).__name__} had left"):
                logger.finish()
        raise
    except BaseException:
        for logger in loggers:
            with disk.forgiven(f"What {type(logger).__name__} had left"):
                logger.abandon()
        raise
