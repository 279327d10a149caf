"""The schedules that a run of FDS went through, and its outer loss, outer step by outer step.

Hyperparameters of more windows than are logged one by one show as their mean.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metalearn.algorithms import FDS

TANGENT = "inner_tangent_norm"
ORDERS = 30.0  # a positive quantity that spans more than this factor is drawn on a log scale


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the logged outer steps, in order, evaluations left out.

    Raises:
      ValueError: if nothing was logged there.
    """
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    if not rows:
        raise ValueError(
            f"There are no outer steps in {path}. Train a run there first: `metalearn train "
            f"--config=fds_digits --workdir={workdir}`."
        )
    return rows


def learned(rows: Sequence[Mapping[str, Any]], algorithm: FDS) -> dict[str, np.ndarray]:
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
    ours = {name: algorithm.edges(name) / algorithm.horizon for name in values}
    return {
        name: ours[name] if len(ours[name]) == len(equal[name]) else equal[name] for name in ours
    }


def draw(
    rows: Sequence[Mapping[str, Any]], algorithm: FDS, out: pathlib.Path
) -> list[pathlib.Path]:
    """Draw the rows that `read` returns into a folder; return the files."""
    steps, values = [row["step"] for row in rows], learned(rows, algorithm)
    cuts = ends(algorithm, values)
    paths = [_losses(rows, out / "loss.png")]
    for name, each in values.items():
        # As it was learned; elsewhere by what was logged.
        scale = "log" if algorithm.hyperparameters[name].space == "log" else _scale(each)
        label = {"ylabel": name, "yscale": scale}
        path = out / f"{name}.png"
        paths.append(path)
        if each.shape[1] == 1:
            _single(steps, each[:, 0], path, label)
        else:
            _windows(steps, each, cuts[name], path, label)
    return paths


def _losses(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> pathlib.Path:
    shown = {"loss": "outer loss", TANGENT: "largest tangent's norm at the end"}
    kept = {name: label for name, label in shown.items() if name in rows[0]}
    figure, places = _figure(len(kept))
    for place, (name, label) in zip(places, kept.items(), strict=True):
        values = [_value(row, name) for row in rows]
        _line(place, [row["step"] for row in rows], values)
        place.set(ylabel=label, yscale=_scale(values))
    figure.savefig(path, dpi=120)
    return path


def _single(
    steps: Sequence[int], values: np.ndarray, path: pathlib.Path, label: Mapping[str, str]
) -> None:
    figure, (place,) = _figure(1)
    _line(place, steps, values)
    place.set(**label)
    figure.savefig(path, dpi=120)


def _windows(
    steps: Sequence[int],
    values: np.ndarray,
    cut: np.ndarray,
    path: pathlib.Path,
    label: Mapping[str, str],
) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, (left, right) = _figure(2)
    colours = ScalarMappable(Normalize(min(steps), max(steps)), colormaps["viridis"])
    for colour, each in zip(colours.to_rgba(np.asarray(steps)), values, strict=True):
        left.stairs(each, cut, baseline=None, color=colour, linewidth=1.5)
    figure.colorbar(colours, ax=left, label="outer step")
    left.set(xlabel="share of the inner run", **label)
    for window in range(values.shape[1]):
        _line(right, steps, values[:, window], label=f"window {window}")
    right.set(**label)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _line(place: Any, steps: Sequence[int], values: Any, **options: Any) -> None:
    place.plot(steps, values, marker="o", markersize=3, **options)
    place.set(xlabel="outer step")


def _scale(values: Any) -> str:
    """Return "log" for positive numbers that span orders of magnitude; what is not finite aside."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > ORDERS * finite.min()
    return "log" if wide else "linear"


def _figure(places: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * places, 4), layout="constrained")
    return figure, figure.subplots(1, places, squeeze=False)[0]
