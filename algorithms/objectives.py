"""Losses with the metrics people read beside them: outputs, targets -> loss, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Objective = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify: logits [n, classes], labels [n] int -> mean loss (), accuracy in 0..1."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"accuracy": (logits.argmax(-1) == labels).mean()}


def squared_error(outputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Regress: outputs and targets [n, ...] -> mean squared error (), no metrics."""
    return jnp.mean((outputs - targets) ** 2), {}


def weighted_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    class_weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classify, with hyperparameters that can be learned.

    Args:
      logits: [n, classes].
      labels: [n] int.
      label_smoothing: (), in 0..1: the share of each target spread over all classes.
      class_weights: [classes], of the losses by their label; None: all one.
    """
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    share = jnp.asarray(label_smoothing)
    losses = -(1 - share) * right - share * log_p.mean(-1)
    if class_weights is not None:
        losses = losses * class_weights[labels]
    return losses.mean(), {"accuracy": (logits.argmax(-1) == labels).mean()}
