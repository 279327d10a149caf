"""Windows: the stretches of an inner training run over which a hyperparameter is constant.

T inner steps in N windows: window i holds the steps from edges[i] to edges[i + 1]. A
hyperparameter of each step on its own has a hypergradient so noisy that it cannot be
learned from; shared over a window of W steps, the hypergradient is the sum of those of its
steps (Micaelli & Storkey 2021, arXiv:2007.07869), whose error per step falls until the
window is longer than what the hyperparameter should vary over.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import counts, is_integer

Windows = int | tuple[int, ...]  # so many equal ones, or their edges: from 0 to the horizon
LONGEST = 2**31 - 1  # inner steps


def edges(windows: Windows, horizon: int) -> np.ndarray:
    """Return where the windows begin, and the horizon last: [N + 1], int.

    Of equal windows, step t is in number floor(N t / T).

    Raises:
      ValueError: if the windows do not cover the horizon, or one of them is empty.
    """
    counts("edges", 1, horizon=horizon)
    if is_integer(windows):
        if not 1 <= windows <= horizon:
            raise ValueError(
                f"windows={windows}, but a horizon of {horizon} inner steps has at least one "
                f"window and at most {horizon}, one a step."
            )
        return -(-np.arange(windows + 1) * horizon // windows)
    check_windows(windows)
    given = np.asarray(windows)
    if given[-1] != horizon:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {windows!s:.80} "
            f"and the horizon is {horizon}: they do not cover it. Write windows=(0, ..., "
            f"{horizon})."
        )
    return given


def check_windows(windows: Any) -> None:
    """Raise ValueError unless these are windows of some horizon: a number of them, or edges.

    How many there may be is said where the horizon is known, by `edges`.
    """
    if is_integer(windows):
        return
    if not isinstance(windows, tuple):
        raise ValueError(
            f"windows={windows!s:.80} is neither a number of windows nor a tuple of their edges, "
            "such as windows=7 or windows=(0, 50, 100)."
        )
    shown = f"{windows!s:.80}"
    for edge in windows:
        if not is_integer(edge):
            raise ValueError(
                f"Edges of windows are inner steps, integers, not {edge!r:.80} in {shown}. Write "
                "windows=(0, ..., horizon)."
            )
    if len(windows) < 2 or windows[0] != 0:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {shown}: they "
            "do not cover it. Write windows=(0, ..., horizon)."
        )
    if any(after <= before for before, after in itertools.pairwise(windows)):
        raise ValueError(f"Edges of windows rise, each window holding a step; not {shown}.")
    if windows[-1] > LONGEST:
        raise ValueError(
            f"Inner steps are counted in 32 bits, up to {LONGEST}, but edges of windows go to "
            f"{windows[-1]}. Take a shorter run."
        )


def stretched(found: Sequence[int], to: int) -> tuple[int, ...]:
    """Return the edges of the same windows of a run of `to` steps, [N + 1].

    Step t of that run is in the window of step floor(t T / to) of the run of T steps. In a
    shorter run a window may hold no step: it then ends where it begins.
    """
    counts("stretched", 1, horizon=to)
    horizon = int(found[-1])
    return tuple(-(-int(edge) * int(to) // horizon) for edge in found)


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
