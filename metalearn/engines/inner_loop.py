"""The inner loop as a scan, and what of it is kept for the way back.

Reverse mode reads every step again, backwards. Keeping what each step computed costs
O(T) activations; keeping only the states costs one more forward pass. So does keeping the
state of every sqrt(T)-th step and, while the steps from one to the next are gone through again,
all that these compute: memory O(sqrt(T)) (Chen et al. 2016, arXiv:1604.06174). Keeping only
their states then, too, costs one more pass (Griewank 1992).

Where theta_0 does not depend on eta, nothing upstream of the first step needs a derivative
with respect to it. A scan computes it all the same, since its steps are all alike; a first
step taken apart from the scan ("peeled") does not.

Whether a function's result depends on its argument, read off its jaxpr.
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
from metalearn.engines.nested_scan import nested_scan, segment_lengths, square_root
from metalearn.unroll import Unroll, horizon

REMAT = {
    "none": "every step keeps all it computed",
    "step": "every step keeps its state",
    "segments": "about every sqrt(T)-th step keeps its state; between two, steps keep all again",
    "nested": "about every sqrt(T)-th step keeps its state; between two, steps keep theirs again",
}
SEGMENTED = ("segments", "nested")
Body = Callable[[Any, Any], tuple[Any, Inner]]


@dataclasses.dataclass(frozen=True)
class Remat:
    """What of the loop is kept for the way back."""

    mode: str = "none"  # one of REMAT
    segment: int | None = None  # SEGMENTED: steps between kept states; None: sqrt(T)
    budget: int | None = None  # "nested": bytes for kept states, instead of a segment
    peel: bool = False  # take the first step apart, where theta_0 does not depend on eta
    # "step" and "nested": of `jax.checkpoint`, what is kept beside states.
    policy: Callable[..., bool] | None = None

    def __post_init__(self) -> None:
        pick(REMAT, self.mode, "remat")
        if self.segment is not None and self.mode not in SEGMENTED:
            raise ValueError(
                f"`segment` is the number of inner steps between kept states of remat='nested' or "
                f"'segments', and cannot be {self.segment} with remat={self.mode!r}."
            )
        at_least("remat", 0, budget=self.budget)
        if self.budget is not None and (self.mode != "nested" or self.segment is not None):
            raise ValueError(
                "`budget` chooses the segments of remat='nested' by the bytes that kept states may "
                f"take; it cannot be {self.budget} with remat={self.mode!r} and "
                f"segment={self.segment}."
            )


def step_body(unroll: Unroll, eta: Any, value_and_grad: Callable[..., Any]) -> Body:
    """Return one inner step as a scan body: state, batch -> state, what it saw."""

    def body(state: Any, batch: Any) -> tuple[Any, Inner]:
        recorder = Recorder(value_and_grad)
        after = unroll.step(eta, state, batch, recorder.grad)
        return after, recorder.inner(state, after)

    return body


def backpropagate(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: Callable[..., Any],
    remat: Remat,
) -> tuple[tuple[jax.Array, Aux], Any]:
    """Return ((loss (), aux), meta-gradient like eta), by reverse mode over the loop."""
    check_eta(eta)

    def objective(eta: Any) -> tuple[jax.Array, Aux]:
        return rollout(unroll, eta, batches, value_and_grad, remat)

    with going_backwards():
        return jax.value_and_grad(objective, has_aux=True)(eta)


def rollout(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    remat: Remat = Remat(),
) -> tuple[jax.Array, Aux]:
    """Run the inner loop and the outer loss: (loss (), aux). Differentiable in eta."""
    body = step_body(unroll, eta, value_and_grad)
    if remat.peel and depends(unroll.init, eta):
        remat = dataclasses.replace(remat, peel=False)
    state, inner = scan(body, unroll.init(eta), batches, remat)
    loss, metrics = outer_loss(unroll, eta, state)
    return loss, Aux(metrics, state, inner)


def scan(body: Body, state: Any, batches: Any, remat: Remat) -> tuple[Any, Inner]:
    """Scan `body` over the T slices of `batches`."""
    if horizon(batches) == 1:
        return _once(body, state, batches, remat)
    if not remat.peel:
        return _scan(body, state, batches, remat)
    head, tail = (jax.tree.map(lambda x, part=part: x[part], batches) for part in _PEELED)
    state, first = _once(body, state, head, remat)
    rest = dataclasses.replace(remat, peel=False)
    state, inner = scan(body, state, tail, rest)
    return state, joined([first, inner])


_PEELED = slice(0, 1), slice(1, None)


def _once(body: Body, state: Any, batches: Any, remat: Remat) -> tuple[Any, Inner]:
    """Take the only step without a loop, which would copy all it keeps for the way back."""
    if remat.mode in ("step", "nested"):
        body = jax.checkpoint(body, policy=remat.policy)
    state, inner = body(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], inner)


def _scan(body: Body, state: Any, batches: Any, remat: Remat) -> tuple[Any, Inner]:
    steps = horizon(batches)
    length = remat.segment or square_root(steps)
    if remat.mode == "none" or (remat.mode == "segments" and length >= steps):
        return jax.lax.scan(body, state, batches)
    if remat.mode == "segments":  # no policy: to keep gradients of all segments would be T g
        return nested_scan(body, state, batches, [length], None)
    step = jax.checkpoint(body, policy=remat.policy, prevent_cse=False)
    if remat.mode == "step":
        return jax.lax.scan(step, state, batches)
    if remat.budget is None:
        return nested_scan(step, state, batches, [length], remat.policy)
    # What the policy keeps beside a state (inner gradients) counts as much as one.
    held = state_bytes(state) * (1 if remat.policy is None else 2)
    lengths = segment_lengths(steps, held, remat.budget)
    return nested_scan(step, state, batches, lengths, None)


def state_bytes(state: Any) -> int:
    """Return the bytes of a state."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda tree: tree, state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)


def depends(function: Callable[[Any], Any], argument: Any) -> bool:
    """Say whether a floating-point leaf of `function(argument)` may depend on `argument`.

    Never wrongly no: an operation passes dependence on from any input to all its outputs.
    """
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    if jaxpr.effects:  # a reference may carry it where no variable does
        return True
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    outputs = [v for v in jaxpr.outvars if not isinstance(v, Literal)]
    return any(v in reached and is_differentiable(v.aval) for v in outputs)
