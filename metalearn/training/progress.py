"""Progress bars, of outer steps and of the inner steps of a segmented one; and their rate."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm


class Bars:
    """The progress bars of a run.

    Their rates leave out the first step, which is compiled: otherwise it would decide, for
    minutes, when the run is said to end.
    """

    def __init__(self, outer: tqdm, inner: tqdm | None, compiled: Callable[[], None]):
        """Hold the bars; `compiled`: called once, when the first step is done."""
        self._outer, self._inner, self._compiled = outer, inner, compiled
        self._compiling = True

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

    def inner_done(self, steps: int) -> None:
        """Set the bar of inner steps to `steps` of the current outer step."""
        if self._inner is None:
            return
        if steps < self._inner.n:
            self._inner.reset()
        if self._compiling and steps > self._inner.n:
            self._first_done(self._inner, steps)
        else:
            self._inner.update(steps - self._inner.n)

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
    steps: int, done: int, tasks: int, inner_steps: int | None = None, shown: bool = True
) -> Iterator[Bars]:
    """Open the bars of a run.

    Args:
      steps: outer steps of the run.
      done: outer steps taken before.
      tasks: tasks of an outer step.
      inner_steps: inner steps of an outer step that is cut into segments; None: no inner bar.
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
        if inner_steps is not None:
            inner = stack.enter_context(
                tqdm(total=inner_steps, unit="step", desc="inner steps", leave=False, **options)
            )
        yield Bars(outer, inner, compiled.set)


def _tick(bar: tqdm, compiled: threading.Event) -> None:
    """Show, each second, how long the first step has been compiled."""
    while not compiled.wait(1.0):
        bar.refresh()
