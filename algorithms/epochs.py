"""Batches of a long inner loop, read from the dataset by row number.

The dataset is on the device once, and its batches are not stacked for T steps: an inner step
receives the numbers of its rows (`epochs`) and reads them (`read_rows`). A dataset on the host is
read by the same two functions (`metalearn.rows`); which rows a step reads is then also computed
before its program runs, by `Algorithm.rows_at`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from metalearn._utils.pixels import are_pixels
from metalearn.algorithm import TRAINING_RUN, Algorithm
from metalearn.algorithms.support import with_rows
from metalearn.model import Model
from metalearn.rows import StepRows, take
from metalearn.unroll import Batch, Episode

MOST_READS = 2**31 - 1


def check_reads(what: str, steps: int, batch: int) -> None:
    """Raise ValueError for an inner loop that reads more examples than 32 bits can count."""
    if steps * batch > MOST_READS:
        raise ValueError(
            f"`{what}` reads {steps:,} x {batch:,} examples in a run, which are counted in 32 "
            f"bits, up to {MOST_READS:,}. Take fewer inner steps, or smaller batches."
        )


def epochs(
    rows: Int[Array, " n"] | StepRows, steps: Int[Array, " t"], batch: int, key: jax.Array
) -> Int[Array, "t {batch}"]:
    """Return the rows [t, batch] that consecutive steps read, in shuffled epochs without repeats.

    Only the permutations of those epochs that the steps touch are computed.

    Args:
      rows: [n], the numbers of the training examples; an epoch reads each of them once. Of data
        on the host that were read ahead: where the rows of these steps are.
      steps: [t], consecutive numbers of inner steps, from any step on.
      batch: examples of a step.
      key: (), decides the permutation of every epoch.
    """
    if isinstance(rows, StepRows):
        return rows.at(steps, batch)
    n = len(rows)
    if batch > n:
        raise ValueError(f"batch={batch}, but there are {n} training examples.")
    first = steps[0] * batch // n
    count = -(-len(steps) * batch // n) + 1
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(first + jnp.arange(count))
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys).reshape(-1)
    offsets = steps * batch - first * n  # of each step's first example in `shuffled`
    return shuffled[offsets[:, None] + jnp.arange(batch)[None]]


def epochs_of_some(
    mask: Bool[Array, " n"], steps: Int[Array, " t"], batch: int, key: jax.Array
) -> Int[Array, "t {batch}"]:
    """Return the rows [t, batch] that steps read of a padded set, in shuffled epochs, no padding.

    A step of more examples than there are reads some of them more than once. Every example read is
    drawn from a permutation of all n: for support sets, which are small.

    Args:
      mask: [n], whether a row is an example, and no padding; of one at least.
      steps: [t], numbers of inner steps.
      batch: examples of a step.
      key: (), decides the permutation of every epoch.
    """
    count = jnp.maximum(mask.sum(), 1)

    def row(number: jax.Array) -> jax.Array:
        order = jax.random.uniform(jax.random.fold_in(key, number // count), mask.shape)
        return jnp.argsort(jnp.where(mask, order, jnp.inf))[number % count]

    numbers = steps[:, None] * batch + jnp.arange(batch)[None]
    return jax.vmap(jax.vmap(row))(numbers).astype(jnp.int32)


def read_rows(data: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (inputs, targets) of some rows; uint8 images are scaled to 0..1.

    Args:
      data: (inputs [n, ...], targets [n, ...], ...); the targets may be `metalearn.Masked`, and
        either may be on the host (`metalearn.rows`).
      rows: numbers of examples, of any shape.

    Raises:
      ValueError: for uint8 inputs that are not images. See `metalearn._utils.pixels`.
    """
    inputs, targets = take(data[0], rows), take(data[1], rows)
    return scaled(inputs), targets


def scaled(inputs: jax.Array) -> jax.Array:
    """Return inputs [n, ...], uint8 images among them scaled to 0..1.

    Raises:
      ValueError: for uint8 inputs that are not images. See `metalearn._utils.pixels`.
    """
    pixels = are_pixels("An inner step", inputs.dtype, inputs.shape[1:])
    return inputs / 255.0 if pixels else inputs


class InEpochs(Algorithm):
    """An algorithm whose inner loop is a training run on (inputs, targets, rows). Abstract.

    `model`, `inner_steps` and `batch` are fields of it. Rows are drawn in shuffled epochs, without
    repeats within an epoch.
    """

    model: Model
    inner_steps: int
    batch: int

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return each step's number [T] and the rows of the data it reads [T, batch], int32."""
        return self.batches_at(episode, key, jnp.arange(self.inner_steps, dtype=jnp.int32))

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Batch:
        """Return the numbers and the rows of these steps."""
        return steps, self.rows_at(episode, key, steps)

    def rows_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> jax.Array:
        """Return the rows of these steps, [t, batch]."""
        return epochs(episode.support[2], steps, self.batch, key)

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return the episode with the rows of the query sharded; the dataset is not."""
        inputs, targets, rows = episode.query
        return episode._replace(query=(inputs, targets, shard(rows)))

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries."""
        return TRAINING_RUN

    def support_set(self, support: Any) -> Any:
        """Return (inputs, targets, rows to train on); of (inputs, targets), all rows."""
        return with_rows(type(self).__name__, support)

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the trained model in evaluation mode, for inputs [n, ...]."""
        del key
        return self.model.apply(params, statistics, scaled(inputs), train=False)[0]
