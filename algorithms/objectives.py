"""Objectives: outputs, targets -> loss (), metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, Shaped

from metalearn._utils.labels import compare
from metalearn.unroll import Metrics

Objective = Callable[[Any, Any], tuple[jax.Array, Metrics]]


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Shaped[Array, "..."]
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy: logits [n, classes], labels [n] int -> mean loss (), accuracy in 0..1."""
    labels = check_labels("cross_entropy", logits, labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}


def squared_error(
    outputs: Num[Array, "..."], targets: Num[Array, "..."]
) -> tuple[Num[Array, ""], Metrics]:
    """Squared error: outputs and targets [n, ...] -> mean squared error (), no metrics."""
    if outputs.shape != targets.shape:
        raise ValueError(
            f"`squared_error` takes outputs and targets of one shape, not "
            f"{list(outputs.shape)} and {list(targets.shape)}. For classes take `cross_entropy`."
        )
    return jnp.mean((outputs - targets) ** 2), {}


def weighted_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Shaped[Array, "..."],
    label_smoothing: jax.typing.ArrayLike = 0.0,
    class_weights: Float[Array, " classes"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy with hyperparameters that can be learned: mean loss (), accuracy in 0..1.

    Args:
      logits: [n, classes].
      labels: [n] int.
      label_smoothing: (), in 0..1: the share of each target distributed over all classes.
      class_weights: [classes], the weight of a loss by its label; None: all one.
    """
    labels = check_labels("weighted_cross_entropy", logits, labels)
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    share = jnp.asarray(label_smoothing)
    losses = -(1 - share) * right - share * log_p.mean(-1)
    if class_weights is not None:
        losses = losses * class_weights[labels]
    return losses.mean(), {"accuracy": (logits.argmax(-1) == labels).mean()}


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
