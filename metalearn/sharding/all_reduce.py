"""The average over devices, in one piece: a message costs its latency however short it is.

A meta-gradient has a leaf for every array of eta, and there are a dozen metrics. One all-reduce
each would be a hundred waits for the slowest device. Laid end to end in one vector, they are one.
The vector has the widest dtype among them, so none loses digits.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import split


def mean_of_all(tree: Any, axis: str, whole: bool = True) -> Any:
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
