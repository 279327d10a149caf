"""A function over a batch, its results averaged, all at once or a chunk at a time.

Chunks bound memory, and on a CPU they are often faster too: the activations of a few
tasks stay in cache. Results agree up to the order of a floating-point sum.

The average over devices, in one piece: a message costs its latency however short it is.

A meta-gradient has a leaf for every array of eta, and there are a dozen metrics. One all-reduce
each would be a hundred waits for the slowest device. Laid end to end in one vector, they are one.
The vector has the widest dtype among them, so none loses digits.

How the tasks of an outer step divide among devices, and each device's share into chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import is_integer
from metalearn._utils.trees import split
from metalearn.sharding.mesh import format_devices
from metalearn.sizes import MOST_TASKS


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


def all_reduce_mean(tree: Any, axis: str, whole: bool = True) -> Any:
    """Return the mean of each leaf over a mesh axis that is mapped by hand.

    Args:
      tree: leaves of inexact dtypes.
      axis: its name.
      whole: whether each device has all of every leaf. Where some are cut along another axis,
        laying them end to end would gather them: arrays then travel one by one, and the scalars
        together.
    """
    together, alone, join = split(tree, lambda leaf: whole or not leaf.ndim)
    return join(_end_to_end(together, axis), [jax.lax.pmean(leaf, axis) for leaf in alone])


def _end_to_end(leaves: list[jax.Array], axis: str) -> list[jax.Array]:
    if not leaves:
        return []
    dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
    packed = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    parts = jnp.split(jax.lax.pmean(packed, axis), list(ends)[:-1])
    pairs = zip(parts, leaves, strict=True)
    return [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in pairs]


SHOWN = 16  # of the numbers that fit


def check_tasks(tasks_per_step: int, chunk: int | None) -> None:
    """Raise ValueError for what is no number of tasks, or of those that are unrolled at once."""
    for name, value in (("tasks_per_step", tasks_per_step), ("chunk", chunk)):
        if not is_integer(value) and not (name == "chunk" and value is None):
            raise ValueError(f"{name}={value!s:.80}: it is a number of tasks, an integer.")
    if tasks_per_step < 1:
        raise ValueError(f"An outer step takes at least one task, not {tasks_per_step}.")
    if tasks_per_step > MOST_TASKS:
        raise ValueError(
            f"An outer step takes {MOST_TASKS:,} tasks at most, not {tasks_per_step:,}: take "
            "fewer, and more outer steps."
        )
    if chunk is not None and (chunk < 1 or tasks_per_step % chunk):
        raise ValueError(
            f"tasks_per_step={tasks_per_step} does not divide into chunks of {chunk}. Chunks "
            f"that fit: {divisors(tasks_per_step)}."
        )


def divisors(number: int) -> str:
    """Return the numbers that divide one, as a text; where they are many, those at the ends.

    >>> divisors(12), divisors(10**6)[:32]
    ('1, 2, 3, 4, 6, 12', '1, 2, 4, 5, 8, 10, 16, 20, ..., ')
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    found = [*low, *(number // n for n in reversed(low) if n * n != number)]
    if len(found) <= SHOWN:
        return ", ".join(map(str, found))
    half = SHOWN // 2
    return f"{', '.join(map(str, found[:half]))}, ..., {', '.join(map(str, found[-half:]))}"


def check_shares(tasks_per_step: int, devices: int, chunk: int | None) -> None:
    """Raise ValueError where tasks do not divide among devices, or a share into chunks."""
    share, surplus = divmod(tasks_per_step, devices)
    if surplus:
        near = [str(size) for size in (share * devices, (share + 1) * devices) if size]
        fitting = f"sizes that do are {' and '.join(near)}" if share else f"size is {near[0]}"
        raise ValueError(
            f"tasks_per_step={tasks_per_step} does not divide by the {format_devices(devices)} that take "
            f"tasks. The nearest {fitting}."
        )
    if not _in_chunks(share, chunk):
        raise ValueError(
            f"tasks_per_step={tasks_per_step} on {format_devices(devices)} is {share} tasks on each, "
            f"which do not divide into chunks of {chunk}. Chunks that fit: {divisors(share)}."
        )


def most_devices(tasks_per_step: int, chunk: int | None, there: int, processes: int = 1) -> int:
    """Return the most devices that tasks divide among, as many of each process; 0: none.

    >>> most_devices(16, None, 8), most_devices(10, None, 8), most_devices(9, None, 8, processes=2)
    (8, 5, 0)
    >>> most_devices(24, 4, 4)  # 6 tasks on each of 4 devices are no whole chunks of 4
    3
    """
    fitting = [
        count
        for count in range(processes, there + 1, processes)
        if tasks_per_step % count == 0 and _in_chunks(tasks_per_step // count, chunk)
    ]
    return max(fitting, default=0)


def at_once(share: int, chunk: int | None) -> int:
    """Return how many tasks of a device's share are unrolled at once."""
    return share if chunk is None else min(share, chunk)


def _in_chunks(share: int, chunk: int | None) -> bool:
    return share % at_once(share, chunk) == 0
