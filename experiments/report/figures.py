"""Figures of runs, by matplotlib: a metric by outer step, of several runs side by side.

Training is a thin line, the mean over the tasks of one outer step; validation a line with its 95%
interval over tasks; the score on test tasks a point with its interval, at the end.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from metalearn._utils import disk
from metalearn.algorithms.pictures import row_of_panels, scale
from metalearn.experiments.report.run_logs import Curve, RunLog

PANELS = 4  # of the picture that every run ends with
FILES = ("time/seconds", "time/steps_per_second")  # not drawn


def metrics_of(runs: Sequence[RunLog]) -> list[str]:
    """Return the metrics to draw: those that are evaluated first, the loss before all others."""
    evaluated = [name for run in runs for name in (*run.validation, *run.test)]
    logged = [name for run in runs for name in run.train if name not in FILES]
    names = [name for name in dict.fromkeys(["loss", *evaluated, *logged]) if _varies(name, runs)]
    one_step = all(_repeated(run, "inner_loss_first", "inner_loss_last") for run in runs)
    return [name for name in names if not (one_step and name == "inner_loss_last")]


def _repeated(run: RunLog, name: str, other: str) -> bool:
    """Say whether two metrics of a run are the same throughout, as after a single inner step."""
    if name not in run.train or other not in run.train:
        return name not in run.train
    return np.array_equal(run.train[name].values, run.train[other].values, equal_nan=True)


def _varies(name: str, runs: Sequence[RunLog]) -> bool:
    """Say whether a metric has finite values that are not all the same."""
    values = [_finite(curve.values) for run in runs for curve in _curves(run, name)]
    values += [np.asarray([run.test[name].mean]) for run in runs if name in run.test]
    together = np.concatenate(values) if values else np.zeros(0)
    return len(np.unique(together)) > 1


def _curves(run: RunLog, name: str) -> list[Curve]:
    return [curves[name] for curves in (run.train, run.validation) if name in curves]


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def curves_figure(run: RunLog) -> Any:
    """Draw the metrics of a run that are evaluated, side by side: those to look at first."""
    evaluated = dict.fromkeys(["loss", *run.validation, *run.test])
    names = [name for name in metrics_of([run]) if name in evaluated][:PANELS] or ["loss"]
    figure, axes = row_of_panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        _panel(ax, name, [run], [""])
        ax.legend(fontsize="small")
    return figure


def curve_figure(name: str, runs: Sequence[RunLog], labels: Sequence[str]) -> Any:
    """Draw a metric of runs by outer step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    _panel(ax, name, runs, labels)
    if len(runs) == 1:
        ax.legend(fontsize="small")
    else:  # below, where it covers no curve
        figure.legend(fontsize="small", loc="outside lower center", ncols=len(runs))
    return figure


def _panel(ax: Any, name: str, runs: Sequence[RunLog], labels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        _draw(ax, name, run, label if len(runs) > 1 else "", f"C{number % 10}")
    values = np.concatenate([_finite(c.values) for run in runs for c in _curves(run, name)])
    ax.set_yscale(scale(values))
    ax.set(xlabel="outer step", ylabel=name.removeprefix("time/"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)


def _draw(ax: Any, name: str, run: RunLog, label: str, colour: str) -> None:
    prefix = f"{label}: " if label else ""
    if name in run.train:
        steps, values, _ = run.train[name]
        ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.5, label=f"{prefix}train")
    if name in run.validation:
        steps, values, intervals = run.validation[name]
        ax.plot(steps, values, color=colour, marker="o", markersize=3, label=f"{prefix}validation")
        if intervals is not None:
            ax.fill_between(
                steps, values - intervals, values + intervals, color=colour, alpha=0.2, linewidth=0
            )
    if name in run.test:
        mean, interval, _ = run.test[name]
        ax.errorbar(
            [run.steps], [mean], [interval], color=colour, marker="D", capsize=4, linestyle="",
            label=f"{prefix}test {mean:.4g}",
        )  # fmt: skip


def save_png(figure: Any, folder: pathlib.Path, name: str) -> bytes:
    """Save a figure in a folder; return its bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    disk.write(folder / f"{name.replace('/', '_')}.png", content.getvalue())
    return content.getvalue()
