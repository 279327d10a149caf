"""Starting and closing a run: its newest checkpoint, its loggers, its progress bars.

The loop in between is `metalearn.training.outer_loop`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils import disk
from metalearn.checkpoints.manager import Checkpoints
from metalearn.loggers import Logger
from metalearn.sharding.distributed import is_first, say
from metalearn.tasks import Tasks
from metalearn.train_state import TrainState
from metalearn.training.outer_loop import Fit, Interrupted, OuterLoop, OuterStep
from metalearn.training.prefetch import tasks_of_steps
from metalearn.training.progress import bars


def run(
    fit: Fit,
    outer: OuterStep,
    state: TrainState,
    tasks: Tasks,
    loggers: Sequence[Logger] = (),
    checkpoints: Checkpoints | None = None,
) -> TrainState:
    """Train from `state`, or from the newest checkpoint, and return the last state.

    The loggers are left open for a final table (`logger.finish(table)`), unless training fails.
    The exceptions are those of `Trainer.fit`.

    Args:
      fit: the settings of the run.
      outer: the functions of the trainer.
      state: the state to start from.
      tasks: the tasks to train on.
      loggers: they get the metrics.
      checkpoints: where the run is saved, and resumed from; None: nowhere.
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
    first, parts_taken = int(state.step), outer.parts_taken(state)
    if (first or parts_taken) and first < fit.steps:
        inside = f", inner step {parts[parts_taken - 1].steps} of the next" if parts_taken else ""
        say(f"Going on from outer step {first} of {fit.steps}{inside}.")
    config = checkpoints.config if checkpoints else {}
    try:
        for logger in loggers:
            saved = record.get(type(logger).__name__)
            logger.start(first, config, saved if isinstance(saved, dict) else {})
        shown = fit.progress and is_first()
        with (
            bars(fit.steps, first, outer.tasks_per_step, parts[-1].steps, shown) as progress,
            tasks_of_steps(tasks, _fetch(outer, state), fit.steps) as tasks_at,
        ):
            return OuterLoop(fit, outer, tasks_at, loggers, checkpoints, progress).run(state)
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


def _fetch(outer: OuterStep, state: TrainState) -> Callable[[int], Tasks] | None:
    """Return a function: outer step -> its tasks, from the host; None for those on the device."""
    if outer.fetch is None:
        return None
    # A copy of the key of this process alone: no step of the run has to be waited for.
    data = jnp.asarray(np.asarray(jax.random.key_data(state.key)))
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(state.key))
    return functools.partial(outer.fetch, key)
