"""Pictures of the schedules that a run of FDS evaluated and learned, and of its outer loss.

An outer step logs the schedule that it evaluated; the outer rule may have reverted the update, so
the learned schedule is a line of its own. A hyperparameter with too many windows to log each is
logged as its mean.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metalearn.algorithms import FDS, Schedule
from metalearn.loggers import read_lines, unreadable
from metalearn.sharding.distributed import say

TANGENT = "inner_tangent_norm"
LOG_RATIO = 30.0  # positive values with a larger ratio are drawn on a log scale
LEARNED = {"baseline": None, "color": "black", "linewidth": 2.5, "linestyle": "--", "zorder": 3}


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the logged outer steps, in order, without evaluations.

    Raises:
      ValueError: if nothing was logged there.
    """
    path = workdir / "metrics.jsonl"
    lines = read_lines(path)
    if bad := [line for line in lines if line.row is None]:
        say(f"{unreadable(path, bad)}: drawn without.")
    rows = [line.row for line in lines if line.row and "loss" in line.row]
    if not rows:
        raise ValueError(
            f"There are no outer steps in {path}. Train a run there first: `metalearn train "
            f"--config=fds_digits --workdir={workdir}`."
        )
    return rows


def logged_values(rows: Sequence[Mapping[str, Any]], algorithm: FDS) -> dict[str, np.ndarray]:
    """Return the hyperparameters' values by outer step, {name: [outer steps, windows]}."""
    windows_of: dict[str, list[str]] = {}
    for key in rows[0]:
        name, _, window = key.rpartition("/")
        if name in algorithm.hyperparameters:
            windows_of.setdefault(name, []).append(window)
    return {
        name: np.asarray([[_value(row, f"{name}/{w}") for w in _in_order(windows)] for row in rows])
        for name, windows in windows_of.items()
    }


def _value(row: Mapping[str, Any], name: str) -> float:
    """Return a logged value; NaN if it was not logged, as under another config."""
    return row.get(name, math.nan)


def _in_order(windows: Sequence[str]) -> list[str]:
    return sorted(windows, key=lambda window: int(window) if window.isdigit() else 0)


def ends(algorithm: FDS, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the edges of windows, in shares of the inner run: {name: [windows + 1]}.

    If the number of logged windows differs from that of the algorithm, they are drawn equal.
    """
    equal = {name: np.linspace(0, 1, each.shape[1] + 1) for name, each in values.items()}
    own = {name: algorithm.edges(name) / algorithm.inner_steps for name in values}
    return {name: own[name] if len(own[name]) == len(equal[name]) else equal[name] for name in own}


def figures(
    rows: Sequence[Mapping[str, Any]], algorithm: FDS, learned: Mapping[str, Schedule]
) -> dict[str, Any]:
    """Draw the rows that `read` returns: {"loss", or name of a hyperparameter: figure}.

    Args:
      rows: of the outer steps.
      algorithm: of the run.
      learned: `algorithm.schedules(eta)` of the current state, as `metalearn export` writes them.
    """
    steps, values = [row["step"] for row in rows], logged_values(rows, algorithm)
    edges, drawn = ends(algorithm, values), {"loss": _losses(rows)}
    for name, each in values.items():
        scale = "log" if algorithm.hyperparameters[name].space == "log" else _scale(each)
        windows = max(each.shape[1], len(learned[name].values))
        figure, axes = _figure(2 if windows > 1 else 1)
        if each.shape[1] > 1:
            _over_the_run(steps, each, edges[name], figure, axes[0])
        if windows > 1:
            _learned(learned[name], axes[0])
        _by_outer_step(steps, each, axes[-1])
        for ax in axes:
            ax.set(ylabel=name, yscale=scale)
        drawn[name] = figure
    return drawn


def _losses(rows: Sequence[Mapping[str, Any]]) -> Any:
    labels = {"loss": "outer loss", TANGENT: "largest tangent's norm at the end"}
    labels = {name: label for name, label in labels.items() if name in rows[0]}
    figure, axes = _figure(len(labels))
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = [_value(row, name) for row in rows]
        _line(ax, [row["step"] for row in rows], values)
        ax.set(ylabel=label, yscale=_scale(values))
    return figure


def _over_the_run(
    steps: Sequence[int], values: np.ndarray, edges: np.ndarray, figure: Any, ax: Any
) -> None:
    """Draw the schedule of each outer step, over the inner run."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colours = ScalarMappable(Normalize(min(steps), max(steps)), colormaps["viridis"])
    for colour, each in zip(colours.to_rgba(np.asarray(steps)), values, strict=True):
        ax.stairs(each, edges, baseline=None, color=colour, linewidth=1.5)
    figure.colorbar(colours, ax=ax, label="outer step", ticks=MaxNLocator(integer=True))


def _learned(schedule: Schedule, ax: Any) -> None:
    """Draw the learned schedule over the inner run; of values by class, their mean."""
    values = np.asarray(schedule.values).reshape(len(schedule.values), -1).mean(1)
    ax.stairs(values, np.asarray(schedule.edges) / schedule.horizon, label="learned", **LEARNED)
    ax.set(xlabel="share of the inner run")
    ax.legend(fontsize="small")


def _by_outer_step(steps: Sequence[int], values: np.ndarray, ax: Any) -> None:
    """Draw a line per window, later ones thinner, so that equal values do not hide a line."""
    windows = values.shape[1]
    for window in range(windows):
        width = 1 + 3 * (1 - (window + 1) / windows)
        _line(ax, steps, values[:, window], linewidth=width, label=f"{window}")
    if windows > 1:
        ax.legend(title="window", fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def _line(ax: Any, steps: Sequence[int], values: Any, **options: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.plot(steps, values, marker="o", markersize=3, **options)
    ax.set(xlabel="outer step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale(values: Any) -> str:
    """Return "log" if the finite values are positive and span orders of magnitude."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > LOG_RATIO * finite.min()
    return "log" if wide else "linear"


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
