"""Tasks that are not finite are left out: one bad task need not spoil the mean of a batch.

A task whose inner run explodes has a NaN for a meta-gradient, and so has the mean over its
batch. Left out, its result counts as zero of a task that does not count, and the mean is over
the others. How many were left out is a metric: what is never looked at is never mended.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn.engines import Aux


def all_finite(loss: jax.Array, aux: Aux, grads: Any) -> jax.Array:
    """Say whether loss, metrics, meta-gradient and all that the inner loop saw are finite: ().

    Of the meta-gradient it is the squared norm that has to be, with room for the sum over tasks.
    """
    seen = [
        loss,
        aux.inner.losses,
        *jax.tree.leaves(aux.metrics),
        optax.tree.norm(grads) ** 2 * 1e4,
    ]
    fine = [jnp.isfinite(x).all() for x in seen]
    return jnp.stack([*fine, aux.inner.finite.all()]).all()


def or_zero(finite: jax.Array, found: Any) -> tuple[Any, ...]:
    """Return (*found, finite), with zeros for a task that is not finite."""
    kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), found)
    return (*kept, finite)


def mean_of_finite(means: Any, tasks: int) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Return (meta-gradient, metrics, number of tasks left out ()).

    `means` are those of what `or_zero` returned, over all tasks: (meta-gradient, metrics, share
    that is finite). Where none is, the metrics are NaN, for all to see, and the meta-gradient
    is zero.
    """
    grads, metrics, finite = means
    some = jnp.maximum(finite, 1 / tasks)
    grads = jax.tree.map(lambda x: x / some.astype(x.dtype), grads)
    metrics = jax.tree.map(lambda x: x / finite.astype(x.dtype), metrics)
    return grads, metrics, jnp.round((1 - finite) * tasks)
