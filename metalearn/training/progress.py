"""Progress bars: outer steps, and inner steps of an outer step that is cut into segments."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Bars:
    """The progress bars of a run."""

    def __init__(self, outer: tqdm, inner: tqdm | None):
        self._outer, self._inner = outer, inner

    def step_done(self, loss: float) -> None:
        """Advance the bar of outer steps by one."""
        self._outer.set_postfix(loss=f"{loss:.4f}", refresh=False)
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
        self._inner.update(steps - self._inner.n)


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
        inner = None
        if inner_steps is not None:
            inner = stack.enter_context(
                tqdm(total=inner_steps, unit="step", desc="inner steps", leave=False, **options)
            )
        yield Bars(outer, inner)
