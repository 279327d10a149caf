"""Scores of all examples of a dataset, and the best share of them.

    scores = rate_examples(algorithm, eta, text.windows())
    best = top_fraction(scores, 0.5)
    best.rows                       # to train on
    score >= best.threshold         # for examples that are not there yet

What remains after filtering is for any training: top-K filtering of arXiv:2505.17895, over the
whole dataset where the paper takes the best of each batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import counts
from metalearn.algorithms.data_rater.algorithm import DataRater
from metalearn.algorithms.loss_weights.features import Examples
from metalearn.unroll import Eta


class Selection(NamedTuple):
    """The best examples of a dataset.

    Args:
      rows: [k] int64, ascending: their numbers in the dataset.
      threshold: the lowest score among them, the (1 - fraction) quantile of all scores.
    """

    rows: np.ndarray
    threshold: float


def rate_examples(algorithm: DataRater, eta: Eta, examples: Any, *, batch: int = 256) -> np.ndarray:
    """Return the score of every example: [n], on the host.

    The examples stay where they are, in memory or in a `numpy.memmap`; one batch at a time is on
    the device.

    Args:
      algorithm: whose rater scores them.
      eta: its parameters: `Trainer.learned(state)`.
      examples: (inputs, targets, ...), leaves [n, ...], such as `Text.windows()`.
      batch: examples scored at once.

    Raises:
      TypeError: for another algorithm.
      ValueError: for no examples, or inputs and targets of different lengths.
    """
    if not isinstance(algorithm, DataRater):
        raise TypeError(
            f"`rate_examples(algorithm=)` takes a `DataRater`, which has a network that scores "
            f"examples, not {type(algorithm).__name__}. What an example is worth to one training "
            "run: `metalearn.algorithms.attribute`."
        )
    counts("rate_examples", 1, batch=batch)
    pair = examples[0], examples[1]
    lengths = {len(leaf) for leaf in jax.tree.leaves(pair)}
    if len(lengths) != 1 or not max(lengths):
        raise ValueError(
            f"`rate_examples(examples=)` has inputs and targets of the lengths {sorted(lengths)}, "
            "but every example is one of each, and there is one at least: leaves [n, ...]."
        )
    (count,) = lengths
    size = min(batch, count)
    constants = jax.tree.map(jnp.asarray, algorithm.constants())

    @jax.jit
    def score(constants: Any, eta: Eta, pair: Any) -> jax.Array:
        bound: Any = algorithm.bind(constants)
        return bound.scores(eta, Examples(*pair))

    scores = []
    for begin in range(0, count, size):
        # The last batch is filled up with its last example, so that one program serves all.
        rows = np.minimum(np.arange(begin, begin + size), count - 1)
        part = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf[rows]), pair)
        scores.append(np.asarray(score(constants, eta, part)))
    return np.concatenate(scores)[:count]


def top_fraction(scores: np.ndarray, fraction: float, *, seed: int = 0) -> Selection:
    """Return the best share of the examples: round(fraction * n) rows, exactly.

    Among examples that tie for the last places, those that are kept are drawn at random: the order
    of a dataset, often by source, decides nothing.

    Args:
      scores: [n], a number for each example.
      fraction: the share to keep, between 0 and 1.
      seed: of the draw among ties.

    Raises:
      ValueError: for a fraction that keeps no example or every one, or scores that are not one
        finite number per example.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        missing = "" if scores.ndim != 1 else f", {(~np.isfinite(scores)).sum()} of them not finite"
        raise ValueError(
            f"`top_fraction(scores=)` is an array {[*scores.shape]}{missing}, but the best "
            "examples are chosen by one finite number per example, [n]."
        )
    count = round(fraction * len(scores)) if 0 < fraction < 1 else 0
    if not 0 < count < len(scores):
        raise ValueError(
            f"`top_fraction(fraction={fraction})` is a share of {len(scores):,} examples between 0 "
            "and 1 that keeps some of them and leaves some out, such as 0.5. To keep all of them "
            "needs no scores."
        )
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    best = shuffled[np.argsort(-scores[shuffled], kind="stable")[:count]]
    return Selection(np.sort(best), float(scores[best].min()))
