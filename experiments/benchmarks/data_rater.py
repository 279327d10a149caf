"""What a filter of training data buys: DataRater against learned loss weights, on corrupted text.

    python -m metalearn.experiments.benchmarks.data_rater [--seeds=0,1,2,3,4] [--workdir=DIR]

Half of the pieces of tiny Shakespeare are corrupted, as in `loss_weights_shakespeare`. A rater is
meta-trained by `data_rater_shakespeare`, loss weights by `loss_weights_shakespeare`, both with one
seed. The training text is cut into windows side by side, the rater scores all of them, and a small
decoder is trained from scratch, for as many steps of as many windows each time:

    everything    on all windows
    rated         on the best half by the rater's scores
    weighted      on all windows, each loss times its weight as learned
    random half   on as many windows as `rated`, drawn at random
    clean         on the clean windows only: an oracle

A seed decides theta_0, which all arms share, the order of the windows, none of which is read twice,
and the random half. The loss is that of all windows of the held-out text, clean, in nats a byte:
the test split, or with --split=validation the text to choose settings by. Intervals are 95%,
Student's t over seeds of the final training; differences are paired. They do not include how much
meta-trainings differ (--meta-seed).

The AUC is the chance that a clean window has a higher score than a corrupted one: of any kind, of
windows in which bytes are replaced, and of those that repeat one byte. FLOPs are those of matrix
products in the compiled programs (`metalearn.cost`).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Episode
from metalearn._utils import strict_json
from metalearn.algorithms import (
    DataRater,
    DomainWeights,
    LossWeights,
    rate_examples,
    top_fraction,
)
from metalearn.algorithms.loss_weights.features import auc
from metalearn.checkpoints.manager import Checkpoints
from metalearn.cost import cost
from metalearn.datasets import Text
from metalearn.datasets.text import Windows
from metalearn.engines.inner_loop import rollout
from metalearn.experiments import build
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.build.datasets import build_corruption
from metalearn.experiments.configs import data_rater_shakespeare, loss_weights_shakespeare

ARMS = ("everything", "random half", "rated", "weighted", "clean")


class Learned(NamedTuple):
    """What a config has learned.

    Args:
      algorithm: of the config.
      eta: its meta-parameters.
      splits: the tasks of the config.
      flops: of the meta-training.
      seconds: likewise, compilation included; 0 where a finished run was read.
    """

    algorithm: Any
    eta: Any
    splits: Any
    flops: float
    seconds: float


def learn(config: Any, seed: int, folder: pathlib.Path) -> Learned:
    """Meta-train a config, or read what is in the folder."""
    plain = build.to_json(config)
    splits: Any = build.splits(plain["dataset"])
    trainer = build.trainer(plain, splits)
    began = time.perf_counter()
    state = trainer.fit(
        splits.train,
        plain["steps"],
        key=key_of(seed),
        progress=False,
        checkpoints=Checkpoints(folder, plain, plain["checkpoint_every"]),
    )
    seconds = time.perf_counter() - began
    flops = cost(trainer.step, state, splits.train).flops * plain["steps"]
    return Learned(trainer.algorithm, trainer.learned(state), splits, flops, seconds)


def side_by_side(tasks: Text) -> Windows:
    """Return the held-out text as windows, clean, leaves [m, ...]."""
    held_out = Text(
        tasks.held_out, tasks.held_out, None, tasks.length, *(1, 1, 1, 0), tasks.vocabulary
    )
    return held_out.windows()._replace(corrupted=None)


class FinalTraining:
    """The training of a decoder on some windows, and its held-out loss.

    Args:
      learned: the loss weights, and the model and inner optimizer of all arms.
      tasks: whose training text it reads, and whose held-out text judges; its number of steps.
    """

    def __init__(self, learned: Learned, tasks: Text):
        self.weights, self.tasks = learned, tasks
        self.windows: Any = tasks.windows()
        weighted = learned.algorithm
        equal = DomainWeights(tasks.sources)  # its scores stay zero, so its weights one
        self.uniform = LossWeights(weighted.model, equal, weighted.optimizer)
        self.query = jax.tree.map(jnp.asarray, side_by_side(tasks))
        self.run = jax.jit(_final_loss, static_argnums=0)

    def arguments(self, arm: str, rows: np.ndarray, seed: int) -> tuple[Any, ...]:
        """Return the arguments of `run` for an arm, which reads some of the windows."""
        steps, batch = self.tasks.inner_steps, self.tasks.batch
        order = np.random.default_rng(seed).permutation(len(rows))[: steps * batch]
        numbers = rows[order].reshape(steps, batch)
        support = Windows(*(jnp.asarray(leaf[numbers]) for leaf in self.windows))
        uniform = self.uniform, jnp.zeros(self.tasks.sources)
        weighted = self.weights.algorithm, self.weights.eta
        algorithm, eta = weighted if arm == "weighted" else uniform
        return algorithm, eta, Episode(support, self.query), key_of(seed)


def _final_loss(algorithm: LossWeights, eta: Any, episode: Any, key: jax.Array) -> jax.Array:
    unroll_key, batch_key = jax.random.split(key)
    batches = algorithm.batches(episode, batch_key)
    return rollout(algorithm.unroll(episode, unroll_key), eta, batches)[0]


def areas(scores: np.ndarray, windows: Windows, pieces: int, corruption: Any) -> dict[str, float]:
    """Return the AUC of scores, clean windows against corrupted ones, of all kinds and of each."""
    _, bad = corruption.sources(pieces)
    clean, values = ~np.asarray(windows.corrupted), jnp.asarray(scores)
    groups = {"any": ~clean}
    for number, kind in enumerate(corruption.kinds):
        groups[kind] = np.isin(windows.source, bad[number :: len(corruption.kinds)])
    return {
        name: float(auc(values[clean | group], jnp.asarray(clean[clean | group])))
        for name, group in groups.items()
    }


def table(rows: Sequence[Mapping[str, float]], flops: Mapping[str, float]) -> str:
    """Return the Markdown table of all arms."""
    lines = [
        "| trained on | held-out loss | minus that of everything | minus that of clean | GFLOPs |",
        "|" + "---|" * 5,
    ]
    for arm in ARMS:
        cells = [interval([row[arm] for row in rows])]
        for other in ("everything", "clean"):
            paired = [row[arm] - row[other] for row in rows]
            cells.append("" if arm == other else interval(paired))
        lines.append(f"| {arm} | {' | '.join(cells)} | {flops[arm] / 1e9:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Meta-train both, train the decoders, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of the final training")
    parser.add_argument("--meta-seed", type=int, default=0)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/data_rater"))
    arguments = parser.parse_args()
    folder = arguments.workdir / f"seed_{arguments.meta_seed}"
    config = data_rater_shakespeare.get_config()
    rater = learn(config, arguments.meta_seed, folder / "data_rater")
    weights = learn(
        loss_weights_shakespeare.get_config(), arguments.meta_seed, folder / "loss_weights"
    )
    for name, learned in (("DataRater", rater), ("LossWeights", weights)):
        print(
            f"{name}: meta-training {learned.flops / 1e9:.0f} GFLOPs, {learned.seconds:.0f} s",
            flush=True,
        )
    tasks = getattr(weights.splits, arguments.split)
    training = FinalTraining(weights, tasks)
    assert isinstance(rater.algorithm, DataRater)
    began = time.perf_counter()
    scores = rate_examples(rater.algorithm, rater.eta, training.windows)
    best = top_fraction(scores, 0.5)
    corrupted = training.windows.corrupted
    corruption = build_corruption(build.to_json(config)["dataset"]["corruption"])
    found = areas(scores, training.windows, tasks.sources, corruption)
    print(
        f"{len(scores):,} windows scored in {time.perf_counter() - began:.1f} s; AUC "
        f"{', '.join(f'{name} {area:.4f}' for name, area in found.items())}; "
        f"{1 - corrupted[best.rows].mean():.1%} of the best half are clean, of all "
        f"{1 - corrupted.mean():.1%}",
        flush=True,
    )
    everything = np.arange(len(scores))
    rows, flops = [], {}
    for seed in map(int, arguments.seeds.split(",")):
        half = np.random.default_rng([seed, 1]).permutation(everything)[: len(best.rows)]
        reads = {
            "everything": everything,
            "random half": half,
            "rated": best.rows,
            "weighted": everything,
            "clean": np.flatnonzero(~corrupted),
        }
        row: dict[str, float] = {}
        for arm, numbers in reads.items():
            inputs = training.arguments(arm, numbers, seed)
            if arm not in flops:
                flops[arm] = cost(training.run, *inputs).flops
            row[arm] = float(training.run(*inputs))
        rows.append(row)
        print({"seed": seed, **row}, flush=True)
    (folder / f"{arguments.split}.json").write_text(strict_json.dumps(rows) + "\n")
    print(f"\n{arguments.split} split, {os.cpu_count()} cores, jax {jax.__version__}\n")
    print(table(rows, flops))


if __name__ == "__main__":
    main()
