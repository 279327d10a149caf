"""The arithmetic of batch normalisation, for layers that keep statistics their own way."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance [channels] of x [..., channels]."""
    leading = tuple(range(x.ndim - 1))
    mean = x.mean(leading)
    return mean, jnp.maximum((x * x).mean(leading) - mean * mean, 0)


def normalized(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return x [..., channels], centred, scaled and moved; all else is [channels]."""
    along = (None,) * (x.ndim - 1)
    gain = scale * jax.lax.rsqrt(variance + 1e-5)
    return (x - mean[along]) * gain[along] + offset[along]
