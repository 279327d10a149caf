"""What a meta-gradient predicts, by the `eps_root` of the inner Adam: metasmoothness beside LDS.

    python -m metalearn.experiments.benchmarks.smoothness [--eps-root 1e-10 1e-8 ...] [--seeds 0 1]

A decoder (2 layers, width 32, characters) is trained on 64 windows of tiny Shakespeare by 48 steps
of Adam, each window once an epoch in a fixed order. eta holds a weight for each window, and the
meta-gradient at weights of one scores the windows: their sum over a subset predicts by how much the
loss of a held-out window changes when the decoder is trained without it (arXiv:2504.16430).

The linear datamodelling score (LDS; Park et al. 2023, arXiv:2303.14186) is how right that is: for
each held-out window Spearman's correlation of the predicted and the true change over random
subsets, in the mean over windows. The true ones are trainings from scratch. One program, compiled
once, serves all settings and seeds.

Beside the LDS stand the metasmoothness (`metalearn.diagnostics.smoothness`), which takes three
trainings on all windows, and the losses that training ends with: what the smoother optimizer costs.
Then the rank correlation of metasmoothness and LDS over the settings; and a learning rate at which
the meta-gradient is finite and useless, what following its verdict gives, and that verdict. A seed
decides the windows, theta_0, their order, the subsets and the direction of the metasmoothness.
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
from metalearn.diagnostics.perturbed_runs import metasmoothness, random_direction
from metalearn.diagnostics.smoothness import DIRECTIONS, STEP
from metalearn.engines.inner_loop import Remat, inner_loop
from metalearn.experiments.benchmarks.reporting import interval
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
AT_ONCE = 17  # trainings that are vmapped: a third of those of a setting


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


def windows(data_dir: str | None = None, seed: int = 0) -> tuple[Any, Any]:
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

    return cut("train", EXAMPLES, 2 * seed), cut("validation", QUERIES, 2 * seed + 1)


def episode_of(data: tuple[Any, Any], rate: float, eps_root: float) -> Episode:
    """Return the episode of some windows with the settings of Adam."""
    train, query = data
    return Episode((*train, (jnp.float32(rate), jnp.float32(eps_root))), query)


class Measured(NamedTuple):
    """Trainings of one setting.

    Args:
      losses: [n, Q], of the held-out windows, of each training.
      train: [n], the mean losses of the training windows.
      scores: [Q, N], the derivative of the held-out losses in the weights, at weights of one.
      metasmoothness: (), of the first three trainings.
    """

    losses: jax.Array
    train: jax.Array
    scores: jax.Array
    metasmoothness: jax.Array


class Row(NamedTuple):
    """What one setting gives with one seed; see the table in docs/smoothness.md.

    Args:
      metasmoothness: from three trainings.
      lds: Spearman's correlation over subsets, the mean over held-out windows.
      train: the mean loss of the training windows at the end of training on all.
      query: that of the held-out windows.
    """

    metasmoothness: float
    lds: float
    train: float
    query: float


@jax.jit
def measured(weights: jax.Array, episode: Episode, key: jax.Array) -> Measured:
    """Train with each row of the weights [n, N], AT_ONCE rows at once, and score the windows.

    The one program of the benchmark: learning rate and `eps_root` are arrays in the episode. The
    first three rows of the weights are 1, 1 + h v and 1 + 2 h v.
    """
    algorithm, keys = WindowWeights(), task_keys(key)
    unroll = algorithm.unroll(episode, keys.unroll)
    batches = algorithm.batches(episode, keys.batches)

    def trained(eta: jax.Array) -> Any:
        (params, _), _ = inner_loop(unroll, eta, batches, remat=Remat("step"))
        of_training = algorithm.losses(params, *episode.support[:2]).mean()
        return algorithm.losses(params, *episode.query), of_training, jax.tree.leaves(params)

    losses, train, theta = jax.lax.map(trained, weights, batch_size=AT_ONCE)
    scores = jax.jacrev(lambda eta: trained(eta)[0])(weights[0])
    return Measured(losses, train, scores, metasmoothness([leaf[:3] for leaf in theta]))


def subsets(count: int, seed: int) -> np.ndarray:
    """Return which windows each subset leaves out, [count, N] bool."""
    draw, size = np.random.default_rng(2 + seed), round(LEFT_OUT * EXAMPLES)
    left_out = np.zeros((count, EXAMPLES), bool)
    for row in left_out:
        row[draw.choice(EXAMPLES, size, replace=False)] = True
    return left_out


def row(episode: Episode, count: int, seed: int) -> Row:
    """Return what a setting gives: its LDS over `count` trainings without a subset."""
    key, left_out = jax.random.key(seed), subsets(count, seed)
    ones = jnp.ones(EXAMPLES)
    # The direction of `metalearn.diagnostics.smoothness.three_runs`.
    v = random_direction(ones, jax.random.fold_in(jax.random.fold_in(key, DIRECTIONS), 0))
    moved = ones[None] + STEP * jnp.arange(3.0)[:, None] * v[None]
    result = measured(jnp.concatenate([moved, jnp.where(left_out, 0.0, 1.0)]), episode, key)
    losses = np.asarray(result.losses)
    changes = losses[3:] - losses[:1]
    predicted = -left_out.astype(np.float32) @ np.asarray(result.scores).T
    pairs = zip(predicted.T, changes.T, strict=True)
    lds = np.nan_to_num([scipy.stats.spearmanr(p, c).statistic for p, c in pairs])
    smooth, train = float(result.metasmoothness), float(result.train[0])
    return Row(smooth, float(lds.mean()), train, float(losses[0].mean()))


def trainer_of(episode: Episode, seed: int) -> tuple[Trainer, Any, GivenTasks, jax.Array]:
    """Return the arguments of `smoothness` and `three_runs`, at weights of one."""
    trainer = Trainer(WindowWeights(), optimizer=optax.sgd(0.1), tasks_per_step=1)
    key = jax.random.key(seed)
    return trainer, trainer.init(key), GivenTasks.create([episode]), key


def cells(rate: float, eps_root: float, rows: Sequence[Row]) -> str:
    """Return a setting as a row of the Markdown table, means over seeds with their intervals."""
    values = [interval(column) for column in zip(*rows, strict=True)]
    return f"| {' | '.join([f'{rate:g}', f'{eps_root:.0e}', *values])} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each setting, the rank correlation, and the verdict on a useless one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--eps-root", type=float, nargs="+", default=EPS_ROOTS)
    parser.add_argument("--retrainings", type=int, default=48)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-dir", help="of TensorFlow Datasets")
    options = parser.parse_args(argv)
    settings = [(options.rate, eps_root) for eps_root in options.eps_root]
    rows: dict[tuple[float, float], list[Row]] = {}
    ranks = []
    for seed in options.seeds:
        data = windows(options.data_dir, seed)
        for setting in [*settings, USELESS, REPAIRED]:
            result = row(episode_of(data, *setting), options.retrainings, seed)
            rows.setdefault(setting, []).append(result)
            print(
                f"seed {seed}, rate {setting[0]:g}, eps_root {setting[1]:.0e}: {result}", flush=True
            )
        pairs = [rows[setting][-1][:2] for setting in settings]
        ranks.append(float(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic))
    columns = "rate", "eps_root", "metasmoothness", "LDS", "training loss", "held-out loss"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print("\n".join(cells(*setting, of_seeds) for setting, of_seeds in rows.items()))
    if len(settings) > 1:
        correlation = interval(ranks)
        print(
            f"\nrank correlation of metasmoothness and LDS by eps_root: {correlation}", flush=True
        )
    seed = options.seeds[0]
    episode = episode_of(windows(options.data_dir, seed), *USELESS)
    verdict = smoothness(*trainer_of(episode, seed)).verdict
    print(f"\nrate {USELESS[0]:g}, eps_root {USELESS[1]:g}: {verdict}")
    print(f"\nseeds {options.seeds}, {os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
