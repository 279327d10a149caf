"""Figures of a sweep, by matplotlib: how its trials fared, and which parameters mattered.

history      the value of each trial in the order they began, and the best so far
evaluations  the metric by outer step of every trial; grey: those that were not trained to their end
by_parameter the value by a parameter
parallel     every trial as a line through its parameters to its value
importance   how much of the spread of good trials each parameter explains, by Optuna
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.algorithms.pictures import row_of_panels, scale
from metalearn.experiments.sweep.space import Parameter

PRUNED = "0.7"  # grey
COLOURS = "viridis"


class TrialLog(NamedTuple):
    """A trial as its figures need it.

    Args:
      number: of the trial, from 0.
      ended: "done", "pruned", "diverged", "failed" or "running".
      value: of the metric, its last; NaN where there is none.
      params: of the config, by key.
      steps: outer steps of its evaluations.
      values: of the metric at those.
    """

    number: int
    ended: str
    value: float
    params: Mapping[str, Any]
    steps: Sequence[int]
    values: Sequence[float]


def history(trials: Sequence[TrialLog], metric: str, direction: str) -> Any:
    """Draw the value of each trial by its number, and the best so far."""
    figure, (ax,) = row_of_panels(1)
    best = np.maximum if direction == "max" else np.minimum
    done = [trial for trial in trials if trial.ended == "done"]
    stopped = [t for t in trials if t.ended != "done" and math.isfinite(t.value)]
    if stopped:
        at = [trial.number for trial in stopped], [trial.value for trial in stopped]
        ax.plot(*at, "x", color=PRUNED, label="pruned or diverged, at its last evaluation")
    if done:
        numbers, values = [trial.number for trial in done], [trial.value for trial in done]
        ax.plot(numbers, values, "o", color="C0", label="done")
        ax.step(numbers, best.accumulate(values), color="C3", where="post", label="best so far")
    ax.set(xlabel="trial", ylabel=metric, yscale=scale(_values([*done, *stopped])))
    _finish(ax)
    return figure


def evaluations(trials: Sequence[TrialLog], metric: str, best: int | None) -> Any:
    """Draw the metric of each trial by outer step; the best trial is the thick line."""
    figure, (ax,) = row_of_panels(1)
    for trial in sorted(trials, key=lambda trial: trial.number == best):  # the best on top
        colour = "C3" if trial.number == best else "C0" if trial.ended == "done" else PRUNED
        width = 2.5 if trial.number == best else 0.9
        label = f"trial {trial.number:03d}, the best" if trial.number == best else None
        marker = {"marker": "o", "markersize": 3}
        ax.plot(trial.steps, trial.values, color=colour, linewidth=width, label=label, **marker)
    values = [value for trial in trials for value in trial.values]
    ax.set(xlabel="outer step", ylabel=metric, yscale=scale(values))
    _finish(ax)
    return figure


def by_parameter(trials: Sequence[TrialLog], each: Parameter, metric: str) -> Any:
    """Draw the value of trials by one of their parameters, over its whole range."""
    figure, (ax,) = row_of_panels(1)
    shown = []
    for ended, colour, marker in (("pruned", PRUNED, "x"), ("done", "C0", "o")):
        some = [trial for trial in trials if trial.ended == ended]
        at, values = [_place(each, trial.params[each.key]) for trial in some], _values(some)
        ax.plot(at, values, marker, color=colour, label=ended if some else None)
        shown += values
    if each.choices:
        ax.set_xticks(range(len(each.choices)), each.choices)
        ax.set_xlim(-0.5, len(each.choices) - 0.5)
    else:
        ax.set_xscale("log" if each.kind == "log" else "linear")
        ax.set_xlim(each.low, each.high)
        ax.margins(x=0.05)
    ax.set(xlabel=each.key, ylabel=metric, yscale=scale(shown))
    ax.grid(alpha=0.3)
    if shown:
        ax.legend(fontsize="small")
    return figure


def parallel(
    trials: Sequence[TrialLog], space: Sequence[Parameter], metric: str, direction: str
) -> Any:
    """Draw each trial that is done as a line through its parameters, coloured by its value."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    done = [trial for trial in trials if trial.ended == "done"]
    values = np.asarray([trial.value for trial in done])
    low, high = float(values.min()), float(values.max())
    shades = (values - low) / ((high - low) or 1.0)
    quality = shades if direction == "max" else 1 - shades
    figure = Figure(figsize=(max(5.5, 1.8 + 1.8 * len(space)), 4), layout="constrained")
    ax = figure.subplots()
    for i in np.argsort(quality):  # the best on top
        heights = [_height(each, done[i].params[each.key]) for each in space]
        colour = colormaps[COLOURS](quality[i])
        ax.plot([*heights, shades[i]], color=colour, linewidth=1 + 1.5 * quality[i])
    for place, each in enumerate(space):
        ax.axvline(place, color="0.3", linewidth=0.8)
        for height, text in _labels(each):
            ax.annotate(text, (place, height), xytext=(3, 0), textcoords="offset points", size=8)
    ax.axvline(len(space), color="0.3", linewidth=0.8)
    for height, value in ((0.0, low), (1.0, high)):
        ax.annotate(
            f"{value:.4g}", (len(space), height), xytext=(3, 0), textcoords="offset points", size=8
        )
    names = [each.key.rpartition(".")[2] for each in space]
    ax.set(xlim=(-0.2, len(space) + 0.5), yticks=[])
    ax.set_xticks(range(len(space) + 1), [*names, metric])
    ax.spines[["top", "left", "right", "bottom"]].set_visible(False)
    return figure


def importance(shares: Mapping[str, float]) -> Any:
    """Draw the importance of parameters, the largest on top."""
    figure, (ax,) = row_of_panels(1)
    keys = sorted(shares, key=lambda key: shares[key])
    ax.barh(keys, [shares[key] for key in keys], color="C0")
    ax.set(xlabel="importance", xlim=(0, 1))
    ax.grid(alpha=0.3, axis="x")
    return figure


def _finish(ax: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")


def _values(trials: Sequence[TrialLog]) -> list[float]:
    return [trial.value for trial in trials]


def _place(each: Parameter, value: Any) -> float:
    """Return where a value is on an axis: choices are numbered."""
    return each.choices.index(value) if each.choices else float(value)


def _height(each: Parameter, value: Any) -> float:
    """Return where a value is in its range, from 0 to 1."""
    if each.choices:
        return each.choices.index(value) / max(len(each.choices) - 1, 1)
    if each.kind == "log":
        return math.log(value / each.low) / math.log(each.high / each.low)
    return (value - each.low) / (each.high - each.low)


def _labels(each: Parameter) -> list[tuple[float, str]]:
    """Return the labels along the axis of a parameter: (height, text)."""
    if each.choices:
        return [(_height(each, choice), choice) for choice in each.choices]
    return [(0.0, f"{each.low:g}"), (1.0, f"{each.high:g}")]
