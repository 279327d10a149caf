"""Metrics on the console: one row for whatever is logged, and the final table.

A row holds the few numbers that a person reads, within 100 columns: everything else is in the
files. What says nothing is left out: the inner loss after the only inner step, the share of
finite inner gradients while it is one, counts of masked tasks while they are zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from metalearn._utils import disk
from metalearn._utils.intervals import Estimate
from metalearn.loggers.base import Logger

WIDTH = 100  # columns of a row
SPLITS = {"train": "cyan", "validation": "magenta", "test": "green"}  # in a terminal, in colour
EVALUATION, INTERVAL = "eval/", "_ci95"  # of metrics on validation tasks: eval/loss, eval/loss_ci95

# Metrics of `Trainer.step` and of the clock that are for the files alone.
FILES = {
    "inner_steps_finite",
    "inner_update_norm",
    "inner_tangent_norm",
    "meta_update_norm",
    "time/seconds",
    "time/steps_per_second",
}
# Metrics that are shown where they have another value than this.
SILENT = {"inner_finite": 1.0, "tasks_left_out": 0.0, "tasks_reset": 0.0, "step_skipped": 0.0}
COUNTS = ("tasks_left_out", "tasks_not_finite")  # of an evaluation: tasks, without an interval
INNER = ("inner_loss_first", "inner_loss_last")
LAST = (*INNER, "meta_grad_norm", "time/tasks_per_second")


class ConsoleLogger(Logger):
    """Prints a row above the progress bar for whatever is logged, and the final table.

    Args:
      every: print training metrics of these outer steps alone, multiples of it. Evaluations are
        always printed.
    """

    def __init__(self, every: int = 1):
        self.every = every

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if any(name.startswith(EVALUATION) for name in metrics):
            _print("validation", step, validation_cells(metrics))
        elif step % self.every == 0:
            _print("train", step, train_cells(metrics))

    def finish(self, table: Mapping[str, Estimate] | None = None) -> None:
        for name, value in (table or {}).items():
            if name in COUNTS:
                if value.mean:
                    disk.tell(_label("test") + f"  {name}  {value.mean:.0f} of {value.tasks} tasks")
                continue
            disk.tell(_label("test") + f"  {name}  {value}  (95% interval, {value.tasks} tasks)")


def _print(split: str, step: int, cells: Iterator[str]) -> None:
    row = f"{split:<10}  step {step:>6}"
    for cell in cells:
        if len(row) + 2 + len(cell) <= WIDTH:
            row += f"  {cell}"
    disk.tell(_label(split) + row[len(f"{split:<10}") :])


def _label(split: str) -> str:
    """Return the name of a split, ten columns wide, in colour where the output is a terminal."""
    text = f"{split:<10}"
    if not sys.stdout.isatty():
        return text
    console = Console(file=sys.stdout)
    with console.capture() as captured:
        console.print(Text(text, style=SPLITS[split]), end="")
    return captured.get()


def train_cells(metrics: Mapping[str, float]) -> Iterator[str]:
    """Yield the metrics of an outer step as texts, the most important first."""
    said = {name for name, silent in SILENT.items() if metrics.get(name, silent) != silent}
    hidden = {"loss", *FILES, *SILENT, *LAST}
    for name in ("loss", *sorted(said), *(name for name in metrics if name not in hidden)):
        if name in metrics:
            yield f"{name} {metrics[name]:.4g}"
    if INNER[0] in metrics:
        first, last = (f"{metrics[name]:.4g}" for name in INNER)
        yield f"inner_loss {first}" if first == last else f"inner_loss {first} -> {last}"
    if "time/tasks_per_second" in metrics:
        yield f"{metrics['time/tasks_per_second']:.3g} tasks/s"
    if "meta_grad_norm" in metrics:
        yield f"meta_grad_norm {metrics['meta_grad_norm']:.3g}"


def validation_cells(metrics: Mapping[str, float]) -> Iterator[str]:
    """Yield the metrics of an evaluation as texts, each with its 95% interval."""
    for name, value in metrics.items():
        count = name.removeprefix(EVALUATION) in COUNTS
        if name.endswith(INTERVAL) or (count and not value):
            continue
        interval = metrics.get(name + INTERVAL)
        more = "" if interval is None or count else f" +- {interval:.2g}"
        yield f"{name.removeprefix(EVALUATION)} {value:.4g}{more}"
