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
