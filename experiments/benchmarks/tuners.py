"""FDS against other tuners: one training run, one budget, two kinds of ranges.

    python -m metalearn.experiments.benchmarks.tuners [--box raw log] [--seeds 5] [--out FOLDER]

scikit-learn's digits, an MLP 64-64-10 trained by SGD for T=1000 steps of 64 examples, 30% of the
training labels wrong: seven windows of the learning rate, momentum and weight decay are tuned.

    "raw"   a box that spans zero: learning rate and momentum in [-1, 1], weight decay in
            [-0.1, 0.1]; all start at 0
    "log"   learning rate in [1e-4, 1] and weight decay in [1e-5, 0.1] by their logarithm,
            momentum in (0, 1) by its logit; all start in the middle

More windows do not increase the cost of hypergradients in reverse or mixed flow, and are one more
dimension each for black-box tuners; so FDS learns all three hyperparameters in seven windows, and
for comparison in the 7+1+1 windows of the other tuners. Greedy and online hypergradients return a
value for each step.

Cost is in inner steps of plain training; "1x" is the cost of ten hypergradients, by FLOPs. Tuners
use only validation data; a seed splits the data into 1,300 for training and 497 for testing, draws
the wrong labels and all other random numbers. The score is the mean test loss of five runs on all
the training data with the tuned hyperparameters; then mean and 95% interval (t) over seeds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.algorithms import FDS, Hyperparameter, sgd, weighted_cross_entropy
from metalearn.datasets import HeldOut, Images, TrainingRuns, read_images, with_label_noise
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.tuners.black_box import BOHB, BayesianOptimization, Hyperband
from metalearn.experiments.tuners.fds import Hypergradients
from metalearn.experiments.tuners.fixed import Cosine, LearningRateFree, MetaRegularization
from metalearn.experiments.tuners.online import Online
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem
from metalearn.experiments.tuners.random_search import RandomSearch
from metalearn.models import Linen, linen_networks, train_flag

BOXES = {
    "raw": {
        "learning_rate": Hyperparameter(-1.0, 1.0, 0.0, windows=7),
        "momentum": Hyperparameter(-1.0, 1.0, 0.0),
        "weight_decay": Hyperparameter(-0.1, 0.1, 0.0),
    },
    "log": {
        "learning_rate": Hyperparameter(1e-4, 1.0, 1e-2, windows=7, space="log"),
        "momentum": Hyperparameter(0.0, 1.0, 0.5, space="logit"),
        "weight_decay": Hyperparameter(1e-5, 0.1, 1e-3, space="log"),
    },
}
STEPS = 10  # hypergradients of FDS: 1x
ALONE = 1e6  # a budget of a tuner that stops by itself


def _fds_rows(steps: int) -> Hypergradients:
    """Every hyperparameter in seven windows; chosen on the validation loss of seeds 20 to 27."""
    return Hypergradients(steps, share=0.05, tolerance=0.2, windows=7)


TUNERS: dict[str, tuple[Tuner, float]] = {  # and their budgets
    "FDS": (_fds_rows(STEPS), 1),
    "FDS ": (_fds_rows(2 * STEPS), 2),
    "FDS  ": (_fds_rows(4 * STEPS), 4),
    "FDS, windows 7+1+1": (Hypergradients(STEPS), 1),
    "FDS, windows 7+1+1 ": (Hypergradients(4 * STEPS), 4),
    "FDS, the paper's rule": (Hypergradients(STEPS, tolerance=None, annealed=False), 1),
    "HD (greedy), best of 5 rates": (Online(0.0), ALONE),
    "MARTHE, decay 0.99, best of 5": (Online(0.99), ALONE),
    "RTHO, best of 5 rates": (Online(1.0), ALONE),
    "random search": (RandomSearch(), 1),
    "random search ": (RandomSearch(), 16),
    "TPE": (BayesianOptimization(), 1),
    "TPE ": (BayesianOptimization(), 16),
    "Hyperband": (Hyperband(), 1),
    "Hyperband ": (Hyperband(), 16),
    "BOHB": (BOHB(), 1),
    "BOHB ": (BOHB(), 16),
    "cosine, best of 5 peaks": (Cosine(), ALONE),
    "Mechanic, annealed": (LearningRateFree("mechanic", annealed=True), ALONE),
    "Prodigy, annealed": (LearningRateFree("prodigy", annealed=True), ALONE),
    "Meta-Regularization, best of 3": (MetaRegularization(), ALONE),
}
POINTS = 8  # incumbents of a tuner that are tested
RUNS = 5  # on all the training data, over which a test loss is averaged


class Row(NamedTuple):
    """The incumbent of a tuner at one cost, a line of the CSV file.

    box: the kind of ranges.
    tuner: its name.
    seed: of the problem and the tuner.
    spent: the cost, in units of 1x.
    seconds: so far, with compilation for the first seed.
    loss: the test loss.
    accuracy: on the test set.
    last: whether it is the final incumbent.
    """

    box: str
    tuner: str
    seed: int
    spent: float
    seconds: float
    loss: float
    accuracy: float
    last: bool


def problem(box: str, seed: int, horizon: int = 1000) -> TuningProblem:
    """Return the tuning problem of a seed."""
    halves = [read_images("digits", split) for split in ("train", "test")]
    pixels, labels = (np.concatenate(pair) for pair in zip(*halves, strict=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    ours, theirs = (Images(pixels[rows], labels[rows]) for rows in (order[:1300], order[1300:]))
    noisy = with_label_noise(ours, 0.3, seed).labels
    runs = TrainingRuns.create(*ours, validation=400, training_targets=noisy)
    return TuningProblem(_fds(box, horizon), runs, HeldOut.create(ours.inputs, noisy, *theirs))


@functools.cache
def _fds(box: str, horizon: int) -> FDS:
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    model = Linen(linen_networks.MLP(10, (64,)), image, train_flag)
    return FDS(model, BOXES[box], horizon, 64, sgd, weighted_cross_entropy)


def along(name: str, box: str, seed: int, unit: float, horizon: int = 1000) -> list[Row]:
    """Run a tuner and test its incumbents at a few costs."""
    tuner, budget = TUNERS[name]
    tuned, key = problem(box, seed, horizon), key_of(seed)
    begun, incumbents = time.perf_counter(), []
    for point in tuner.tune(tuned, budget * unit, jax.random.fold_in(key, 0)):
        jax.block_until_ready(point.eta)
        incumbents.append((point, time.perf_counter() - begun))
    picked = sorted({round(i) for i in np.geomspace(1, len(incumbents), POINTS)})
    rows = []
    for i in picked:
        point, seconds = incumbents[i - 1]
        loss, accuracy = tested(tuned, point, jax.random.fold_in(key, 1))
        last = i == len(incumbents)
        rows.append(Row(box, name, seed, point.spent / unit, seconds, loss, accuracy, last))
    return rows


def tested(tuned: TuningProblem, incumbent: Incumbent, key: jax.Array) -> tuple[float, float]:
    """Return the mean test loss and accuracy of runs with an incumbent."""
    etas = jax.tree.map(lambda x: jnp.stack([x] * RUNS), incumbent.eta)
    score = tuned.tester(incumbent.algorithm)(etas, jax.random.split(key, RUNS))
    return float(score.loss.mean()), float(score.accuracy.mean())


def table(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table of the final incumbents."""
    lines = ["| box | tuner | cost | test loss | accuracy, % | seconds |", "|---" * 6 + "|"]
    for box, name in dict.fromkeys((row.box, row.tuner) for row in rows):
        ends = [row for row in rows if (row.box, row.tuner) == (box, name) and row.last]
        cost = np.mean([row.spent for row in ends])
        seconds = np.median([row.seconds for row in ends])
        loss = interval([row.loss for row in ends])
        accuracy = interval([100 * row.accuracy for row in ends], 1)
        lines.append(
            f"| {box} | {name.strip()} | {cost:.2g}x | {loss} | {accuracy} | {seconds:.0f} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run every tuner on every seed; write the CSV file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--box", nargs="+", choices=BOXES, default=list(BOXES))
    parser.add_argument("--tuner", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--horizon", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/tuners"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (options.out / "tuners.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for box in options.box:
            cost = problem(box, 0, options.horizon).charge(Hypergradients().engine)
            for name in options.tuner:
                for seed in range(options.seeds):
                    new = along(name, box, seed, STEPS * cost, options.horizon)
                    writer.writerows(new)
                    file.flush()
                    rows += new
                print(table(rows)[-1], flush=True)
            print(f"1x: {STEPS} hypergradients, {STEPS * cost / options.horizon:.1f} plain runs")
    print("\n".join(table(rows)))
    return rows


if __name__ == "__main__":
    main()
