"""Pictures of the results of `benchmarks.tuners`: regret against cost, a line for each tuner.

    python -m metalearn.experiments.benchmarks.regret runs/tuners [--wandb auto]

Regret is the test loss of the incumbent at a cost, minus the lowest of its box; the mean over
seeds, of each its last incumbent up to this cost, or its first one. Logarithmic axes; diverged runs
are drawn at the top. With --wandb, a W&B run shows the pictures.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from metalearn.loggers import WandbLogger

TOP = 10.0  # regret from which on all are alike
FLOOR = 1e-3
COLOURS = 10  # after which those of matplotlib begin again


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of tuners.csv."""
    with (folder / "tuners.csv").open(newline="") as file:
        numbers = ("spent", "loss")
        return [row | {key: float(row[key]) for key in numbers} for row in csv.DictReader(file)]


def lines(rows: Sequence[dict[str, Any]], box: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {tuner: (costs, mean regret)}; runs of one tuner at several budgets are one line."""
    ours = [row for row in rows if row["box"] == box]
    least = min(row["loss"] for row in ours)
    by_tuner = {}
    for name in dict.fromkeys(row["tuner"].strip() for row in ours):
        mine = [row for row in ours if row["tuner"].strip() == name]
        costs = np.array(sorted({row["spent"] for row in mine}))
        regrets = [[_at(mine, seed, cost) for cost in costs] for seed in _seeds(mine)]
        by_tuner[name] = costs, np.clip(np.nanmean(np.array(regrets) - least, 0), FLOOR, TOP)
    return by_tuner


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw each box of a folder's tuners.csv as a PNG beside it. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows, written = read(folder), []
    for box in dict.fromkeys(row["box"] for row in rows):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, (name, (costs, regret)) in enumerate(lines(rows, box).items()):
            dashes = "-" if number < COLOURS else "--"
            axes.plot(costs, regret, dashes, marker=".", label=name, lw=3 if name == "FDS" else 1)
        axes.set(xscale="log", yscale="log", xlabel="cost, in ten hypergradients")
        axes.set(ylabel="regret in test loss", title=f"box: {box}")
        axes.legend(fontsize=7)
        written.append(folder / f"regret_{box}.png")
        figure.savefig(written[-1], dpi=100)
    return written


def _seeds(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({row["seed"] for row in rows})


def _at(rows: Sequence[dict[str, Any]], seed: str, cost: float) -> float:
    """Return the loss of a seed's last incumbent up to a cost, or else of its first."""
    mine = sorted((r for r in rows if r["seed"] == seed), key=lambda row: row["spent"])
    before = [row for row in mine if row["spent"] <= cost] or mine[:1]
    return min(before[-1]["loss"], 1e3)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, print the names of the files, and log them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="that `benchmarks.tuners` wrote")
    parser.add_argument("--wandb", choices=("auto", "online", "offline"), help="log them, too")
    options = parser.parse_args(argv)
    drawn = draw(options.folder)
    print("\n".join(map(str, drawn)))
    if options.wandb is None:
        return
    logger = WandbLogger(mode=options.wandb, name="regret", directory=options.folder)
    logger.start(0, {}, {})
    logger.show({path.stem: path for path in drawn})
    logger.finish()


if __name__ == "__main__":
    main()
