"""Which leaves a function reads, and which of eta an approximate hypergradient cannot see.

An engine that differentiates the last steps of a loop, or its fixed point, does not see theta_0.
Three paths from eta to the result are then lost whole, and a problem that has one is refused when
it is traced:

- an entry of eta that is read by `Unroll.init` alone: its derivative would be exactly zero, and it
  would silently not be learned;
- a leaf of the inner state that `Unroll.init` computes from eta, that no step changes, and that is
  read afterwards, such as embeddings that a head is fitted to: what of the derivative goes through
  it does not fade with the steps, as the dependence on a theta_0 does that steps contract;
- an entry of eta that enters the outer loss through earlier steps alone, such as a learned update
  rule that is judged by the training losses: the last update enters none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from metalearn._utils.trees import is_differentiable, paths
from metalearn.engines.base import outer_loss
from metalearn.engines.inner_loop import step_body
from metalearn.unroll import Batch, Eta, InnerState, Unroll, horizon


def leaves_read(
    function: Callable[[Any], Any], tree: Any, of: Callable[[Any], bool] = is_differentiable
) -> list[bool]:
    """Return for each leaf of a tree whether a derivative of `function(tree)` may go through it.

    Conservative, no false negatives: all outputs of an operation count as dependent on all of its
    inputs, but for `stop_gradient`. A compiled function, a branch or a loop is such an operation,
    without the inputs that what is wanted of its outputs does not need.

    Args:
      function: of the tree.
      tree: any pytree of arrays.
      of: which leaves of the result count.
    """
    jaxpr = jax.make_jaxpr(function)(tree).jaxpr
    return _read(jaxpr, [v for v in jaxpr.outvars if of(v.aval)])


def _read(jaxpr: Any, outputs: Sequence[Any], values: bool = False) -> list[bool]:
    """Return for each input of a jaxpr whether some of its variables may depend on it.

    `values`: whether a dependence counts whose derivative is zero, by `stop_gradient`.
    """
    if jaxpr.effects:  # a mutable reference may pass a value on where no variable does
        return [True] * len(jaxpr.invars)
    used = {id(v) for v in outputs}  # a compiled function, or a scan, keeps what nobody reads
    smaller, _ = dce_jaxpr(jaxpr, [id(v) in used for v in jaxpr.outvars])
    needed = {v for v in outputs if not isinstance(v, Literal)}
    for equation in reversed(smaller.eqns):
        stops = equation.primitive.name == "stop_gradient" and not values
        if needed.intersection(equation.outvars) and not stops:
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
    engine: Any,
    unroll: Unroll,
    eta: Eta,
    state: InnerState,
    batch: Batch,
    seen: str,
    steps: int | None = None,
) -> None:
    """Raise ValueError where a path from eta to the result would be lost whole.

    Args:
      engine: for the message.
      unroll: the inner loop.
      eta: the meta-parameters.
      state: an inner state.
      batch: of one inner step.
      seen: what the engine differentiates, for the message.
      steps: how many inner steps at the end; None: a fixed point, where all are the last one.
    """
    tangible = jax.tree.map(jnp.asarray, eta)  # Python scalars have no variable of their own

    def later(eta: Eta, state: InnerState) -> Any:
        after, _ = step_body(unroll, eta, jax.value_and_grad)(state, batch)
        return after, outer_loss(unroll, eta, state)[0]

    first = jax.make_jaxpr(unroll.init)(tangible).jaxpr
    rest = jax.make_jaxpr(later)(tangible, state).jaxpr
    names = paths(tangible)
    start, ends = (
        _read(j, [v for v in j.outvars if is_differentiable(v.aval)]) for j in (first, rest)
    )
    lost = [name or "eta" for name, a, b in zip(names, start, ends, strict=False) if a and not b]
    blind = f"`{type(engine).__name__}` differentiates {seen}, and does not see theta_0."
    if lost:
        raise ValueError(
            f"{blind} Of eta, {_listed(lost)} is read by `Unroll.init` alone: its derivative would "
            "be exactly zero, and it would not be learned. A learned initialisation needs the "
            "whole loop: `MixedFlow()` or `Reverse()`. Or let the inner loss read it too, as a "
            "proximal term to theta_0 does."
        )
    if steps is not None and (late := _late(rest, names, steps)):
        name, needed = late[0]
        raise ValueError(
            f"`{type(engine).__name__}` differentiates {seen}. Of eta, {_listed([name])} enters "
            "the outer loss through earlier steps alone: its derivative would be exactly zero, and "
            f"it would not be learned. Take `Truncated(last={needed})` or more, or an exact "
            "engine: `MixedFlow()` or `Reverse()`."
        )
    kept = _kept(first, rest, len(names))
    if kept:
        leaf, sources = kept[0]
        read = [name or "eta" for name, is_read in zip(names, sources, strict=True) if is_read]
        raise ValueError(
            f"{blind} {paths(state)[leaf]!r} of the inner state is computed by `Unroll.init` from "
            f"{_listed(read)} of eta, no step changes it, and it is read afterwards: what of the "
            "derivative goes through it would be lost. That needs the whole loop: `MixedFlow()` or "
            "`Reverse()`. Or compute it from eta where it is read, in `step` or `loss`."
        )


def _late(rest: Any, names: Sequence[str], steps: int) -> list[tuple[str, int]]:
    """Return (name, how many last steps read it) of leaves of eta that so many steps do not reach.

    Args:
      rest: the jaxpr of (the next state, the outer loss), of the leaves of eta and of a state.
      names: of the leaves of eta.
      steps: how many there are.
    """
    count = len(names)
    first_read: dict[str, int] = {}
    wanted = [rest.outvars[-1]]
    for number in range(len(rest.invars) - count + 1):  # a path passes a leaf of the state once
        read = _read(rest, [v for v in wanted if is_differentiable(v.aval)])
        for name, is_read in zip(names, read[:count], strict=True):
            if is_read:
                first_read.setdefault(name or "eta", number)
        before = wanted
        wanted = [v for v, is_read in zip(rest.outvars, read[count:], strict=False) if is_read]
        if wanted == before or len(first_read) == count:
            break
    return [(name, number) for name, number in first_read.items() if number > steps]


def _kept(first: Any, rest: Any, count: int) -> list[tuple[int, list[bool]]]:
    """Return the leaves of a state that `init` computes from eta, that are read and never changed.

    A step that is compiled by itself, under `jax.jit`, hides which leaves it passes on unchanged.

    Args:
      first: the jaxpr of `init`, of the leaves of eta.
      rest: that of (the next state, the outer loss), of the leaves of eta and of a state.
      count: the number of leaves of eta.

    Returns:
      [(the number of the leaf, whether it is computed from each leaf of eta)].
    """
    if first.effects or rest.effects:
        return []
    after, outer = rest.outvars[:-1], rest.outvars[-1]
    pairs = list(zip(rest.invars[count:], after, strict=True))
    results = [outer, *(new for old, new in pairs if new is not old)]
    read = _read(rest, [v for v in results if is_differentiable(v.aval)])[count:]
    rows = [
        (leaf, _read(first, [first.outvars[leaf]]))
        for leaf, (old, new) in enumerate(pairs)
        if new is old and read[leaf] and is_differentiable(old.aval)
    ]
    return [(leaf, sources) for leaf, sources in rows if any(sources)]


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unchanged(step: Callable[[InnerState], InnerState], state: InnerState) -> list[bool]:
    """Return which leaves of a state a step passes on as they are; see `_kept` on `jax.jit`."""
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    return [new is old for old, new in zip(jaxpr.invars, jaxpr.outvars, strict=True)]


def clocks(step: Callable[[InnerState], InnerState], state: InnerState) -> list[int]:
    """Return the leaves without a derivative that a step changes, and that its result depends on.

    They are counts of steps and random keys. By their numbers among the leaves of a state.

    Args:
      step: state -> next state.
      state: any pytree of arrays.
    """
    jaxpr = jax.make_jaxpr(step)(state).jaxpr
    floats = [v for v in jaxpr.outvars if is_differentiable(v.aval)]
    leaves = zip(jaxpr.invars, jaxpr.outvars, _read(jaxpr, floats, values=True), strict=True)
    return [
        i
        for i, (before, after, is_read) in enumerate(leaves)
        if is_read and after is not before and not is_differentiable(before.aval)
    ]
