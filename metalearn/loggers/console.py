"""Metrics on the console."""

from __future__ import annotations

from collections.abc import Mapping

from metalearn._utils import disk
from metalearn._utils.intervals import Estimate
from metalearn.loggers.base import Logger


class ConsoleLogger(Logger):
    """Prints metrics above the progress bar, and the final table."""

    def __init__(self, every: int = 100):
        """Print metrics every so many outer steps, and those of every evaluation."""
        self.every = every

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated or step % self.every == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            disk.tell(f"step {step:>6}  {shown}")

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        for name, value in (table or {}).items():
            disk.tell(f"{name:>20}  {value}  (95% interval, {value.tasks} tasks)")
