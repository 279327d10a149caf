"""Features of the examples of a batch, by name: the inputs of a learned loss weight.

The inner gradient treats features as constants: no derivative by theta passes through a weight in
the inner step. The only feature of Meta-Weight-Net (Shu et al. 2019, arXiv:1902.07379) is the loss
of the example.

| name           | width   | feature                                                      |
|----------------|---------|--------------------------------------------------------------|
| "loss"         | 1       | loss of the token, in nats                                   |
| "log_loss"     | 1       | log(1 + loss of the token)                                   |
| "example_loss" | 1       | mean loss of the example's tokens, in nats                   |
| "spread"       | 1       | standard deviation of the loss over those tokens, in nats    |
| "position"     | 1       | position in the sequence, from -1 to 1                       |
| "source"       | sources | the source that the example comes from, one-hot              |

`auc` measures how well a score separates two groups: the area under the ROC curve, inside jit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metalearn._utils.checks import is_integer, pick


class Examples(NamedTuple):
    """Examples without a source, leaves [T, batch, ...], with the fields of those of `Text`."""

    inputs: Any
    targets: Any
    source: None = None
    corrupted: None = None


class WeightInputs(NamedTuple):
    """What the weights of a batch are computed from.

    losses: [batch, S], of each token; S = 1 for examples with one loss.
    source: [batch] int32, the domain of each example; 0 where the tasks have no domains.
    """

    losses: Float[Array, "batch S"]
    source: Int[Array, " batch"]


def features(
    names: Sequence[str], inputs: WeightInputs, sources: int = 0
) -> Float[Array, "batch S width"]:
    """Return the named features, concatenated: [batch, S, width]."""
    batch, length = inputs.losses.shape
    columns = [pick(FEATURES, name, "feature")(inputs, sources) for name in names]
    wide = [jnp.broadcast_to(column, (batch, length, column.shape[-1])) for column in columns]
    return jnp.concatenate(wide, -1)


def check_names(what: str, names: Any) -> None:
    """Raise TypeError unless `names` is a tuple or list; a string would be read as its letters."""
    if not isinstance(names, tuple | list):
        raise TypeError(
            f"`{what}(features={names!r})`: they are a tuple of names, such as "
            f"features=({next(iter(FEATURES))!r},)."
        )


def width(names: Sequence[str], sources: int = 0) -> int:
    """Return the total width of the named features."""
    if not names or not is_integer(sources) or sources < 0:
        raise ValueError(
            f"A weight reads at least one feature, of a number of sources; not features={names} "
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


def _loss(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    del sources
    return inputs.losses[..., None]


def _log_loss(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    del sources
    return jnp.log1p(inputs.losses)[..., None]


def _example_loss(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    del sources
    return inputs.losses.mean(-1, keepdims=True)[..., None]


def _spread(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    del sources
    variance = inputs.losses.var(-1, keepdims=True)[..., None]
    spread = variance > 0  # the derivative of the root at zero, of equal losses, is infinite
    return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 0)


def _position(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    del sources
    length, dtype = inputs.losses.shape[-1], inputs.losses.dtype
    return jnp.linspace(-1.0, 1.0, length, dtype=dtype)[None, :, None]


def _source(inputs: WeightInputs, sources: int) -> Float[Array, "batch S width"]:
    return jax.nn.one_hot(inputs.source, sources, dtype=inputs.losses.dtype)[:, None]


FEATURES: dict[str, Callable[[WeightInputs, int], jax.Array]] = {
    "loss": _loss,
    "log_loss": _log_loss,
    "example_loss": _example_loss,
    "spread": _spread,
    "position": _position,
    "source": _source,
}


def auc(scores: Float[Array, " n"], positive: Bool[Array, " n"]) -> Float[Array, ""]:
    """Return the area under the ROC curve: the chance that a positive scores above a negative.

    Mann and Whitney's rank statistic; ties count half. NaN where a group is empty or a score is
    NaN.

    Args:
      scores: [n] real.
      positive: [n] bool.

    Returns:
      (): 1 where every positive is above every negative, 0.5 for uninformative scores.
    """
    ordered = jnp.sort(scores)
    below = jnp.searchsorted(ordered, scores, side="left")
    through = jnp.searchsorted(ordered, scores, side="right")
    ranks = (below + through + 1) / 2  # from 1; equal scores share the mean of their ranks
    positives = positive.sum()
    mean_rank = jnp.where(positive, ranks, 0).sum() / positives
    area = (mean_rank - (positives + 1) / 2) / (~positive).sum()
    return jnp.where(jnp.isnan(scores).any(), jnp.nan, area)
