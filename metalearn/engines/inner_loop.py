"""The inner loop as a scan, and which of its residuals are saved for the backward pass.

The backward pass visits every inner step in reverse. Saving all residuals of each step costs O(T)
activations; saving only the inner states costs one more forward pass. So does saving every
sqrt(T)-th state and recomputing the steps in between with all their residuals, one segment after
the other: memory O(sqrt(T)) (Chen et al. 2016, arXiv:1604.06174). Saving only states within a
segment, too, costs one more forward pass (Griewank 1992).

Where theta_0 does not depend on eta, the backward pass can stop before the first step: no
derivative with respect to theta_0 is needed. A scan computes it all the same, because its steps
are all alike. A first step outside the scan (`peel`) does not; `depends` reads off the jaxpr of
`Unroll.init` whether this is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from metalearn._utils.checks import at_least, pick
from metalearn._utils.trees import is_differentiable
from metalearn.engines.base import Aux, check_eta, going_backwards, outer_loss
from metalearn.engines.grad_recorder import Inner, Recorder, joined
from metalearn.engines.nested_scan import Body, nested_scan, segment_lengths, square_root
from metalearn.unroll import Batch, Eta, InnerState, Unroll, horizon

REMAT = {
    "none": "all residuals of every step are saved",
    "step": "the state of every step is saved",
    "segments": "about every sqrt(T)-th state is saved; all residuals of one segment at a time",
    "nested": "about every sqrt(T)-th state is saved; the states of one segment at a time",
}
SEGMENTED = ("segments", "nested")


@dataclasses.dataclass(frozen=True)
class Remat:
    """Rematerialisation: which residuals of the loop are saved for the backward pass.

    Args:
      mode: one of `REMAT`.
      segment: "segments" and "nested": inner steps between saved states; None: sqrt(T).
      budget: "nested": bytes that the saved states may take, instead of a segment.
      peel: take the first step outside the scan, where theta_0 does not depend on eta.
      policy: "step" and "nested": of `jax.checkpoint`: which residuals are saved besides states.
    """

    mode: str = "none"
    segment: int | None = None
    budget: int | None = None
    peel: bool = False
    policy: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        pick(REMAT, self.mode, "remat")
        if self.segment is not None and self.mode not in SEGMENTED:
            raise ValueError(
                f"`segment` is the number of inner steps between saved states of remat='nested' or "
                f"'segments', and cannot be {self.segment} with remat={self.mode!r}."
            )
        at_least("remat", 0, budget=self.budget)
        if self.budget is not None and (self.mode != "nested" or self.segment is not None):
            raise ValueError(
                "`budget` chooses the segments of remat='nested' by the bytes that saved states "
                f"may take; it cannot be {self.budget} with remat={self.mode!r} and "
                f"segment={self.segment}."
            )


def step_body(unroll: Unroll, eta: Eta, value_and_grad: Callable[..., Any]) -> Body:
    """Return one inner step as a scan body: state, batch -> next state, what was recorded."""

    def body(state: InnerState, batch: Batch) -> tuple[InnerState, Inner]:
        recorder = Recorder(value_and_grad)
        after = unroll.step(eta, state, batch, recorder.grad)
        return after, recorder.inner(state, after)

    return body


def backpropagate(
    unroll: Unroll,
    eta: Eta,
    batches: Batch,
    value_and_grad: Callable[..., Any],
    remat: Remat,
) -> tuple[tuple[jax.Array, Aux], Eta]:
    """Return ((loss (), aux), meta-gradient like eta), by reverse mode over the loop."""
    check_eta(eta)

    def objective(eta: Eta) -> tuple[jax.Array, Aux]:
        return rollout(unroll, eta, batches, value_and_grad, remat)

    with going_backwards():
        return jax.value_and_grad(objective, has_aux=True)(eta)


def rollout(
    unroll: Unroll,
    eta: Eta,
    batches: Batch,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    remat: Remat = Remat(),
) -> tuple[jax.Array, Aux]:
    """Run the inner loop and the outer loss: (loss (), aux). Differentiable in eta."""
    state, inner = inner_loop(unroll, eta, batches, value_and_grad, remat)
    loss, metrics = outer_loss(unroll, eta, state)
    return loss, Aux(metrics, state, inner)


def inner_loop(
    unroll: Unroll,
    eta: Eta,
    batches: Batch,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    remat: Remat = Remat(),
) -> tuple[InnerState, Inner]:
    """Run the inner loop: (state after T steps, what was recorded). Differentiable in eta."""
    body = step_body(unroll, eta, value_and_grad)
    if remat.peel and depends(unroll.init, eta):
        remat = dataclasses.replace(remat, peel=False)
    return scan(body, unroll.init(eta), batches, remat)


def scan(
    body: Body, state: InnerState, batches: Batch, remat: Remat = Remat()
) -> tuple[InnerState, Inner]:
    """Scan `body` over the T slices of `batches`: (state after T steps, what was recorded)."""
    steps = horizon(batches)
    if steps == 0:  # a step is traced, for the shapes of what it would record
        return jax.lax.scan(body, state, batches)
    if steps == 1:
        return _once(body, state, batches, remat)
    if not remat.peel:
        return _scan(body, state, batches, remat)
    head = jax.tree.map(lambda x: x[:1], batches)
    tail = jax.tree.map(lambda x: x[1:], batches)
    state, first = _once(body, state, head, remat)
    state, inner = scan(body, state, tail, dataclasses.replace(remat, peel=False))
    return state, joined([first, inner])


def _once(body: Body, state: InnerState, batches: Batch, remat: Remat) -> tuple[InnerState, Inner]:
    """Take a single step without a scan, which would copy all residuals of that step."""
    if remat.mode in ("step", "nested"):
        body = jax.checkpoint(body, policy=remat.policy)
    state, inner = body(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], inner)


def _scan(body: Body, state: InnerState, batches: Batch, remat: Remat) -> tuple[InnerState, Inner]:
    steps = horizon(batches)
    length = remat.segment or square_root(steps)
    if remat.mode == "none" or (remat.mode == "segments" and length >= steps):
        return jax.lax.scan(body, state, batches)
    if remat.mode == "segments":  # no policy: it would save T inner gradients
        return nested_scan(body, state, batches, [length], None)
    step = jax.checkpoint(body, policy=remat.policy, prevent_cse=False)
    if remat.mode == "step":
        return jax.lax.scan(step, state, batches)
    if remat.budget is None:
        return nested_scan(step, state, batches, [length], remat.policy)
    # The residuals that the policy saves with a state (inner gradients) take as much again.
    saved = state_bytes(state) * (1 if remat.policy is None else 2)
    lengths = segment_lengths(steps, saved, remat.budget)
    return nested_scan(step, state, batches, lengths, None)


def state_bytes(state: InnerState) -> int:
    """Return the bytes of an inner state."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda tree: tree, state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)


def depends(function: Callable[[Any], Any], argument: Any) -> bool:
    """Say whether a floating-point leaf of `function(argument)` may depend on `argument`.

    Conservative: no false negatives. All outputs of an operation count as dependent if any of its
    inputs does.
    """
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    if jaxpr.effects:  # a mutable reference may pass a value on where no variable does
        return True
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    outputs = [v for v in jaxpr.outvars if not isinstance(v, Literal)]
    return any(v in reached and is_differentiable(v.aval) for v in outputs)
