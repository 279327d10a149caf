"""How well a score separates two groups: the area under the ROC curve, inside jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def auc(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """Return the chance that a positive scores above a negative, ties counting half.

    Mann and Whitney's rank statistic, exact with ties; NaN where a group is empty or a
    score is NaN.

    Args:
      scores: [n] real.
      positive: [n] bool.

    Returns:
      (): 1 where every positive is above every negative, 0.5 where the score says nothing.
    """
    ordered = jnp.sort(scores)
    below = jnp.searchsorted(ordered, scores, side="left")
    through = jnp.searchsorted(ordered, scores, side="right")
    ranks = (below + through + 1) / 2  # from 1; equals share the mean of theirs
    positives = positive.sum()
    mean_rank = jnp.where(positive, ranks, 0).sum() / positives
    area = (mean_rank - (positives + 1) / 2) / (~positive).sum()
    return jnp.where(jnp.isnan(scores).any(), jnp.nan, area)
