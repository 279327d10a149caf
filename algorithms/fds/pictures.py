"""Pictures of a run of FDS: `FDS.pictures`, which `metalearn draw` saves in `pictures/`.

"schedules":
loss.png       the outer loss, and with `engine=forward` the largest tangent
NAME.png       a hyperparameter of several windows: its schedule over the inner run, one line per
               outer step, dark to bright, and the learned one, dashed; beside it, each window's
               value by outer step. A hyperparameter of one window: its value by outer step

"tangents", which show whether and where a hypergradient explodes:
tangents.png   |d theta_t / d lambda| in the next outer step, against the inner step t, one line
               per window; the largest and the last norm of each are in tangents.md

An outer step logs the schedule that it evaluated; the outer rule may have reverted the update, so
the learned schedule is a line of its own. A hyperparameter with too many windows to log each is
logged as its mean.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from metalearn import Forward, Tasks, Trainer
from metalearn.algorithms.fds.schedule import Schedule
from metalearn.algorithms.pictures import row_of_panels, scale
from metalearn.loggers import read_lines, unreadable
from metalearn.sharding.distributed import say
from metalearn.train_state import TrainState

TANGENT = "inner_tangent_norm"
LEARNED = {"baseline": None, "color": "black", "linewidth": 2.5, "linestyle": "--", "zorder": 3}


def draw_schedules(
    workdir: pathlib.Path, spaces: Mapping[str, str], learned: Mapping[str, Schedule]
) -> dict[str, Any]:
    """Draw the schedules of the run in a workdir: {name of a file: figure}."""
    figures = schedule_figures(read_steps(workdir), spaces, learned)
    return {f"{name}.png": figure for name, figure in figures.items()}


def draw_tangents(
    trainer: Trainer,
    state: TrainState,
    tasks: Tasks,
    workdir: pathlib.Path,
    begins: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Draw the tangents of the next outer step; `begins` has the first inner step of each window.

    Raises:
      ValueError: for segmented unrolls, or several processes.
    """
    if jax.process_count() > 1 or trainer.segment is not None:
        raise ValueError(
            "they take an outer step in one program of one process: `metalearn draw "
            f"--workdir={workdir}`, by itself."
        )
    lines, step = tangent_norms(trainer, state, tasks, begins), int(state.step) + 1
    table = "\n".join(tangent_table(lines, step)) + "\n"
    return {"tangents.png": tangent_figure(lines, step), "tangents.md": table}


def read_steps(workdir: pathlib.Path) -> list[dict[str, Any]]:
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


def logged_values(
    rows: Sequence[Mapping[str, Any]], names: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the hyperparameters' values by outer step, {name: [outer steps, windows]}."""
    windows_of: dict[str, list[str]] = {}
    for key in rows[0]:
        name, _, window = key.rpartition("/")
        if name in names:
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


def ends(
    learned: Mapping[str, Schedule], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the edges of windows, in shares of the inner run: {name: [windows + 1]}.

    If the number of logged windows differs from that of the schedule, they are drawn equal.
    """
    equal = {name: np.linspace(0, 1, each.shape[1] + 1) for name, each in values.items()}
    own = {name: np.asarray(learned[name].edges) / learned[name].horizon for name in values}
    return {name: own[name] if len(own[name]) == len(equal[name]) else equal[name] for name in own}


def schedule_figures(
    rows: Sequence[Mapping[str, Any]], spaces: Mapping[str, str], learned: Mapping[str, Schedule]
) -> dict[str, Any]:
    """Draw the rows that `read_steps` returns: {"loss", or name of a hyperparameter: figure}.

    Args:
      rows: of the outer steps.
      spaces: the space of each hyperparameter, such as "log".
      learned: `FDS.schedules(eta)` of the current state, as `metalearn export` writes them.
    """
    steps, values = [row["step"] for row in rows], logged_values(rows, spaces)
    edges, drawn = ends(learned, values), {"loss": _losses(rows)}
    for name, each in values.items():
        yscale = "log" if spaces[name] == "log" else scale(each)
        windows = max(each.shape[1], len(learned[name].values))
        figure, axes = row_of_panels(2 if windows > 1 else 1)
        if each.shape[1] > 1:
            _over_the_run(steps, each, edges[name], figure, axes[0])
        if windows > 1:
            _learned(learned[name], axes[0])
        _by_outer_step(steps, each, axes[-1])
        for ax in axes:
            ax.set(ylabel=name, yscale=yscale)
        drawn[name] = figure
    return drawn


def _losses(rows: Sequence[Mapping[str, Any]]) -> Any:
    labels = {"loss": "outer loss", TANGENT: "largest tangent's norm at the end"}
    labels = {name: label for name, label in labels.items() if name in rows[0]}
    figure, axes = row_of_panels(len(labels))
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = [_value(row, name) for row in rows]
        _line(ax, [row["step"] for row in rows], values)
        ax.set(ylabel=label, yscale=scale(values))
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


def tangent_norms(
    trainer: Trainer, state: TrainState, tasks: Tasks, begins: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the norm after each inner step, {"name/window": [T]}; zero before a window begins.

    The hypergradient of the next outer step is computed by forward mode. Tangents are with respect
    to the coordinates of eta, so that of a learning rate in log space is for a relative change.
    """
    names = [
        (begin, f"{name}/{window}")
        for name in sorted(state.eta)  # the order of its leaves
        for window, begin in enumerate(begins[name])
        for _ in range(state.eta[name][window].size)
    ]
    engine = trainer.engine if isinstance(trainer.engine, Forward) else Forward()
    exact = dataclasses.replace(engine, directions=None, inexact_decay=1.0)
    forward = dataclasses.replace(trainer, engine=exact)
    tangent_norms = forward.look(state.eta, tasks, forward.task_keys(state)[0]).inner.tangent_norm
    in_order = sorted(names, key=lambda pair: pair[0])  # by first step; stable
    return {
        name: line
        for (_, name), line in zip(in_order, np.asarray(tangent_norms, float).T, strict=False)
    }


def tangent_figure(lines: dict[str, np.ndarray], step: int) -> Any:
    """Return a figure with a panel per hyperparameter and a line per window."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.rpartition("/")[0] for line in sorted(lines)))
    drawn = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    drawn.suptitle(f"outer step {step}")
    axes = drawn.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, names, strict=True):
        for line, values in sorted(lines.items()):
            if line.rpartition("/")[0] == name:
                positive = np.where(np.isfinite(values) & (values > 0), values, np.nan)
                ax.plot(np.arange(1, len(positive) + 1), positive, label=line.rpartition("/")[2])
        ax.set(xlabel="inner step", yscale="log", title=name)
        ax.legend(title="window", fontsize="small")
    axes[0].set_ylabel("norm of the tangent")
    return drawn


def tangent_table(lines: dict[str, Any], step: int) -> list[str]:
    """Return a Markdown table: the largest norm of each line, its inner step, and the last norm."""
    rows = [f"Outer step {step}:", ""]
    rows += ["| tangent of | largest norm | at inner step | last norm |", "|---" * 4 + "|"]
    for name, values in sorted(lines.items()):
        at = int(np.argmax(np.where(np.isnan(values), np.inf, values)))
        rows.append(f"| {name} | {values[at]:.3g} | {at + 1} | {values[-1]:.3g} |")
    return rows
