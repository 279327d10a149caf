"""Objectives: outputs, targets -> loss (), metrics.

A loss is a mean over examples. Where targets are `metalearn.Masked`, it is the mean over those that
count, so that tasks of unequal size can be padded to one shape; without any it is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, Shaped

from metalearn._utils.labels import compare
from metalearn.unroll import Masked, Metrics

Objective = Callable[[Any, Any], tuple[jax.Array, Metrics]]
Mean = Callable[[jax.Array], jax.Array]


def unmasked(targets: Any) -> tuple[Any, Mean]:
    """Return (targets, the mean over the examples that count: values [n, ...] -> ()).

    Targets of padding are replaced by zeros, which are labels and numbers of any loss.
    """
    if not isinstance(targets, Masked):
        return targets, jnp.mean
    values, mask = targets

    def along(array: jax.Array) -> jax.Array:
        if array.shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"`Masked` has a mask {list(mask.shape)} beside targets or losses "
                f"{list(array.shape)}, but it says of every example whether it counts: the shape "
                "of the mask is that of the first axes of the targets."
            )
        return jnp.broadcast_to(
            mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim)), array.shape
        )

    def mean(array: jax.Array) -> jax.Array:
        counted = along(array)
        kind = array.dtype if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.float32
        total = jnp.where(counted, array, 0).sum(dtype=kind)
        return total / jnp.maximum(counted.sum(), 1).astype(kind)

    return jnp.where(along(values), values, jnp.zeros_like(values)), mean


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Shaped[Array, "..."] | Masked
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy: logits [n, classes], labels [n] int -> mean loss (), accuracy in 0..1."""
    values, mean = unmasked(labels)
    labels = check_labels("cross_entropy", logits, values)
    loss = mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    return loss, {"accuracy": mean(logits.argmax(-1) == labels)}


def squared_error(
    outputs: Num[Array, "..."], targets: Num[Array, "..."] | Masked
) -> tuple[Num[Array, ""], Metrics]:
    """Squared error: outputs and targets [n, ...] -> mean squared error (), no metrics."""
    values, mean = unmasked(targets)
    if outputs.shape != values.shape:
        way_out = "For classes take `cross_entropy`."
        if outputs.shape == (*values.shape, 1):
            way_out = "Give the targets that axis too: `targets[..., None]`."
        raise ValueError(
            f"`squared_error` takes outputs and targets of one shape, not "
            f"{list(outputs.shape)} and {list(values.shape)}. {way_out}"
        )
    return mean((outputs - values) ** 2), {}


def weighted_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Shaped[Array, "..."] | Masked,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    class_weights: Float[Array, " classes"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy with hyperparameters that can be learned: mean loss (), accuracy in 0..1.

    Args:
      logits: [..., classes].
      labels: [...] int.
      label_smoothing: (), in 0..1: the share of each target distributed over all classes, but for
        those whose logit is the least number of its dtype, as of classes without support examples.
      class_weights: [classes], the weight of a loss by its label; None: all one.
    """
    values, mean = unmasked(labels)
    labels = check_labels("weighted_cross_entropy", logits, values)
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    share = jnp.asarray(label_smoothing)
    possible = logits > jnp.finfo(logits.dtype).min  # others are classes that a task has not
    over_all = jnp.mean(log_p, -1, where=possible)
    losses = -(1 - share) * right - share * over_all
    if class_weights is not None:
        losses = losses * class_weights[labels]
    return mean(losses), {"accuracy": mean(logits.argmax(-1) == labels)}


def check_labels(
    what: str, logits: Float[Array, "*batch classes"], labels: Shaped[Array, "..."]
) -> Int[Array, "*batch"]:
    """Return the labels, negative ones replaced by a label that is out of range.

    The loss of a label beyond the outputs is NaN; that of -1 would be the loss of the last class.
    A known range of the labels is compared with the outputs (`metalearn._utils.labels`).

    Raises:
      ValueError: unless labels are integers, one per row of logits, and none is known to be
        beyond the outputs.
    """
    if not (jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]):
        one_hot = labels.shape == logits.shape
        raise ValueError(
            f"`{what}` takes logits [..., classes] and one integer label for each, but the logits "
            f"are {list(logits.shape)} and the labels {labels.dtype}{list(labels.shape)}. "
            + ("Labels that are one-hot: `labels.argmax(-1)`. " if one_hot else "")
            + "A regression takes `squared_error`."
        )
    compare(what, logits.shape[-1])
    if jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        return labels
    beyond = jnp.iinfo(labels.dtype).max
    return jnp.where(labels < 0, jnp.asarray(beyond, labels.dtype), labels)
