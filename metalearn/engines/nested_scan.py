"""A scan over nested segments, rematerialised: few inner states are saved for the backward pass.

Cut T steps into segments of b and save only the first state of each: T / b states, and b more
while a segment is recomputed. With b = sqrt(T) that is 2 sqrt(T) states, for one more forward
pass. Segments may be cut into segments in turn: L levels save about L T^(1/L) states, for L - 1
more forward passes (Griewank 1992; Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from metalearn.engines.grad_recorder import Inner, joined
from metalearn.unroll import Batch, InnerState, horizon

Body: TypeAlias = Callable[[InnerState, Batch], tuple[InnerState, Inner]]  # of a scan


def nested_scan(
    body: Body,
    state: InnerState,
    batches: Batch,
    lengths: Sequence[int],
    policy: Callable[..., bool] | None,
) -> tuple[InnerState, Inner]:
    """Scan over segments of lengths[0] steps, each a scan over segments of lengths[1], ...

    Args:
      body: one inner step. It is not rematerialised here.
      state: the first state.
      batches: leaves [T, ...].
      lengths: of the segments of each level, descending; empty: a plain scan.
      policy: of `jax.checkpoint`: which residuals of a segment are saved besides its first state.

    Returns:
      (state after T steps, what was recorded of them).
    """
    if not lengths:
        return jax.lax.scan(body, state, batches)
    steps = horizon(batches)
    length, *shorter = lengths
    length = min(length, steps)
    even = steps - steps % length  # steps in segments of full length

    def segment(state: InnerState, batches: Batch) -> tuple[InnerState, Inner]:
        return nested_scan(body, state, batches, shorter, policy)

    segments = jax.tree.map(
        lambda x: x[:even].reshape(even // length, length, *x.shape[1:]), batches
    )
    checkpointed = jax.checkpoint(segment, policy=policy, prevent_cse=False)
    state, inner = jax.lax.scan(checkpointed, state, segments)
    inner = jax.tree.map(lambda x: x.reshape(even, *x.shape[2:]), inner)
    if even == steps:
        return state, inner
    state, rest = segment(state, jax.tree.map(lambda x: x[even:], batches))
    return state, joined([inner, rest])


def square_root(steps: int) -> int:
    """Return the length of about sqrt(T) segments of T steps."""
    return math.isqrt(steps - 1) + 1


def segment_lengths(steps: int, state_bytes: int, budget: int) -> list[int]:
    """Return the lengths of segments, level by level, whose saved states fit a budget.

    Args:
      steps: T.
      state_bytes: bytes of one state.
      budget: bytes that the saved states may take.

    Returns:
      The fewest levels that fit; [] if all T states fit.

    Raises:
      ValueError: if no number of levels fits; the message says how many bytes would.
    """
    for levels in range(1, max(steps.bit_length(), 1) + 1):
        if saved_states(steps, levels) * state_bytes <= budget:
            branch = _branch(steps, levels)
            return [branch**level for level in range(levels - 1, 0, -1)]
    fewest = min(saved_states(steps, levels) for levels in range(1, steps.bit_length() + 1))
    raise ValueError(
        f"A loop of {steps} steps saves at least {fewest} states, in nested segments, and one "
        f"takes {state_bytes:,} bytes: that is {fewest * state_bytes:,} bytes, but "
        f"budget={budget:,}. Raise the budget to that, or use `Forward()`, which saves none."
    )


def saved_states(steps: int, levels: int) -> int:
    """Return the most states that are saved at any time, with segments on `levels` - 1 levels."""
    return steps if levels == 1 else levels * _branch(steps, levels)


def _branch(steps: int, levels: int) -> int:
    """Return the least b with b^levels >= steps."""
    branch = max(round(steps ** (1 / levels)), 1)
    return branch if branch**levels >= steps else branch + 1
