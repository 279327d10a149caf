"""Starting and closing a run: its newest checkpoint, its loggers, its progress bars.

The loop in between is `metalearn.training.outer_loop`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils import disk
from metalearn.checkpoints.manager import Checkpoints
from metalearn.loggers import Logger
from metalearn.sharding.distributed import is_first, say
from metalearn.tasks import ALL_STEPS, Read, Reads, Tasks
from metalearn.train_state import TrainState
from metalearn.training.outer_loop import Fetch, Fit, Interrupted, OuterLoop, OuterStep
from metalearn.training.prefetch import prefetching
from metalearn.training.progress import bars
from metalearn.training.segmented_unroll import PartialUnroll


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
    segments = outer.segments
    if checkpoints is not None and checkpoints.within and segments is None:
        raise ValueError(
            f"`Checkpoints(within={checkpoints.within})` (`checkpoint_within`) saves between two "
            "segments of an outer step, but it is one program: set `Trainer(segment=)` too, or "
            "leave both."
        )
    record: dict[str, Any] = {}
    loggers = loggers if is_first() else ()
    if checkpoints is not None:
        state, record = checkpoints.restore(state, segments)
    first, inside = int(state.step), ""
    if segments is not None and isinstance(state.inner, PartialUnroll):
        inside = f", {segments.progress(state)} of the next"
    if (first or inside) and first < fit.steps:
        say(f"Going on from outer step {first} of {fit.steps}{inside}.")
    config = checkpoints.config if checkpoints else {}
    try:
        for logger in loggers:
            saved = record.get(type(logger).__name__)
            logger.start(first, config, saved if isinstance(saved, dict) else {})
        shown = fit.progress and is_first()
        with (
            bars(fit.steps, first, outer.tasks_per_step, segments is not None, shown) as progress,
            reading(outer, tasks, state, fit.steps) as reads,
        ):
            state = OuterLoop(fit, outer, reads, loggers, checkpoints, progress).run(state)
        if checkpoints is not None:
            checkpoints.wait()  # what is read after this is the last state
            if segments is not None and checkpoints.within_at() is None:
                segments.clear()  # all is saved: kept states are of no use any more
        return state
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
    finally:
        if segments is not None:
            segments.close()


@contextlib.contextmanager
def reading(
    outer: OuterStep, tasks: Tasks, state: TrainState, steps: int
) -> Iterator[Callable[[int, TrainState], Read]]:
    """Yield a function: (outer step from 1, state) -> what reads the tasks of its next program.

    Args:
      outer: the functions of the trainer.
      tasks: of the run.
      state: that the run starts from.
      steps: outer steps of the run.
    """
    fetch = outer.fetch
    if fetch is None:
        yield lambda step, state: lambda reads: tasks
        return
    if fetch.ahead is None:
        now = fetch.now
        yield lambda step, state: lambda reads: now(state, reads)
        return
    cut = outer.segments is not None and fetch.each_program
    planned = outer.segments.reads() if outer.segments is not None and cut else [[ALL_STEPS]]
    order = _Order(fetch, _key(state), planned)
    with prefetching(order.fetched, steps * order.each_step - 1) as read_ahead:
        yield lambda step, state: order.reader(step, state, read_ahead)


class _Order:
    """What the programs of a run read of tasks on the host, in the order in which it is planned."""

    def __init__(self, fetch: Fetch, key: jax.Array, planned: Sequence[Sequence[Reads]]):
        """Make the order; `planned`: by program of an outer step."""
        assert fetch.ahead is not None
        self._ahead, self._now, self._place, self._key = fetch.ahead, fetch.now, fetch.place, key
        self._planned = planned
        self._flat = [reads for program in planned for reads in program]
        self._starts = [0, *itertools.accumulate(map(len, planned))]
        self._whole = not fetch.each_program
        self._placed: tuple[int, Any] = (-1, None)  # the tasks that were read last

    @property
    def each_step(self) -> int:
        """How many times an outer step reads."""
        return len(self._flat)

    def fetched(self, number: int) -> Tasks:
        """Return the tasks with a number in the order, on the device."""
        step, index = divmod(number, self.each_step)
        return self._ahead(self._key, step + 1, self._flat[index])

    def reader(self, step: int, state: TrainState, read_ahead: Callable[[int], Tasks]) -> Read:
        """Return what reads the tasks of the next program of an outer step."""
        program = state.inner.programs if isinstance(state.inner, PartialUnroll) else 0
        counter = itertools.count()

        def read(reads: Reads) -> Tasks:
            number = (step - 1) * self.each_step
            if not self._whole:
                count = next(counter)
                known = self._planned[program] if program < len(self._planned) else []
                if count >= len(known) or known[count] != reads:  # another schedule than planned
                    return self._now(state, reads)
                number += self._starts[program] + count
            if self._placed[0] != number:
                self._placed = number, self._place(read_ahead(number))
            return self._placed[1]

        return read


def _key(state: TrainState) -> jax.Array:
    """Return a copy of the key of a run of this process alone: no step has to be waited for."""
    data = jnp.asarray(np.asarray(jax.random.key_data(state.key)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(state.key))
