"""The schedules that a run of FDS tried and learned, and its outer loss, outer step by outer step.

An outer step logs what it tried; the rule may have gone back from it, so what was learned is a line
of its own. Hyperparameters of more windows than are logged one by one were logged as their mean.
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
ORDERS = 30.0  # a positive quantity that spans more than this factor is drawn on a log scale
LEARNED = {"baseline": None, "color": "black", "linewidth": 2.5, "linestyle": "--", "zorder": 3}


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the logged outer steps, in order, evaluations left out.

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


def tried(rows: Sequence[Mapping[str, Any]], algorithm: FDS) -> dict[str, np.ndarray]:
    """Return the hyperparameters' values by outer step, {name: [outer steps, windows]}."""
    found: dict[str, list[str]] = {}
    for key in rows[0]:
        name, _, window = key.rpartition("/")
        if name in algorithm.hyperparameters:
            found.setdefault(name, []).append(window)
    return {
        name: np.asarray([[_value(row, f"{name}/{w}") for w in _in_order(windows)] for row in rows])
        for name, windows in found.items()
    }


def _value(row: Mapping[str, Any], name: str) -> float:
    """Return a logged value; NaN where another config of the run did not log it."""
    return row.get(name, math.nan)


def _in_order(windows: Sequence[str]) -> list[str]:
    return sorted(windows, key=lambda window: int(window) if window.isdigit() else 0)


def ends(algorithm: FDS, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return where windows begin and end, in shares of the inner run: {name: [windows + 1]}.

    Where others were logged than the algorithm has now, they are taken to be equal.
    """
    equal = {name: np.linspace(0, 1, each.shape[1] + 1) for name, each in values.items()}
    ours = {name: algorithm.edges(name) / algorithm.inner_steps for name in values}
    return {
        name: ours[name] if len(ours[name]) == len(equal[name]) else equal[name] for name in ours
    }


def figures(
    rows: Sequence[Mapping[str, Any]], algorithm: FDS, learned: Mapping[str, Schedule]
) -> dict[str, Any]:
    """Draw the rows that `read` returns: {"loss", or name of a hyperparameter: figure}.

    Args:
      rows: of the outer steps.
      algorithm: of the run.
      learned: `algorithm.schedules(eta)` where the run stands, as `metalearn export` writes them.
    """
    steps, values = [row["step"] for row in rows], tried(rows, algorithm)
    cuts, found = ends(algorithm, values), {"loss": _losses(rows)}
    for name, each in values.items():
        # As it was learned; elsewhere by what was logged.
        scale = "log" if algorithm.hyperparameters[name].space == "log" else _scale(each)
        windows = max(each.shape[1], len(learned[name].values))
        figure, places = _figure(2 if windows > 1 else 1)
        if each.shape[1] > 1:
            _over_the_run(steps, each, cuts[name], figure, places[0])
        if windows > 1:
            _learned(learned[name], places[0])
        _by_outer_step(steps, each, places[-1])
        for place in places:
            place.set(ylabel=name, yscale=scale)
        found[name] = figure
    return found


def _losses(rows: Sequence[Mapping[str, Any]]) -> Any:
    shown = {"loss": "outer loss", TANGENT: "largest tangent's norm at the end"}
    kept = {name: label for name, label in shown.items() if name in rows[0]}
    figure, places = _figure(len(kept))
    for place, (name, label) in zip(places, kept.items(), strict=True):
        values = [_value(row, name) for row in rows]
        _line(place, [row["step"] for row in rows], values)
        place.set(ylabel=label, yscale=_scale(values))
    return figure


def _over_the_run(
    steps: Sequence[int], values: np.ndarray, cut: np.ndarray, figure: Any, place: Any
) -> None:
    """Draw what each outer step tried, over the inner run."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colours = ScalarMappable(Normalize(min(steps), max(steps)), colormaps["viridis"])
    for colour, each in zip(colours.to_rgba(np.asarray(steps)), values, strict=True):
        place.stairs(each, cut, baseline=None, color=colour, linewidth=1.5)
    figure.colorbar(colours, ax=place, label="outer step", ticks=MaxNLocator(integer=True))


def _learned(schedule: Schedule, place: Any) -> None:
    """Draw what was learned, over the inner run; of values by class, their mean."""
    values = np.asarray(schedule.values).reshape(len(schedule.values), -1).mean(1)
    place.stairs(values, np.asarray(schedule.edges) / schedule.horizon, label="learned", **LEARNED)
    place.set(xlabel="share of the inner run")
    place.legend(fontsize="small")


def _by_outer_step(steps: Sequence[int], values: np.ndarray, place: Any) -> None:
    """Draw a line for each window, later ones thinner: equal values hide no line."""
    windows = values.shape[1]
    for window in range(windows):
        width = 1 + 3 * (1 - (window + 1) / windows)
        _line(place, steps, values[:, window], linewidth=width, label=f"{window}")
    if windows > 1:
        place.legend(title="window", fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def _line(place: Any, steps: Sequence[int], values: Any, **options: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    place.plot(steps, values, marker="o", markersize=3, **options)
    place.set(xlabel="outer step")
    place.xaxis.set_major_locator(MaxNLocator(integer=True))


def _scale(values: Any) -> str:
    """Return "log" for positive numbers that span orders of magnitude; what is not finite aside."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > ORDERS * finite.min()
    return "log" if wide else "linear"


def _figure(places: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * places, 4), layout="constrained")
    return figure, figure.subplots(1, places, squeeze=False)[0]
