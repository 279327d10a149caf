"""The mean of a function over a batch, all at once or a chunk at a time.

Chunks bound memory, and on a CPU they are often faster too: the activations of a few
tasks stay in cache. Results agree up to the order of a floating-point sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_over(function: Callable[[Any], Any], inputs: jax.Array, chunk: int | None) -> Any:
    """Return the mean of `function` over the leading axis of `inputs` [n, ...].

    `chunk` must divide n; None takes all n at once. Integer and boolean results are
    averaged as floats.
    """
    count = inputs.shape[0]
    if chunk is None or chunk == count:
        return _scaled(_sum_over(function, inputs), count)

    def add(total: Any, part: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _sum_over(function, part)), None

    parts = inputs.reshape(-1, chunk, *inputs.shape[1:])
    shapes = jax.eval_shape(lambda part: _sum_over(function, part), parts[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return _scaled(total, count)


def _sum_over(function: Callable[[Any], Any], part: jax.Array) -> Any:
    if part.shape[0] == 1:  # no batch axis: a plain matmul beats a batched one of size 1
        return jax.tree.map(_as_float, function(part[0]))
    return jax.tree.map(lambda x: _as_float(x).sum(0), jax.vmap(function)(part))


def _as_float(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _scaled(total: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x / count, total)
