"""A long training run reads its data by number: nothing is stacked, whatever T is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def epochs(rows: jax.Array, steps: int, batch: int, key: jax.Array) -> jax.Array:
    """Return the rows [steps, batch] of each step: all of `rows` [n] before any comes again."""
    if batch > len(rows):
        raise ValueError(f"batch={batch}, but there are {len(rows)} training examples.")
    needed = steps * batch
    keys = jax.random.split(key, -(-needed // len(rows)))
    drawn = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    return drawn.reshape(-1)[:needed].reshape(steps, batch)


def read(data: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (inputs, targets) of these rows; inputs of uint8 are read as 0..1."""
    inputs, targets = data[0][rows], data[1][rows]
    return (inputs / 255.0 if inputs.dtype == jnp.uint8 else inputs), targets
