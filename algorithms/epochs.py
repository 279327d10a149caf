"""A long training run reads its data by number: nothing is stacked, whatever T is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.pixels import are_pixels

MOST = 2**31 - 1


def check_reads(what: str, steps: int, batch: int) -> None:
    """Raise ValueError for a run that reads more examples than 32 bits can count."""
    if steps * batch > MOST:
        raise ValueError(
            f"`{what}` reads {steps:,} x {batch:,} examples in a run, which are counted in 32 "
            f"bits, up to {MOST:,}. Take fewer inner steps, or smaller batches."
        )


def epochs(rows: jax.Array, steps: jax.Array, batch: int, key: jax.Array) -> jax.Array:
    """Return the rows [t, batch] of steps [t], numbers one after the other, from any on.

    All of `rows` [n] come before any comes again. No more epochs are drawn than the steps touch.
    """
    n = len(rows)
    if batch > n:
        raise ValueError(f"batch={batch}, but there are {n} training examples.")
    first = steps[0] * batch // n
    touched = -(-len(steps) * batch // n) + 1
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(first + jnp.arange(touched))
    drawn = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys).reshape(-1)
    begins = steps * batch - first * n  # within what was drawn
    places = begins[:, None] + jnp.arange(batch)[None]
    return drawn[places]


def read(data: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (inputs, targets) of these rows; images of uint8 are read as 0..1.

    Raises:
      ValueError: of uint8 that are no images. See `metalearn._utils.pixels`.
    """
    inputs, targets = data[0][rows], data[1][rows]
    pixels = are_pixels("An inner step", inputs.dtype, inputs.shape[1:])
    return (inputs / 255.0 if pixels else inputs), targets
