"""What a meta-gradient predicts, by the `eps_root` of the inner Adam: metasmoothness beside LDS.

    python -m metalearn.experiments.benchmarks.smoothness [--eps-root 1e-10 1e-8 ...]

A decoder (2 layers, width 32, characters) is trained on 64 windows of tiny Shakespeare by 48 steps
of Adam, each window once an epoch in a fixed order. eta holds a weight for each window, and the
meta-gradient at weights of one scores the windows: their sum over a subset predicts by how much the
loss of a held-out window changes when the decoder is trained without it (arXiv:2504.16430).

The linear datamodelling score (LDS; Park et al. 2023, arXiv:2303.14186) is how right that is: for
each held-out window Spearman's correlation of the predicted and the true change over random
subsets, in the mean over windows. The true ones are trainings from scratch, many in one program.

Beside the LDS stand the metasmoothness (`metalearn.diagnostics.smoothness`), which takes three
trainings on all windows, and the losses that training ends with: what the smoother optimizer costs.
Then the rank correlation of metasmoothness and LDS over the settings; and a learning rate at which
the meta-gradient is finite and useless, its verdict, and what following that verdict gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from metalearn import Algorithm, Episode, Trainer, Unroll
from metalearn.datasets import GivenTasks
from metalearn.datasets.text import read_text
from metalearn.diagnostics import smoothness
from metalearn.diagnostics.smoothness import three_runs
from metalearn.engines.inner_loop import Remat, inner_loop
from metalearn.models.transformer import Architecture
from metalearn.unroll import task_keys

LENGTH, EXAMPLES, BATCH, EPOCHS, QUERIES = 32, 64, 8, 6, 8
CHARACTERS = 65
DECODER = Architecture(CHARACTERS, 32, 2, heads=2)
RATE = 5e-3
EPS_ROOTS = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
USELESS = 2e-2, 1e-8  # learning rate and eps_root
REPAIRED = 3e-3, 1e-5
LEFT_OUT = 0.1  # share of the windows in a subset
AT_ONCE = 8  # trainings in one call
KEY = 0


@dataclasses.dataclass(frozen=True)
class WindowWeights(Algorithm):
    """A weight for each training window of one run; eta is [N], ones at first.

    An episode's support is (inputs [N, S], targets [N, S], settings), the settings a pair of the
    learning rate and `eps_root` of Adam, so that one program serves them all; its query is (inputs,
    targets), [Q, S].
    """

    def init(self, key: jax.Array) -> jax.Array:
        """Return weights of one."""
        return jnp.ones(EXAMPLES)

    def batches(self, episode: Episode, key: jax.Array) -> jax.Array:
        """Return the numbers of the windows of each step, [T, batch]."""
        keys = jax.random.split(key, EPOCHS)
        order = jax.vmap(lambda key: jax.random.permutation(key, EXAMPLES))(keys)
        return order.reshape(-1, BATCH)

    def losses(self, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Return the mean loss of each window, [n]."""
        logits = DECODER.apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(1)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training run, and the mean loss of the held-out windows."""
        inputs, targets, (rate, eps_root) = episode.support
        adam = optax.adam(rate, eps_root=eps_root)

        def weighted_loss(params: Any, eta: jax.Array, numbers: jax.Array) -> jax.Array:
            losses = self.losses(params, inputs[numbers], targets[numbers])
            return (eta[numbers] * losses).mean()

        def init(eta: jax.Array) -> Any:
            params = DECODER.init(key)
            return params, adam.init(params)

        def step(eta: jax.Array, state: Any, numbers: jax.Array, grad: Any) -> Any:
            params, optimizer = state
            grads = grad(weighted_loss)(params, eta, numbers)
            updates, optimizer = adam.update(grads, optimizer, params)
            return optax.apply_updates(params, updates), optimizer

        def loss(eta: jax.Array, state: Any) -> Any:
            return self.losses(state[0], *episode.query).mean(), {}

        return Unroll(init, step, loss)


def windows(data_dir: str | None = None) -> tuple[Any, Any]:
    """Return (inputs, targets) of the training windows, and of the held-out ones.

    They begin at random places of the two splits.
    """
    texts = {split: read_text(split=split, data_dir=data_dir) for split in ("train", "validation")}
    characters = sorted(set(texts["train"]))
    assert len(characters) == CHARACTERS
    encode = {character: number for number, character in enumerate(characters)}

    def cut(split: str, count: int, seed: int) -> tuple[jax.Array, jax.Array]:
        text = np.array([encode[character] for character in texts[split]], np.int32)
        starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, count)
        rows = text[starts[:, None] + np.arange(LENGTH + 1)]
        return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])

    return cut("train", EXAMPLES, 0), cut("validation", QUERIES, 1)


def episode_of(data: tuple[Any, Any], rate: float, eps_root: float) -> Episode:
    """Return the episode of some windows with the settings of Adam."""
    train, query = data
    return Episode((*train, (jnp.float32(rate), jnp.float32(eps_root))), query)


class Scores(NamedTuple):
    """What the meta-gradients of the held-out windows predict, and what retraining says.

    lds: Spearman's correlation over subsets, of each held-out window, [Q].
    train: the mean loss of the training windows at the end of training on all.
    query: that of the held-out windows.
    """

    lds: np.ndarray
    train: float
    query: float


def subsets(count: int) -> np.ndarray:
    """Return which windows each subset leaves out, [count, N] bool."""
    draw, size = np.random.default_rng(2), round(LEFT_OUT * EXAMPLES)
    left_out = np.zeros((count, EXAMPLES), bool)
    for row in left_out:
        row[draw.choice(EXAMPLES, size, replace=False)] = True
    return left_out


@jax.jit
def trained(eta: jax.Array, episode: Episode) -> tuple[jax.Array, jax.Array]:
    """Return (losses of the held-out windows [Q], mean loss of the training windows)."""
    algorithm, key = WindowWeights(), task_keys(jax.random.key(KEY))
    unroll = algorithm.unroll(episode, key.unroll)
    batches = algorithm.batches(episode, key.batches)
    (params, _), _ = inner_loop(unroll, eta, batches, remat=Remat("step"))
    of_training = algorithm.losses(params, *episode.support[:2]).mean()
    return algorithm.losses(params, *episode.query), of_training


@jax.jit
def scored(eta: jax.Array, episode: Episode) -> jax.Array:
    """Return the derivative of the loss of each held-out window in the weights, [Q, N]."""
    return jax.jacrev(lambda eta: trained(eta, episode)[0])(eta)


@jax.jit
def retrained(etas: jax.Array, episode: Episode) -> jax.Array:
    """Return the losses of the held-out windows for many weights [n, N], [n, Q]."""
    return jax.lax.map(lambda eta: trained(eta, episode)[0], etas, batch_size=AT_ONCE)


def datamodelling(episode: Episode, count: int) -> Scores:
    """Return the LDS over `count` trainings without a subset."""
    ones, left_out = jnp.ones(EXAMPLES), subsets(count)
    at_ones, train = trained(ones, episode)
    weights = jnp.where(left_out, 0.0, ones[None])
    changes = np.asarray(retrained(weights, episode)) - np.asarray(at_ones)
    predicted = -left_out.astype(np.float32) @ np.asarray(scored(ones, episode)).T
    pairs = zip(predicted.T, changes.T, strict=True)
    lds = np.array([scipy.stats.spearmanr(p, c).statistic for p, c in pairs])
    return Scores(np.nan_to_num(lds), float(train), float(at_ones.mean()))


def trainer_of(episode: Episode) -> tuple[Trainer, Any, GivenTasks, jax.Array]:
    """Return the arguments of `smoothness` and `three_runs`, at weights of one."""
    trainer = Trainer(WindowWeights(), optimizer=optax.sgd(0.1), tasks_per_step=1)
    key = jax.random.key(KEY)
    return trainer, trainer.init(key), GivenTasks.create([episode]), key


def row(data: tuple[Any, Any], rate: float, eps_root: float, count: int) -> tuple[float, float]:
    """Print a setting, and return its (metasmoothness, LDS)."""
    episode = episode_of(data, rate, eps_root)
    smooth = float(three_runs(*trainer_of(episode)).metasmoothness)
    scores = datamodelling(episode, count)
    lds = float(scores.lds.mean())
    print(
        f"| {rate:g} | {eps_root:.0e} | {smooth:.3f} | {lds:.3f} | {scores.train:.3f} | "
        f"{scores.query:.3f} |",
        flush=True,
    )
    return smooth, lds


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each setting, the rank correlation, and the verdict on a useless one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--eps-root", type=float, nargs="+", default=EPS_ROOTS)
    parser.add_argument("--retrainings", type=int, default=48)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--data-dir", help="of TensorFlow Datasets")
    options = parser.parse_args(argv)
    data, count = windows(options.data_dir), options.retrainings
    columns = "rate", "eps_root", "metasmoothness", "LDS", "training loss", "held-out loss"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    rows = [row(data, options.rate, eps_root, count) for eps_root in options.eps_root]
    for setting in (USELESS, REPAIRED):
        row(data, *setting, count)
    if len(rows) > 1:
        ranks = scipy.stats.spearmanr(*zip(*rows, strict=True)).statistic
        print(f"\nrank correlation of metasmoothness and LDS by eps_root: {ranks:.2f}")
    for setting in (USELESS, REPAIRED):
        verdict = smoothness(*trainer_of(episode_of(data, *setting))).verdict
        print(f"\nrate {setting[0]:g}, eps_root {setting[1]:g}: {verdict}", flush=True)
    print(f"\n{os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
