"""What is reported of a task: its outer loss, its inner loop, and what its algorithm adds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalearn.engines import Aux
from metalearn.evaluation import merged


def step_metrics(loss: jax.Array, aux: Aux) -> dict[str, jax.Array]:
    """Return the metrics of a task in an outer step; see `Trainer.step`."""
    return merged({"loss": loss, **_inner_metrics(aux)}, aux.metrics)


def _inner_metrics(aux: Aux) -> dict[str, jax.Array]:
    losses, finite, update_norm, tangent_norm = aux.inner
    if not losses.size:
        return {}
    moved = {"inner_update_norm": update_norm.mean()} if update_norm.size else {}
    pushed = {"inner_tangent_norm": tangent_norm[-1].max()} if tangent_norm.size else {}
    fine = finite.all(1) & jnp.isfinite(tangent_norm).all(1)
    return {
        "inner_loss_first": losses[0].mean(),
        "inner_loss_last": losses[-1].mean(),
        "inner_finite": finite.mean(),
        "inner_steps_finite": jnp.cumprod(fine).sum(),
        **moved,
        **pushed,
    }
