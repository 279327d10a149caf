"""Features of the examples of a batch, by name: the inputs of a learned loss weight.

A feature is a fact about an example, not a way for the inner gradient to reach it, so no
derivative by theta passes through a weight in the inner step. The one feature of
Meta-Weight-Net (Shu et al. 2019, arXiv:1902.07379) is the loss of the example.

| name           | width   | what                                                         |
|----------------|---------|--------------------------------------------------------------|
| "loss"         | 1       | loss of the token, in nats                                   |
| "log_loss"     | 1       | log(1 + loss of the token)                                   |
| "example_loss" | 1       | mean loss of the example's tokens, in nats                   |
| "spread"       | 1       | standard deviation of the loss over those tokens, in nats    |
| "position"     | 1       | place in the sequence, from -1 to 1                          |
| "source"       | sources | which source the example is of, one-hot                      |

`auc` measures how well a score separates two groups: the area under the ROC curve, inside jit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import is_integer, pick


class Seen(NamedTuple):
    """What is known of the examples of a batch before they are weighted."""

    losses: jax.Array  # [batch, S]; S = 1 where an example has one loss
    source: jax.Array  # [batch] int32: which domain an example is of; 0 where nobody says


def features(names: Sequence[str], seen: Seen, sources: int = 0) -> jax.Array:
    """Return the named features side by side: [batch, S, width]."""
    batch, length = seen.losses.shape
    columns = [pick(FEATURES, name, "feature")(seen, sources) for name in names]
    wide = [jnp.broadcast_to(column, (batch, length, column.shape[-1])) for column in columns]
    return jnp.concatenate(wide, -1)


def check_names(what: str, names: Any) -> None:
    """Raise TypeError unless these are several names: a text is one, and would be its letters."""
    if not isinstance(names, tuple | list):
        raise TypeError(
            f"`{what}(features={names!r})`: they are a tuple of names, such as "
            f"features=({next(iter(FEATURES))!r},)."
        )


def width(names: Sequence[str], sources: int = 0) -> int:
    """Return how wide the named features are together."""
    if not names or not is_integer(sources) or sources < 0:
        raise ValueError(
            f"A weight looks at one feature at least, of a number of sources; not features={names} "
            f"and sources={sources}. There are: {', '.join(FEATURES)}."
        )
    for name in names:
        pick(FEATURES, name, "feature")
    if "source" in names and not sources:
        raise ValueError(
            "The feature 'source' is one-hot and needs to know how many sources there are: pass "
            "sources=n (`Text.sources`), or leave it out."
        )
    return sum(sources if name == "source" else 1 for name in names)


def _loss(seen: Seen, sources: int) -> jax.Array:
    del sources
    return seen.losses[..., None]


def _log_loss(seen: Seen, sources: int) -> jax.Array:
    del sources
    return jnp.log1p(seen.losses)[..., None]


def _example_loss(seen: Seen, sources: int) -> jax.Array:
    del sources
    return seen.losses.mean(-1, keepdims=True)[..., None]


def _spread(seen: Seen, sources: int) -> jax.Array:
    del sources
    return seen.losses.std(-1, keepdims=True)[..., None]


def _position(seen: Seen, sources: int) -> jax.Array:
    del sources
    return jnp.linspace(-1.0, 1.0, seen.losses.shape[-1], dtype=seen.losses.dtype)[None, :, None]


def _source(seen: Seen, sources: int) -> jax.Array:
    return jax.nn.one_hot(seen.source, sources, dtype=seen.losses.dtype)[:, None]


FEATURES: dict[str, Callable[[Seen, int], jax.Array]] = {
    "loss": _loss,
    "log_loss": _log_loss,
    "example_loss": _example_loss,
    "spread": _spread,
    "position": _position,
    "source": _source,
}


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
