"""A lower bound of the memory of a run, to refuse sizes that cannot fit before allocating them.

A size with three zeros too many ends in a compiler error, or in a process that the system kills,
possibly hours into a run (a size of an evaluation). Shapes are known without computing: the bytes
of the arrays that every engine needs are added up and compared with the memory of the device. The
sum is a small part of an outer step's memory: a size that it refuses cannot run, and
`metalearn plan` tells what fits.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn._utils.device_memory import device_memory, show_bytes
from metalearn._utils.trees import is_array
from metalearn.algorithm import Algorithm, unroll_of
from metalearn.tasks import Tasks
from metalearn.unroll import horizon

ANYWHERE = 2**30  # bytes that are never refused, whatever memory a device reports


def nbytes(shapes: Any) -> int:
    """Return the bytes of the arrays, or shapes of arrays, of a pytree."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(shapes))


def check_learned(
    algorithm: Algorithm, optimizer: optax.GradientTransformation, devices: int = 1
) -> None:
    """Raise ValueError if eta and the outer optimizer's state do not fit `devices` devices."""
    eta = jax.eval_shape(jax.jit(algorithm.init), jax.eval_shape(lambda: jax.random.key(0)))
    needed = nbytes(eta) + nbytes(jax.eval_shape(optimizer.init, eta))
    most = device_memory() * devices
    if needed > max(most, ANYWHERE):
        leaves = jax.tree.leaves(eta)
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        raise ValueError(
            f"eta has {count:,} numbers and takes {show_bytes(needed)} with the outer optimizer's "
            f"state, but there are {show_bytes(most)}. Make the model smaller: its largest array "
            f"has shape {max((leaf.shape for leaf in leaves), key=math.prod)}."
        )


def check_tasks(
    algorithm: Algorithm,
    tasks: Tasks,
    at_once: int,
    steps: int | None = None,
    what: str = "",
    devices: int = 1,
) -> None:
    """Raise ValueError if the inner loops of `at_once` tasks do not fit their devices.

    Args:
      algorithm: in training, or in evaluation.
      tasks: the distribution to draw from.
      at_once: tasks that are unrolled at once.
      steps: inner steps whose batches are in memory at once; None: all T.
      what: for the message, such as "An outer step".
      devices: that share these inner loops (the mesh axes "data", "model", "tangents").
    """
    try:
        parts = _parts(algorithm, tasks, steps)
    except (
        Exception
    ):  # a problem that cannot be traced is refused by the outer step, with the reason
        return
    most, needed = device_memory() * devices, at_once * sum(parts.values())
    if needed > max(most, ANYWHERE):
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"{what or 'An outer step'} takes {show_bytes(needed)} at least, but there are "
            f"{show_bytes(most)}: {at_once:,} tasks at once (`chunk`), and for each of them "
            f"{show_bytes(parts[largest])} of {largest}. Take fewer tasks at once, or make that "
            "smaller."
        )


def _parts(algorithm: Algorithm, tasks: Tasks, steps: int | None) -> dict[str, int]:
    """Return the bytes of a task that no other task shares, by kind."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    eta = jax.eval_shape(algorithm.init, key)
    episode = jax.eval_shape(tasks.sample, key)
    batches = jax.eval_shape(algorithm.batches, episode, key)
    state = jax.eval_shape(
        lambda eta, episode, key: unroll_of(algorithm, episode, key).init(eta), eta, episode, key
    )
    total = horizon(batches)
    share = 1.0 if steps is None else min(steps, total) / max(total, 1)
    # Data that episodes contain unchanged, and read by rows, are in memory once.
    shared = {_kind(leaf) for leaf in jax.tree.leaves(tasks) if is_array(leaf)}
    own = [leaf for leaf in jax.tree.leaves(episode) if _kind(leaf) not in shared]
    return {
        "examples (shots, queries, or the length and number of windows)": nbytes(own),
        f"batches of {total:,} inner steps (the horizon, and the batch)": int(
            share * nbytes(batches)
        ),
        "inner state (the model, and the inner optimizer)": nbytes(state),
    }


def _kind(leaf: Any) -> tuple[Any, ...]:
    return jnp.shape(leaf), jnp.result_type(leaf)


def _leaf_bytes(leaf: Any) -> int:
    dtype = jnp.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return 8 * math.prod(jnp.shape(leaf))  # keys: two words of 32 bits, or more
    return int(np.dtype(dtype).itemsize) * math.prod(jnp.shape(leaf))
