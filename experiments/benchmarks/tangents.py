"""The norm of the tangents along a trajectory: whether a hypergradient explodes, and where.

    metalearn train --config=fds_digits --workdir=runs/fds
    python -m metalearn.experiments.benchmarks.tangents runs/fds

Takes the hypergradient of the next outer step of a run of FDS once more, by forward mode, and
draws |d theta_t / d lambda| against the inner step t, a line for each window of each
hyperparameter, from where the window begins: runs/fds/pictures/tangents.png. Coordinates are
those of eta, so that of a learning rate in log space is a relative change. Prints the largest
norm of each line and the last. Needs matplotlib: pip install "metalearn[plots]".
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from metalearn import Forward
from metalearn.algorithms import FDS
from metalearn.experiments import run


def norms(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the norms along the trajectory, {"name/window": [T]}, zero before a window begins.

    Raises:
      ValueError: if the run learned no schedules.
    """
    found = run.restore(workdir)
    algorithm = found.trainer.algorithm
    if not isinstance(algorithm, FDS):
        raise ValueError(
            f"The run in {workdir} learned no schedules: its algorithm is "
            f"{type(algorithm).__name__}, and pictures of tangents are of FDS."
        )
    names = [
        (begin, f"{name}/{window}")
        for name in sorted(found.state.eta)  # the order of its leaves
        for window, begin in enumerate(algorithm.edges(name)[:-1])
        for _ in range(found.state.eta[name][window].size)
    ]
    trainer = dataclasses.replace(found.trainer, engine=Forward(), segment=None)
    key = trainer.task_keys(found.state)[0]
    seen = trainer.look(found.state.eta, found.splits.train, key).inner.tangent_norm
    in_order = sorted(names, key=lambda pair: pair[0])  # as they come into play; stable
    return {
        name: line for (_, name), line in zip(in_order, np.asarray(seen, float).T, strict=False)
    }


def draw(lines: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draw a panel for each hyperparameter, a line for each window."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line.rpartition("/")[0] for line in sorted(lines)))
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    places = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for place, name in zip(places, names, strict=True):
        for line, values in sorted(lines.items()):
            if line.rpartition("/")[0] == name:
                shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
                place.plot(np.arange(1, len(shown) + 1), shown, label=line.rpartition("/")[2])
        place.set(xlabel="inner step", yscale="log", title=name)
        place.legend(title="window", fontsize="small")
    places[0].set_ylabel("norm of the tangent")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def table(lines: dict[str, Any]) -> list[str]:
    """Return a Markdown table: the largest norm of each line, where it is, and the last."""
    rows = ["| tangent of | largest norm | at inner step | last norm |", "|---" * 4 + "|"]
    for name, values in sorted(lines.items()):
        at = int(np.argmax(np.where(np.isnan(values), np.inf, values)))
        rows.append(f"| {name} | {values[at]:.3g} | {at + 1} | {values[-1]:.3g} |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and print the table and where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path, help="of `metalearn train`")
    workdir = parser.parse_args(argv).workdir
    lines = norms(workdir)
    path = workdir / "pictures" / "tangents.png"
    draw(lines, path)
    print("\n".join([*table(lines), "", str(path)]))


if __name__ == "__main__":
    main()
