"""A scan in segments of segments: how few states the way back can do with.

T steps in segments of b, of which the first state is saved: T / b states, and b more while a
segment is gone through again. With b = sqrt(T) that is 2 sqrt(T), for one more forward pass.
Segments of segments go on from there: L levels keep about L T^(1/L) states, and take the
forward pass L times more than keeping every state does (Griewank 1992; Chen et al. 2016,
arXiv:1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from metalearn.engines.grad_recorder import Inner, joined
from metalearn.unroll import horizon

Step = Callable[[Any, Any], tuple[Any, Inner]]


def nested_scan(
    step: Step, state: Any, batches: Any, lengths: Sequence[int], policy: Any
) -> tuple[Any, Inner]:
    """Scan over segments of lengths[0] steps, each a scan over segments of lengths[1], ...

    Every whole segment is checkpointed, with `policy`; `step` is as it comes.
    """
    if not lengths:
        return jax.lax.scan(step, state, batches)
    steps = horizon(batches)
    length, *shorter = lengths
    length = min(length, steps)
    whole = steps - steps % length

    def segment(state: Any, batches: Any) -> tuple[Any, Inner]:
        return nested_scan(step, state, batches, shorter, policy)

    head = jax.tree.map(lambda x: x[:whole].reshape(-1, length, *x.shape[1:]), batches)
    checkpointed = jax.checkpoint(segment, policy=policy, prevent_cse=False)
    state, inner = jax.lax.scan(checkpointed, state, head)
    inner = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), inner)
    if whole == steps:
        return state, inner
    state, rest = segment(state, jax.tree.map(lambda x: x[whole:], batches))
    return state, joined([inner, rest])


def square_root(steps: int) -> int:
    """Return the length of about sqrt(T) segments of T steps."""
    return math.isqrt(steps - 1) + 1


def segment_lengths(steps: int, state_bytes: int, budget: int) -> list[int]:
    """Return the lengths of segments, level by level, that keep few enough states.

    Args:
      steps: T.
      state_bytes: of one state.
      budget: bytes that the saved states may take.

    Returns:
      As few levels as will do: [] where all T states fit.

    Raises:
      ValueError: where no number of levels would do; it says how much would.
    """
    for levels in range(1, max(steps.bit_length(), 1) + 1):
        if saved_states(steps, levels) * state_bytes <= budget:
            branch = _branch(steps, levels)
            return [branch**level for level in range(levels - 1, 0, -1)]
    fewest = min(saved_states(steps, levels) for levels in range(1, steps.bit_length() + 1))
    raise ValueError(
        f"A loop of {steps} steps keeps {fewest} states at least, with segments of segments, and "
        f"one takes {state_bytes:,} bytes: that is {fewest * state_bytes:,} bytes, and "
        f"budget={budget:,}. Give it that much, or use `Forward()`, which keeps none."
    )


def saved_states(steps: int, levels: int) -> int:
    """Return the states that so many levels keep at a time."""
    return steps if levels == 1 else levels * _branch(steps, levels)


def _branch(steps: int, levels: int) -> int:
    """Return the least b with b^levels >= steps."""
    branch = max(round(steps ** (1 / levels)), 1)
    return branch if branch**levels >= steps else branch + 1
