"""Learned loss weights against uniform weights, and against training on the clean text only.

    python -m metalearn.experiments.benchmarks.loss_weights [--seeds=0,1,2] [--workdir=DIR]

Per seed, weights are meta-learned as `--config=loss_weights_shakespeare` says, then frozen,
and a language model is trained from scratch for many more steps than the horizon of
meta-training, three times from the same initialisation with the same number of steps:

- `learned`   on the corrupted text, with the learned weights
- `uniform`   on the same batches, with equal weights
- `clean`     on the clean pieces only, with equal weights: an oracle

The loss is on clean text of the test split, which was not used to choose anything, in nats per
byte. The AUC measures how well a score separates clean from corrupted windows of that split: the
learned weights, and for comparison a low loss, of the model of the same arm and of the uniform one
(which has learned the repeated bytes, so that a low loss does not indicate clean text).

A seed decides the initial weights, the meta-training, and the initialisation and batches of the
model; the config decides which text is corrupted. Rows are saved in DIR, so that a run can be
continued. Intervals are 95%, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metalearn import Trainer
from metalearn._utils import strict_json
from metalearn.algorithms import DomainWeights, LossWeights
from metalearn.algorithms.loss_weights.features import auc
from metalearn.datasets import Text
from metalearn.engines.inner_loop import rollout
from metalearn.experiments import build
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.configs import loss_weights_shakespeare
from metalearn.loggers import ConsoleLogger

SCORES = {
    "auc_weights": "the learned weights",
    "auc_low_loss": "a low loss, model of `learned`",
    "auc_low_loss_uniform": "a low loss, model of `uniform`",
}


class Arms:
    """Training of a language model with some weights, and its test metrics; compiled once."""

    def __init__(self, trainer: Trainer, test: Text):
        self.test = test
        learner = trainer.algorithm
        assert isinstance(learner, LossWeights)
        self.learner = learner
        equal = DomainWeights(test.sources)  # its scores stay zero, so its weights one
        self.uniform = LossWeights(learner.model, equal, learner.optimizer)
        self.run = jax.jit(_run, static_argnums=0)

    def rows(self, eta: Any, key: jax.Array) -> dict[str, float]:
        """Return the test losses of the three arms, and the AUC of each score."""
        equal = jnp.zeros(self.test.sources)
        learned = self.run(self.learner, eta, self.test, key)
        uniform = self.run(self.uniform, equal, self.test, key)
        clean = self.run(self.uniform, equal, self.test.clean(), key)
        results = {
            "learned": learned["loss"],
            "uniform": uniform["loss"],
            "clean": clean["loss"],
            "auc_weights": learned["weight_auc"],
            "auc_low_loss": learned["auc_low_loss"],
            "auc_low_loss_uniform": uniform["auc_low_loss"],
            "weight_clean": learned["weight_clean"],
            "weight_corrupted": learned["weight_corrupted"],
        }
        return {name: float(value) for name, value in results.items()}


def _run(algorithm: LossWeights, eta: Any, tasks: Text, key: jax.Array) -> dict[str, jax.Array]:
    sample_key, unroll_key, batch_key = jax.random.split(key, 3)
    episode = tasks.sample(sample_key)
    batches = algorithm.batches(episode, batch_key)
    loss, aux = rollout(algorithm.unroll(episode, unroll_key), eta, batches)
    losses = algorithm.losses(aux.state, episode.query).mean(1)
    clean = ~episode.query.corrupted
    return {"loss": loss, "auc_low_loss": auc(-losses, clean), **aux.metrics}


def measure(config: Any, seed: int, arms: Arms, trainer: Trainer, tasks: Text) -> dict[str, float]:
    """Meta-learn weights with a seed, then train with them and without."""
    began = time.perf_counter()
    how = {"loggers": [ConsoleLogger()], "log_every": config["log_every"], "progress": False}
    state = trainer.fit(tasks, config["steps"], key=key_of(seed), **how)
    learned = time.perf_counter()
    row = arms.rows(trainer.learned(state), jax.random.fold_in(key_of(seed), 1))
    ended = time.perf_counter()
    return {"seed": seed, **row, "meta_seconds": learned - began, "arm_seconds": ended - learned}


def table(rows: Sequence[dict[str, float]]) -> str:
    """Return the Markdown table of all seeds."""
    seeds = ", ".join(str(row["seed"]) for row in rows)
    lines = [f"| seeds {seeds} | mean and 95% interval |", "|---|---|"]
    for name in ("learned", "uniform", "clean"):
        lines.append(f"| test loss, {name} | {interval([row[name] for row in rows])} |")
    for a, b in (("uniform", "learned"), ("learned", "clean")):
        lines.append(f"| {a} - {b}, paired | {interval([row[a] - row[b] for row in rows])} |")
    for name, what in SCORES.items():
        lines.append(f"| AUC, {what} | {interval([row[name] for row in rows])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the seeds without a saved row, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/loss_weights"))
    arguments = parser.parse_args()
    config = build.to_json(loss_weights_shakespeare.get_config())
    splits: Any = build.splits(config["dataset"])
    trainer = build.trainer(config, splits)
    arms = Arms(trainer, splits.test)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        path = arguments.workdir / f"benchmark_seed_{seed}.json"
        if not path.exists():
            row = measure(config, seed, arms, trainer, splits.train)
            path.write_text(strict_json.dumps(row) + "\n")
        rows.append(strict_json.loads(path.read_text()))
        print(rows[-1], flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
