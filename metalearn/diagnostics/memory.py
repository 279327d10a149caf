"""What cannot fit is refused before any of it is allocated.

A size with three zeros too many ends in an error of the compiler, or in a process that the
system kills, hours into a run where it is a size of evaluation. Shapes are known without
computing anything: here those that every engine needs are added up and held against the memory
there is. It is a lower bound, a small part of what an outer step takes: what it refuses cannot
run, and `metalearn plan` says what fits.
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
from metalearn.algorithm import Algorithm
from metalearn.tasks import Tasks
from metalearn.unroll import horizon

ANYWHERE = 2**30  # bytes that are tried whatever a device says it has


def nbytes(shapes: Any) -> int:
    """Return the bytes of the arrays, or shapes of arrays, of a pytree."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(shapes))


def check_learned(
    algorithm: Algorithm, optimizer: optax.GradientTransformation, devices: int = 1
) -> None:
    """Raise ValueError where eta and the outer optimizer's state do not fit `devices` devices."""
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
    algorithm: Algorithm, tasks: Tasks, at_once: int, steps: int | None = None, what: str = ""
) -> None:
    """Raise ValueError where the inner runs of `at_once` tasks do not fit a device.

    Args:
      algorithm: as it trains, or as it evaluates.
      tasks: where the tasks come from.
      at_once: tasks that are unrolled at once.
      steps: inner steps whose batches are there at once; None: all of a run.
      what: for the message, such as "An outer step".
    """
    try:
        parts = _parts(algorithm, tasks, steps)
    except Exception:  # what cannot be traced is refused by the outer step, which says why
        return
    most, needed = device_memory(), at_once * sum(parts.values())
    if needed > max(most, ANYWHERE):
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"{what or 'An outer step'} takes {show_bytes(needed)} at least, but there are "
            f"{show_bytes(most)}: {at_once:,} tasks at once (`chunk`), and for each of them "
            f"{show_bytes(parts[largest])} of {largest}. Take fewer tasks at once, or make that "
            "smaller."
        )


def _parts(algorithm: Algorithm, tasks: Tasks, steps: int | None) -> dict[str, int]:
    """Return the bytes that a task needs for its own, by what they are."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    eta = jax.eval_shape(algorithm.init, key)
    episode = jax.eval_shape(tasks.sample, key)
    batches = jax.eval_shape(algorithm.batches, episode, key)
    state = jax.eval_shape(
        lambda eta, episode, key: algorithm.unroll(episode, key).init(eta), eta, episode, key
    )
    total = horizon(batches)
    share = 1.0 if steps is None else min(steps, total) / total
    # Data that episodes hand on as they are, and read by rows, are there once.
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
