"""The tasks of an outer step, over devices and in chunks: what is done to each, and its mean."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from metalearn.sharding.batched_means import at_once, check_tasks, mean_and_each
from metalearn.sharding.layout import Layout
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """How many tasks an outer step takes, how many of them at once, and on which devices."""

    size: int
    chunk: int | None = None  # tasks unrolled at once on a device; None: all of its share
    layout: Layout | None = None  # None: one device

    def check(self) -> None:
        """Raise ValueError where the tasks do not divide into devices and chunks."""
        check_tasks(self.size, self.chunk)
        if self.layout is not None:
            self.layout.check(self.size, self.chunk)

    @property
    def devices(self) -> int:
        """Return how many devices, or groups of them, take tasks of their own."""
        return 1 if self.layout is None else self.layout.devices

    @property
    def share(self) -> int:
        """Return how many tasks of a step a device takes."""
        return self.size // self.devices

    @property
    def at_once(self) -> int:
        """Return how many tasks a device unrolls at once."""
        return at_once(self.share, self.chunk)

    @property
    def transform(self) -> Callable[[Unroll], Unroll] | None:
        """What makes an unroll keep its inner states as the layout cuts them; None: nothing."""
        return self.layout.constrain if self.layout is not None and self.layout.cuts else None

    def mean(self, on_task: Callable[..., Any], shared: Any, keys: jax.Array) -> Any:
        """Return the mean of `on_task(*shared, key)` over the keys [size] of tasks."""
        return self.mean_and_each(lambda *given: (on_task(*given), ()), shared, keys)[0]

    def mean_and_each(
        self, function: Callable[..., tuple[Any, Any]], shared: Any, inputs: Any
    ) -> tuple[Any, Any]:
        """Return the mean of what `function(*shared, input)` returns first, and each second.

        Args:
          function: applied to every task; nothing that is traced may be closed over.
          shared: a tuple of what all tasks have.
          inputs: what they do not: leaves [size, ...].
        """
        if self.layout is None:
            return mean_and_each(functools.partial(function, *shared), inputs, self.chunk)
        return self.layout.mean_and_each(function, shared, inputs, self.chunk)
