"""What scores of training examples are worth: to predict retraining, and to choose data.

    python -m metalearn.experiments.benchmarks.data_selection lds
    python -m metalearn.experiments.benchmarks.data_selection select [--data=fashion_mnist]
    python -m metalearn.experiments.benchmarks.data_selection select --schedule=constant

`lds`: an MLP is trained on 1,000 digits. For 16 query examples, and at several learning rates, the
linear datamodelling score of metagradient scores (`metalearn.algorithms.attribute`) over 100
trainings without 10 of the examples; that of gradient cosines and of losses, which take no
derivative through training; and what scores cost, over one training.

`select`: 30% of the labels are wrong, and queries with right labels are at hand. How well does a
number per example separate wrong labels from right ones (AUC), and how good is a model that is
trained on the best 70%, over as many steps as one trained on everything?

    loss            the example's loss at the end of training; low ones are kept
    cosine          of its gradient with that of the queries, there
    queries alone   the example's loss under a model that is trained on the queries alone
    score           minus the metagradient of one run
    mean score      of several runs, each of another theta_0 and order
    descent         the weight after as many steps of projected metagradient descent, each through
                    a run of its own
    right labels    an oracle

Of `select` the learning rate falls linearly to zero. With a constant one the last steps are an
average of nothing: what an example is worth depends on when the run reads it last, and the scores
of two runs, of another theta_0 and order, have little in common (their correlation is printed).
`--schedule=constant` measures that.

The test split is read once a seed, and nothing was chosen by it: schedule, number of queries and
outer rate were, on seeds from 100 on. Arms share theta_0, and runs of one size their order:
differences to training on everything are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import MixedFlow, Trainer
from metalearn._utils.intervals import interval
from metalearn.algorithms import (
    DataWeights,
    attribute,
    attribution_baselines,
    lds,
    leave_k_out,
    predicted_changes,
)
from metalearn.algorithms.data_weights.attribution import query_of, stacks
from metalearn.algorithms.loss_weights.features import auc
from metalearn.cost import cost
from metalearn.datasets import HeldOut, Images, read_images, with_label_noise
from metalearn.diagnostics.smoothness import three_runs
from metalearn.models import Linen, train_flag
from metalearn.models.linen_networks import MLP

NOISE, KEPT = 0.3, 0.7
MOMENTUM, BATCH = 0.9, 100


class Setting(NamedTuple):
    """Sizes of a comparison.

    Args:
      data: the name of the dataset.
      examples: to train on.
      queries: with right labels, disjoint from them.
      steps: T.
      rate: the learning rate, of the first step.
    """

    data: str
    examples: int
    queries: int
    steps: int
    rate: float


SETTINGS = {
    "digits": Setting("digits", 1000, 300, 200, 0.02),
    "fashion_mnist": Setting("fashion_mnist", 2000, 2000, 200, 0.01),
}


class Split(NamedTuple):
    """The data of one seed. Arrays are on the host.

    Args:
      train: with right labels.
      queries: to choose by.
      test: to report.
      wrong: [examples] bool, whose label in `noisy` is wrong.
      noisy: labels [examples].
    """

    train: Images
    queries: Images
    test: Images
    wrong: np.ndarray
    noisy: np.ndarray


images_of = functools.cache(read_images)


def split(setting: Setting, seed: int, noise: float = NOISE) -> Split:
    """Draw training examples and queries from the training split, and wrong labels."""
    count = setting.examples + setting.queries
    name = "train" if setting.data == "digits" else f"train[:{4 * count}]"
    images = images_of(setting.data, name)
    rows = np.random.default_rng(seed).permutation(len(images.labels))[:count]
    parts = np.split(rows, [setting.examples])
    train, queries = (Images(images.inputs[part], images.labels[part]) for part in parts)
    noisy = with_label_noise(train, noise, seed).labels
    test = images_of(setting.data, "test")
    return Split(train, queries, test, noisy != train.labels, noisy)


SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
}


def algorithm_of(setting: Setting, schedule: str) -> DataWeights:
    """Return the training run: a smooth MLP, SGD with momentum."""
    shape = images_of(setting.data, "test").inputs.shape[1:]
    model = MLP(10, hidden=(64,), activation=nn.tanh)
    network = Linen(model, jax.ShapeDtypeStruct((1, *shape), jnp.float32), train_flag)
    rates = SCHEDULES[schedule](setting.rate, setting.steps)
    optimizer = optax.sgd(rates, momentum=MOMENTUM)
    return DataWeights(network, setting.examples, setting.steps, BATCH, optimizer)


def tasks_of(data: Split) -> HeldOut:
    """Return the run on noisy labels, whose query are the queries."""
    return HeldOut.create(data.train.inputs, data.noisy, *data.queries)


def timed(call: Callable[[], Any], rounds: int = 3) -> float:
    """Return the median time of a call, after a first one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def validate(rates: list[float], queries: int, runs: int, k: int, noise: float) -> None:
    """Print the linear datamodelling scores at several learning rates, and what scores cost."""
    setting, key = SETTINGS["digits"], jax.random.key(0)
    data = split(setting, 0, noise)
    tasks = tasks_of(data)
    inputs, targets = data.queries
    sets = [(inputs[i : i + 1], targets[i : i + 1]) for i in range(queries)]
    print("| learning rate | query loss | scores | gradient cosine | final loss |\n|" + "---|" * 5)
    for rate in rates:
        algorithm = algorithm_of(setting._replace(rate=rate), "constant")
        trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=1)
        scores = attribute(trainer, tasks, key, sets)
        without = leave_k_out(trainer, tasks, key, sets, k=k, runs=runs)
        cheap = attribution_baselines(trainer, tasks, key, sets)
        losses = np.tile(cheap.loss, (queries, 1))
        cells = [
            str(lds(predicted_changes(each, without.rows), without.changes))
            for each in (scores.scores, cheap.cosine, losses)
        ]
        cells = [f"{rate:g}", f"{scores.losses.mean():.4f}", *cells]
        print(f"| {' | '.join(cells)} |", flush=True)
    gradients, eta = trainer.query_gradients, trainer.algorithm.init(key)
    ((_, one),) = stacks(sets[:1])
    with_one = gradients.with_queries(tasks, key, one)
    flops = [
        cost(program, weights, with_one, key).flops
        for program, weights in ((gradients.program, eta), (gradients.losses, eta[None]))
    ]
    scoring = timed(lambda: gradients.program(eta, with_one, key))
    training = timed(lambda: gradients.losses(eta[None], with_one, key))
    print(
        f"\nAll scores for one query: {flops[0] / flops[1]:.2f} times the FLOPs of one training, "
        f"{scoring / training:.2f} times its time ({training:.3f} s)."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Arms:
    """Test accuracy of the training run on some of the rows.

    Args:
      algorithm: of the run.
    """

    algorithm: DataWeights

    def __post_init__(self) -> None:
        object.__setattr__(self, "_program", jax.jit(self._accuracies))

    def __call__(self, data: Split, labels: Any, rows: np.ndarray, key: jax.Array) -> np.ndarray:
        """Return the test accuracies of training on rows [arms, K] of the training examples."""
        support = jnp.asarray(data.train.inputs), jnp.asarray(labels)
        test = tuple(map(jnp.asarray, data.test))
        program: Any = self._program  # type: ignore[attr-defined]
        return np.asarray(program(support, test, jnp.asarray(rows, jnp.int32), key))

    def _accuracies(self, support: Any, test: Any, rows: jax.Array, key: jax.Array) -> jax.Array:
        algorithm = self.algorithm

        def accuracy(rows: jax.Array) -> jax.Array:
            learner = algorithm._adapted(algorithm.init(key), (*support, rows), key)
            outputs = algorithm.predict(learner.params, learner.statistics, test[0], None)
            return (outputs.argmax(-1) == test[1]).mean()

        return jax.vmap(accuracy)(rows)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Metagradients of the loss on the queries, each through a run of its own.

    Args:
      trainer: of the training run.
      tasks: whose query the queries are.
      key: of the runs.
    """

    trainer: Trainer
    tasks: Any
    key: jax.Array

    def metagradient(self, eta: jax.Array, run: int) -> jax.Array:
        """Return the derivative in the weights [examples], through the run of a number."""
        inputs, targets = map(np.asarray, query_of(self.tasks, self.key))
        ((_, query),) = stacks([(inputs, targets)])
        key = jax.random.fold_in(self.key, run)
        return self.trainer.query_gradients(eta, self.tasks, key, query)[0][0]

    def scores(self, count: int) -> np.ndarray:
        """Return the scores of so many runs at weights of one, [count, examples]."""
        ones = self.trainer.algorithm.init(self.key)
        return np.stack([-np.asarray(self.metagradient(ones, run)) for run in range(count)])

    def descended(self, steps: int, rate: float, first: np.ndarray) -> np.ndarray:
        """Return the weights [examples] after projected metagradient descent.

        Args:
          steps: of the descent, step i through run i.
          rate: of the outer optimizer.
          first: [examples], the scores of run 0: minus the metagradient of the first step.
        """
        algorithm: Any = self.trainer.algorithm
        optimizer, eta = algorithm.outer_optimizer(optax.adam(rate)), algorithm.init(self.key)
        state = optimizer.init(eta)
        for step in range(steps):
            grads = self.metagradient(eta, step) if step else -jnp.asarray(first)
            updates, state = optimizer.update(grads, state, eta)
            eta = optax.apply_updates(eta, updates)
        return np.asarray(eta)


def select(setting: Setting, seeds: Sequence[int], steps: int, rate: float, schedule: str) -> None:
    """Print how well numbers per example find wrong labels, and what training on the rest gives."""
    algorithm = algorithm_of(setting, schedule)
    trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=1)
    arms, kept = Arms(algorithm), round(KEPT * setting.examples)
    areas: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    agreements: list[float] = []  # of the scores of two runs
    for seed in seeds:
        data, key = split(setting, seed), jax.random.key(seed)
        tasks = tasks_of(data)
        runs = Runs(trainer, tasks, jax.random.fold_in(key, 1))
        scores = runs.scores(max(steps, 2))
        agreements.append(float(np.corrcoef(scores[:2])[0, 1]))
        cheap = attribution_baselines(trainer, tasks, key)
        values = {
            "loss": -cheap.loss,
            "cosine": cheap.cosine[0],
            "queries alone": -losses_after(algorithm, data, key),
            "score": scores[0],
            "mean score": scores.mean(0),
            "descent": runs.descended(steps, rate, scores[0]),
        }
        for name, each in values.items():
            area = float(auc(jnp.asarray(each), jnp.asarray(~data.wrong)))
            areas.setdefault(name, []).append(area)
        print(
            f"seed {seed}: AUC",
            {name: round(each[-1], 4) for name, each in areas.items()},
            flush=True,
        )
        values["right labels"] = -data.wrong.astype(float)
        values["random"] = np.random.default_rng(seed).random(setting.examples)
        rows = np.stack([np.sort(np.argsort(-v, kind="stable")[:kept]) for v in values.values()])
        every = arms(data, data.noisy, np.arange(setting.examples)[None], key)
        of_arms = dict(zip(values, arms(data, data.noisy, rows, key).tolist(), strict=True))
        for name, accuracy in {"everything": float(every[0]), **of_arms}.items():
            accuracies.setdefault(name, []).append(accuracy)
    print(
        f"\n{setting.data}: {setting.examples:,} examples, {NOISE:.0%} wrong labels, "
        f"{setting.queries} queries, {schedule} learning rate {setting.rate:g}, {len(seeds)} "
        f"seeds; {steps} steps of descent, runs of the mean score\n"
        f"Scores of two runs: correlation {interval(np.asarray(agreements))}; metasmoothness "
        f"{float(three_runs(trainer, trainer.init(key), tasks, key).metasmoothness):.3f}\n\n"
        "| kept by | AUC | test accuracy | minus that of everything |\n|---|---|---|---|"
    )
    everything = np.asarray(accuracies["everything"])
    for name, of_seeds in accuracies.items():
        separation = interval(np.asarray(areas[name])) if name in areas else ""
        paired = "" if name == "everything" else interval(np.asarray(of_seeds) - everything)
        print(f"| {name} | {separation} | {interval(np.asarray(of_seeds))} | {paired} |")


def losses_after(algorithm: DataWeights, data: Split, key: jax.Array) -> np.ndarray:
    """Return the loss of each training example under a model trained on the queries alone."""
    alone = dataclasses.replace(algorithm, examples=len(data.queries.labels))
    learner = alone.adapt(alone.init(key), tuple(map(jnp.asarray, data.queries)), key)
    outputs = learner.predict(jnp.asarray(data.train.inputs))
    return np.asarray(alone.losses(outputs, jnp.asarray(data.noisy)))


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("lds", "select"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--trainings", type=int, default=100)
    parser.add_argument("--leave-out", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.0, help="share of wrong labels, of lds")
    parser.add_argument("--data", choices=sorted(SETTINGS), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="linear", help="of select")
    parser.add_argument("--clean", type=int, help="queries of select; by default those of the data")
    parser.add_argument("--steps", type=int, default=4, help="of descent; runs of the mean score")
    parser.add_argument("--outer-rate", type=float, default=0.1, help="of descent")
    parser.add_argument("--rate", type=float, help="of select; by default that of the data")
    options = parser.parse_args()
    if options.what == "lds":
        sizes = options.queries, options.trainings, options.leave_out, options.noise
        validate(options.rates, *sizes)
    else:
        setting, first = SETTINGS[options.data], options.first_seed
        queries, rate = options.clean or setting.queries, options.rate or setting.rate
        setting = setting._replace(queries=queries, rate=rate)
        seeds = range(first, first + options.seeds)
        select(setting, seeds, options.steps, options.outer_rate, options.schedule)
    print(f"\n{os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
