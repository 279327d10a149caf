"""Pictures of what a run of FDS learned, outer step by outer step.

    metalearn train --config=fds_digits --workdir=runs/fds
    python -m metalearn.experiments.benchmarks.schedules runs/fds

Reads runs/fds/metrics.jsonl and draws into runs/fds/pictures:

    loss.png        the outer loss, and the largest tangent where `engine=forward` pushed any
    NAME.png        a hyperparameter of several windows: its schedule over the inner run, one line
                    per outer step, dark to bright; beside it, each window's value by outer step
    NAME.png        one of a single window: its value by outer step

Where windows begin and end is read from the run's checkpoint; without one they are taken to be
equal. Hyperparameters of more windows than are logged one by one show as their mean. Needs
matplotlib: pip install "metalearn[plots]".
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metalearn.algorithms.windows import edges
from metalearn.checkpoint import Checkpoints

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


def learned(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the hyperparameters' values by outer step, {name: [outer steps, windows]}."""
    pairs = [key.rsplit("/", 1) for key in rows[0] if "/" in key and not key.startswith("eval/")]
    found: dict[str, list[str]] = {}
    for name, window in pairs:
        found.setdefault(name, []).append(window)
    return {
        name: np.asarray([[row[f"{name}/{w}"] for w in _in_order(windows)] for row in rows])
        for name, windows in found.items()
    }


def _in_order(windows: Sequence[str]) -> list[str]:
    return sorted(windows, key=lambda window: int(window) if window.isdigit() else 0)


def ends(workdir: pathlib.Path, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return where windows begin and end, in shares of the inner run: {name: [windows + 1]}."""
    found = {name: np.linspace(0, 1, each.shape[1] + 1) for name, each in values.items()}
    config = _config(workdir)
    if config is None:
        return found
    horizon = config["horizon"]
    for name, chosen in config["hyperparameters"].items():
        windows = chosen.get("windows") or 1
        cut = edges(tuple(windows) if isinstance(windows, list) else windows, horizon)
        if name in found and len(cut) == len(found[name]):
            found[name] = cut / horizon
    return found


def _config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Return the algorithm's part of the config in the newest checkpoint; None without one."""
    if not (workdir / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(workdir / "checkpoints")
    record = checkpoints.record()
    checkpoints.close()
    return None if record is None else record["config"]["algorithm"]


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draw everything, into `workdir`/pictures; return the files. Needs matplotlib."""
    rows = read(workdir)
    out = workdir / "pictures"
    out.mkdir(exist_ok=True)
    steps, values = [row["step"] for row in rows], learned(rows)
    cuts = ends(workdir, values)
    paths = [_losses(rows, out / "loss.png")]
    for name, each in values.items():
        path = out / f"{name}.png"
        paths.append(path)
        if each.shape[1] == 1:
            _single(name, steps, each[:, 0], path)
        else:
            _windows(name, steps, each, cuts[name], path)
    return paths


def _losses(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> pathlib.Path:
    shown = {"loss": "outer loss", TANGENT: "largest tangent's norm at the end"}
    kept = {name: label for name, label in shown.items() if name in rows[0]}
    figure, places = _figure(len(kept))
    for place, (name, label) in zip(places, kept.items(), strict=True):
        _line(place, [row["step"] for row in rows], [row[name] for row in rows], label)
    figure.savefig(path, dpi=120)
    return path


def _single(name: str, steps: Sequence[int], values: np.ndarray, path: pathlib.Path) -> None:
    figure, (place,) = _figure(1)
    _line(place, steps, values, name)
    figure.savefig(path, dpi=120)


def _windows(
    name: str, steps: Sequence[int], values: np.ndarray, cut: np.ndarray, path: pathlib.Path
) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, (left, right) = _figure(2)
    colours = ScalarMappable(Normalize(min(steps), max(steps)), colormaps["viridis"])
    for colour, each in zip(colours.to_rgba(np.asarray(steps)), values, strict=True):
        left.stairs(each, cut, baseline=None, color=colour, linewidth=1.5)
    figure.colorbar(colours, ax=left, label="outer step")
    left.set(xlabel="share of the inner run", ylabel=name, yscale=_scale(values))
    for window in range(values.shape[1]):
        _line(right, steps, values[:, window], name, label=f"window {window}")
    right.set_yscale(_scale(values))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _line(place: Any, steps: Sequence[int], values: Any, name: str, **options: Any) -> None:
    place.plot(steps, values, marker="o", markersize=3, **options)
    place.set(xlabel="outer step", ylabel=name, yscale=_scale(values))


def _scale(values: Any) -> str:
    """Return "log" for positive numbers that span orders of magnitude; what is not finite aside."""
    finite = np.asarray(values, float)[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > ORDERS * finite.min()
    return "log" if wide else "linear"


def _figure(places: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * places, 4), layout="constrained")
    return figure, figure.subplots(1, places, squeeze=False)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and print where to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path, help="of `metalearn train`")
    for path in draw(parser.parse_args(argv).workdir):
        print(path)


if __name__ == "__main__":
    main()
