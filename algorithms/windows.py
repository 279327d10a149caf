"""Windows: the stretches of an inner training run over which a hyperparameter is constant.

T inner steps in N windows: window i holds the steps from edges[i] to edges[i + 1]. A
hyperparameter of each step on its own has a hypergradient so noisy that it cannot be
learned from; shared over a window of W steps, the hypergradient is the sum of those of its
steps (Micaelli & Storkey 2021, arXiv:2007.07869), whose error per step falls until the
window is longer than what the hyperparameter should vary over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Windows = int | tuple[int, ...]  # so many equal ones, or their edges: from 0 to the horizon


def edges(windows: Windows, horizon: int) -> np.ndarray:
    """Return where the windows begin, and the horizon last: [N + 1], int.

    Of equal windows, step t is in number floor(N t / T).

    Raises:
      ValueError: if the windows do not cover the horizon, or one of them is empty.
    """
    if not isinstance(windows, tuple):
        if not 1 <= windows <= horizon:
            raise ValueError(
                f"windows={windows}, but a horizon of {horizon} inner steps has at least one "
                f"window and at most {horizon}, one a step."
            )
        return -(-np.arange(windows + 1) * horizon // windows)
    given = np.asarray(windows)
    if len(given) < 2 or given[0] != 0 or given[-1] != horizon:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {windows} and "
            f"the horizon is {horizon}: they do not cover it. Write windows=(0, ..., {horizon})."
        )
    if (np.diff(given) < 1).any():
        raise ValueError(f"Edges of windows rise, each window holding a step; not {windows}.")
    return given


def stretched(found: Sequence[int], to: int) -> tuple[int, ...]:
    """Return the edges of the same windows of a run of `to` steps."""
    return tuple(int(edge) for edge in np.asarray(found) * to // found[-1])


def window_of(step: jax.Array, found: np.ndarray) -> jax.Array:
    """Return the number of the window that a step is in: (), int32."""
    return jnp.searchsorted(jnp.asarray(found[1:-1], jnp.int32), step, side="right")


def shared(per_step: Any, found: np.ndarray) -> Any:
    """Return the hypergradient of windows, leaves [N, ...], from that of steps, [T, ...].

    One reverse pass through an unshared run thus gives every window size at once.
    """
    return jax.tree.map(lambda leaf: jnp.add.reduceat(leaf, jnp.asarray(found[:-1])), per_step)


def spread(per_window: Any, found: Sequence[int] | np.ndarray) -> Any:
    """Return each step's value, leaves [T, ...], from those of windows, [N, ...]."""
    lengths = np.diff(np.asarray(found))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, lengths, axis=0), per_window)
