"""Progress bars, of outer steps and of the segments of one; and their rate."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from metalearn.train_state import TrainState
from metalearn.training.segment_plan import Progress

# What the bar of a segmented outer step says. It counts the work in segments advanced; a segment
# that cotangents are pulled back through counts as several.
PHASES = {"forward": "forward", "replay": "replaying", "backward": "backward"}


class Bars:
    """The progress bars of a run.

    Their rates leave out the first step, or its first program, which is compiled: otherwise it
    would decide, for minutes, when the run is said to end.
    """

    def __init__(self, outer: tqdm, inner: tqdm | None, compiled: Callable[[], None]):
        """Hold the bars; `compiled`: called once, when the first step is done."""
        self._outer, self._inner, self._compiled = outer, inner, compiled
        self._compiling = True
        self._shown = -math.inf  # when the inner bar was last set

    def step_done(self, loss: float) -> None:
        """Advance the bar of outer steps by one."""
        self._outer.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self._compiling:  # with an inner bar, the rate of that one leaves it out
            self._first_done(self._outer, self._outer.n + 1)
        else:
            self._outer.update()

    def back_to(self, step: int) -> None:
        """Set the bar of outer steps back to `step`."""
        self._outer.n = step

    def stands_at(self, progress: Callable[[TrainState], Progress], state: TrainState) -> None:
        """Show where an outer step of several programs stands; `progress` says it of a state."""
        bar, now = self._inner, time.perf_counter()
        if bar is None or bar.disable or now - self._shown < bar.mininterval:
            return
        self._shown, stands = now, progress(state)
        bar.total = stands.of_work
        if stands.work < bar.n:
            bar.initial = 0
            bar.reset(stands.of_work)
        bar.set_description_str(PHASES[stands.phase], refresh=False)
        bar.set_postfix_str(f"inner step {stands.inner_step} of {stands.steps}", refresh=False)
        if self._compiling and stands.work > bar.n:
            self._first_done(bar, stands.work)
        else:
            bar.update(stands.work - bar.n)

    def _first_done(self, bar: tqdm, done: int) -> None:
        """Set a bar to `done`, and let its rate begin now."""
        self._compiling = False
        self._compiled()
        if bar.disable:
            return
        bar.unpause()
        bar.n = bar.initial = bar.last_print_n = done
        bar.refresh()


class Clock:
    """The wall time of a run in this process, and its rate from one row of metrics to the next.

    The rate leaves out the first outer step, which is compiled, and evaluations (`paused`).
    """

    def __init__(self, tasks: int):
        """Start; `tasks`: of an outer step."""
        self._tasks = tasks
        self._begun = time.perf_counter()
        self._row: tuple[int, float] | None = None  # the outer step of the last row, and its time

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rate."""
        before = time.perf_counter()
        yield
        if self._row is not None:
            step, moment = self._row
            self._row = step, moment + time.perf_counter() - before

    def step_done(self, step: int) -> None:
        """Begin to measure the rate at the first outer step that is done, or after going back."""
        if self._row is None or step <= self._row[0]:
            self._row = step, time.perf_counter()

    def row(self, step: int) -> dict[str, float]:
        """Return the metrics of a row: seconds, and the rate since the last row where known."""
        now = time.perf_counter()
        metrics = {"time/seconds": now - self._begun}
        if self._row is not None and self._row[0] < step:
            rate = (step - self._row[0]) / max(now - self._row[1], 1e-9)
            metrics["time/steps_per_second"] = rate
            metrics["time/tasks_per_second"] = rate * self._tasks
            self._row = step, now
        return metrics


@contextlib.contextmanager
def bars(
    steps: int, done: int, tasks: int, segmented: bool = False, shown: bool = True
) -> Iterator[Bars]:
    """Open the bars of a run.

    Args:
      steps: outer steps of the run.
      done: outer steps taken before.
      tasks: tasks of an outer step.
      segmented: whether an outer step is cut into segments, which have a bar of their own.
      shown: whether bars are shown at all.
    """
    options: dict[str, Any] = {
        "disable": not shown,
        "dynamic_ncols": True,
        "mininterval": 0.1 if sys.stderr.isatty() else 5.0,
    }
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(
            tqdm(
                total=steps,
                initial=done,
                unit="step",
                desc=f"outer steps of {tasks} tasks",
                **options,
            )
        )
        outer.set_postfix_str("compiling the first step")
        compiled = threading.Event()
        stack.callback(compiled.set)
        if shown and sys.stderr.isatty():
            threading.Thread(target=_tick, args=(outer, compiled), daemon=True).start()
        inner = None
        if segmented:
            inner = stack.enter_context(
                tqdm(total=1, unit="segment", desc=PHASES["forward"], leave=False, **options)
            )
        yield Bars(outer, inner, compiled.set)


def _tick(bar: tqdm, compiled: threading.Event) -> None:
    """Show, each second, how long the first step has been compiled."""
    while not compiled.wait(1.0):
        bar.refresh()
