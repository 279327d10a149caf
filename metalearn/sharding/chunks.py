"""A function over a batch, its results averaged, all at once or a chunk at a time.

Chunks bound memory, and on a CPU they are often faster too: the activations of a few
tasks stay in cache. Results agree up to the order of a floating-point sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_over(function: Callable[[Any], Any], inputs: Any, chunk: int | None) -> Any:
    """Return the mean of `function` over the leading axis of `inputs`, leaves [n, ...].

    `chunk` must divide n; None takes all n at once. Integer and boolean results are
    averaged as floats.
    """
    return mean_and_each(lambda one: (function(one), ()), inputs, chunk)[0]


def mean_and_each(
    function: Callable[[Any], tuple[Any, Any]], inputs: Any, chunk: int | None
) -> tuple[Any, Any]:
    """Return (the mean of what `function` returns first, what it returns second: [n, ...])."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    if chunk is None or chunk == count:
        total, each = _sum_and_each(function, inputs)
        return _scaled(total, count), each

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        summed, each = _sum_and_each(function, part)
        return jax.tree.map(jnp.add, total, summed), each

    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes, _ = jax.eval_shape(lambda part: _sum_and_each(function, part), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, each = jax.lax.scan(add, zeros, parts)
    return _scaled(total, count), jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), each)


def _sum_and_each(function: Callable[[Any], tuple[Any, Any]], part: Any) -> tuple[Any, Any]:
    if jax.tree.leaves(part)[0].shape[0] == 1:  # a plain matmul beats a batched one of size 1
        summed, each = function(jax.tree.map(lambda x: x[0], part))
        return jax.tree.map(_as_float, summed), jax.tree.map(lambda x: x[None], each)
    averaged, each = jax.vmap(function)(part)
    return jax.tree.map(lambda x: _as_float(x).sum(0), averaged), each


def _as_float(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _scaled(total: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x / count, total)
