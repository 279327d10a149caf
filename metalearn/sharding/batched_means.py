"""Means over the tasks of an outer step: over chunks on a device, and over devices.

The tasks of an outer step divide among the devices (a device's share), and a share into chunks.

- A chunk is vmapped, and chunks are scanned. Chunks bound memory, and on a CPU they are often
  faster too, because the activations of one task stay in the cache: where the largest factor of
  a product (weights, patches) times the tasks is more than 8 MiB, one at a time is the default
  there (`experiments/benchmarks/maml.py --at-once` measures it). Results agree up to the order of a
  floating-point sum.
- The mean over devices is one all-reduce of one vector. A message costs its latency however short
  it is. With one all-reduce for every leaf of a meta-gradient and every metric, an outer step
  would wait for the slowest device a hundred times. The vector has the widest dtype of its parts,
  so none loses precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import MOST_TASKS, is_integer
from metalearn._utils.trees import is_differentiable, precise, split
from metalearn.cost.jaxpr import largest_factor
from metalearn.sharding.mesh import format_devices

CACHE = 8 * 2**20  # bytes of the largest factors of all inputs that a CPU takes at once
LARGE = 1024  # entries of a leaf whose sum over inputs is a product


def mean_and_each(
    function: Callable[[Any], tuple[Any, Any]], inputs: Any, chunk: int | None
) -> tuple[Any, Any]:
    """Apply `function` to every input; return the mean of its first output, and all the second.

    Args:
      function: input -> (output to average, output to return for each input). Sums are in float32
        at least, means in the dtype of the outputs; of integers and booleans in float32.
      inputs: leaves [n, ...].
      chunk: inputs that are vmapped at once, a divisor of n; None: all n, or on a CPU one where n
        of them would outgrow the cache.

    Returns:
      (means, second outputs with leaves [n, ...]).
    """
    count = jax.tree.leaves(inputs)[0].shape[0]
    function = jax.jit(function, inline=True)  # traced once, for the choice, shapes and the scan
    one = jax.tree.map(lambda x: x[0], inputs)
    like, _ = jax.eval_shape(function, one)
    if chunk is None:
        chunk = 1 if outgrow_cache(count, function, one) else count
    if chunk == count:
        total, each = _sum_and_each(function, inputs)
        return _divide(total, count, like), each

    def add(total: Any, inputs: Any) -> tuple[Any, Any]:
        summed, each = _sum_and_each(function, inputs)
        return jax.tree.map(jnp.add, total, summed), each

    chunks = jax.tree.map(lambda x: x.reshape(count // chunk, chunk, *x.shape[1:]), inputs)
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes, _ = jax.eval_shape(lambda inputs: _sum_and_each(function, inputs), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, each = jax.lax.scan(add, zeros, chunks)
    return _divide(total, count, like), jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), each)


def outgrow_cache(count: int, function: Callable[..., Any], *args: Any) -> bool:
    """Return whether `count` calls at once are too large for a CPU: their largest factor is."""
    if count == 1 or jax.default_backend() != "cpu":
        return False
    return count * largest_factor(jax.make_jaxpr(function)(*args)) > CACHE


def _sum_and_each(function: Callable[[Any], tuple[Any, Any]], inputs: Any) -> tuple[Any, Any]:
    if jax.tree.leaves(inputs)[0].shape[0] == 1:  # a plain matmul is faster than a batch of one
        outputs, each = function(jax.tree.map(lambda x: x[0], inputs))
        return jax.tree.map(precise, outputs), jax.tree.map(lambda x: x[None], each)
    outputs, each = jax.vmap(function)(inputs)
    return jax.tree.map(lambda x: sum_over_tasks(precise(x)), outputs), each


def sum_over_tasks(x: jax.Array) -> jax.Array:
    """Return the sum [...] over the first axis of x [n, ...].

    Of large leaves it is a product with ones: XLA of jax 0.10 takes many times as long for the sum
    on a CPU, as long as for a tenth of an outer step of MAML.
    """
    if math.prod(x.shape[1:]) < LARGE:
        return x.sum(0)
    return jnp.tensordot(jnp.ones(x.shape[0], x.dtype), x, 1, precision="highest")


def _divide(total: Any, count: int, like: Any) -> Any:
    """Return the mean in the dtype of what was summed; of integers and booleans in that of it."""

    def divided(x: jax.Array, output: Any) -> jax.Array:
        return (x / count).astype(output.dtype if is_differentiable(output) else x.dtype)

    return jax.tree.map(divided, total, like)


def all_reduce_mean(tree: Any, axis: str, whole: bool = True) -> Any:
    """Return the mean of each leaf over a manual axis of a mesh (`jax.shard_map`).

    Args:
      tree: leaves of inexact dtypes.
      axis: the name of the axis.
      whole: whether every leaf is whole on each device: all leaves then share one all-reduce. If
        some are sharded along another axis, concatenating them would gather them: only the
        scalars then share an all-reduce.
    """
    packed, single, join = split(tree, lambda leaf: whole or not leaf.ndim)
    means = []
    if packed:
        dtype = jnp.result_type(*(leaf.dtype for leaf in packed))
        vector = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in packed])
        ends = itertools.accumulate(leaf.size for leaf in packed)
        parts = jnp.split(jax.lax.pmean(vector, axis), list(ends)[:-1])
        pairs = zip(parts, packed, strict=True)
        means = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in pairs]
    return join(means, [jax.lax.pmean(leaf, axis) for leaf in single])


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
    numbers = [*low, *(number // n for n in reversed(low) if n * n != number)]
    if len(numbers) <= SHOWN:
        return ", ".join(map(str, numbers))
    half = SHOWN // 2
    return f"{', '.join(map(str, numbers[:half]))}, ..., {', '.join(map(str, numbers[-half:]))}"


def check_shares(tasks_per_step: int, devices: int, chunk: int | None) -> None:
    """Raise ValueError if tasks do not divide among devices, or a share into chunks."""
    share, surplus = divmod(tasks_per_step, devices)
    if surplus:
        sizes = [str(size) for size in (share * devices, (share + 1) * devices) if size]
        nearest = f"sizes that do are {' and '.join(sizes)}" if share else f"size is {sizes[0]}"
        data = (
            f" Or let several devices share the inner run of a task: a mesh of tasks="
            f"{tasks_per_step} and data=N, whose devices divide the examples of an inner batch."
        )
        raise ValueError(
            f"tasks_per_step={tasks_per_step} does not divide by the {format_devices(devices)} "
            f"that take tasks. The nearest {nearest}.{'' if share else data}"
        )
    if not _in_chunks(share, chunk):
        raise ValueError(
            f"tasks_per_step={tasks_per_step} on {format_devices(devices)} is {share} tasks on "
            f"each, which do not divide into chunks of {chunk}. Chunks that fit: {divisors(share)}."
        )


def most_devices(tasks_per_step: int, chunk: int | None, devices: int, processes: int = 1) -> int:
    """Return the most devices, equally many of each process, that tasks divide among; 0: none.

    >>> most_devices(16, None, 8), most_devices(10, None, 8), most_devices(9, None, 8, processes=2)
    (8, 5, 0)
    >>> most_devices(24, 4, 4)  # 6 tasks on each of 4 devices do not divide into chunks of 4
    3
    """
    fitting = [
        count
        for count in range(processes, devices + 1, processes)
        if tasks_per_step % count == 0 and _in_chunks(tasks_per_step // count, chunk)
    ]
    return max(fitting, default=0)


def at_once(share: int, chunk: int | None) -> int:
    """Return how many tasks of a device's share are unrolled at once."""
    return share if chunk is None else min(share, chunk)


def _in_chunks(share: int, chunk: int | None) -> bool:
    return share % at_once(share, chunk) == 0
