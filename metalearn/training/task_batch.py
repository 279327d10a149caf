"""The tasks of an outer step, mapped over devices and in chunks, and averaged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from metalearn.sharding.batched_means import at_once, check_tasks, mean_and_each
from metalearn.sharding.layout import Layout


@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """The batch of tasks of an outer step.

    Args:
      size: tasks of an outer step.
      chunk: tasks unrolled at once on a device; None: all of its share, or on a CPU one at a time.
      layout: over which devices; None: one.
    """

    size: int
    chunk: int | None = None
    layout: Layout | None = None

    def check(self) -> None:
        """Raise ValueError where the tasks do not divide into devices and chunks."""
        check_tasks(self.size, self.chunk)
        if self.layout is not None:
            self.layout.check(self.size, self.chunk)

    @property
    def devices(self) -> int:
        """Return the number of devices, or groups of devices, among which tasks are divided."""
        return 1 if self.layout is None else self.layout.devices

    @property
    def share(self) -> int:
        """Return the number of tasks of a device in an outer step."""
        return self.size // self.devices

    @property
    def at_once(self) -> int:
        """Return the number of tasks that a device unrolls at once, at most."""
        return at_once(self.share, self.chunk)

    @property
    def inner_layout(self) -> Layout | None:
        """The layout, where it says how an inner run is laid out over devices; else None."""
        layout = self.layout
        return layout if layout is not None and (layout.cuts or layout.data > 1) else None

    def mean(self, on_task: Callable[..., Any], shared: Any, keys: jax.Array) -> Any:
        """Return the mean of `on_task(*shared, key)` over the keys [size] of tasks."""
        return self.mean_and_each(lambda *given: (on_task(*given), ()), shared, keys)[0]

    def mean_and_each(
        self, function: Callable[..., tuple[Any, Any]], shared: Any, inputs: Any
    ) -> tuple[Any, Any]:
        """Return (mean over tasks, stacked over tasks) of the two outputs of `function`.

        Args:
          function: (*shared, input) -> (averaged output, stacked output), applied to every task;
            it may close over nothing that is traced.
          shared: a tuple of arguments that all tasks share.
          inputs: arguments of each task, leaves [size, ...].
        """
        if self.layout is None:
            return mean_and_each(functools.partial(function, *shared), inputs, self.chunk)
        return self.layout.mean_and_each(function, shared, inputs, self.chunk)
