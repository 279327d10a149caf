"""Which leaves a function reads, and which of eta an approximate hypergradient cannot see.

An engine that differentiates the last steps of a loop, or its fixed point, does not see theta_0: an
entry of eta that is read by `Unroll.init` alone would have a derivative of exactly zero, and would
silently not be learned. Such a problem is refused when it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from metalearn._utils.trees import is_differentiable, paths
from metalearn.engines.base import outer_loss
from metalearn.engines.inner_loop import step_body
from metalearn.unroll import Batch, Eta, InnerState, Unroll, horizon


def leaves_read(
    function: Callable[[Any], Any], tree: Any, of: Callable[[Any], bool] = is_differentiable
) -> list[bool]:
    """Return for each leaf of a tree whether a leaf of `function(tree)` may depend on it.

    Conservative, no false negatives: all outputs of an operation count as dependent on all of its
    inputs.

    Args:
      function: of the tree.
      tree: any pytree of arrays.
      of: which leaves of the result count.
    """
    return _read(jax.make_jaxpr(function)(tree).jaxpr, of)


def _read(jaxpr: Any, of: Callable[[Any], bool]) -> list[bool]:
    if jaxpr.effects:  # a mutable reference may pass a value on where no variable does
        return [True] * len(jaxpr.invars)
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal) and of(v.aval)}
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
    return [v in needed for v in jaxpr.invars]


def last_batch(engine: Any, batches: Batch) -> Batch:
    """Return the batch of the last inner step; ValueError for a loop that takes none.

    Args:
      engine: for the message.
      batches: of the loop, leaves [T, ...].
    """
    if horizon(batches) == 0:
        name = type(engine).__name__
        raise ValueError(
            f"`{name}` differentiates an inner step at the end of the loop, and this loop takes "
            "none (T = 0), as an algorithm whose head is in closed form. Use an exact engine: "
            "`Reverse()` or `MixedFlow()`."
        )
    return jax.tree.map(lambda x: x[-1], batches)


def check_reach(
    engine: Any, unroll: Unroll, eta: Eta, state: InnerState, batch: Batch, seen: str
) -> None:
    """Raise ValueError where a leaf of eta is read by `init`, and by no step and no outer loss.

    Args:
      engine: for the message.
      unroll: the inner loop.
      eta: the meta-parameters.
      state: an inner state.
      batch: of one inner step.
      seen: what the engine differentiates, for the message.
    """
    tangible = jax.tree.map(jnp.asarray, eta)  # Python scalars have no variable of their own

    def later(eta: Eta) -> Any:
        after, _ = step_body(unroll, eta, jax.value_and_grad)(state, batch)
        return after, outer_loss(unroll, eta, state)[0]

    start, rest = leaves_read(unroll.init, tangible), leaves_read(later, tangible)
    names = paths(tangible)
    lost = [name or "eta" for name, a, b in zip(names, start, rest, strict=True) if a and not b]
    if lost:
        raise ValueError(
            f"`{type(engine).__name__}` differentiates {seen}, and does not see theta_0. Of eta, "
            f"{_listed(lost)} is read by `Unroll.init` alone: its derivative would be exactly "
            "zero, and it would not be learned. A learned initialisation needs the whole loop: "
            "`MixedFlow()` or `Reverse()`. Or let the inner loss read it too, as a proximal term "
            "to theta_0 does."
        )


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def clocks(step: Callable[[InnerState], InnerState], state: InnerState) -> list[int]:
    """Return the leaves without a derivative that a step changes, and that its result depends on.

    They are counts of steps and random keys. By their numbers among the leaves of a state.

    Args:
      step: state -> next state.
      state: any pytree of arrays.
    """
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    leaves = zip(jaxpr.invars, jaxpr.outvars, _read(jaxpr, is_differentiable), strict=True)
    return [
        i
        for i, (before, after, is_read) in enumerate(leaves)
        if is_read and after is not before and not is_differentiable(before.aval)
    ]
