"""Mixed flow: reverse over the loop, forward-over-reverse inside the inner gradient.

Write the inner step with its gradient as a node of its own, g = grad L(theta, eta, x).
With a cotangent u on g, backpropagation through the loop needs u^T dg/dtheta and
u^T dg/deta. Reverse mode gets them by differentiating a backward pass backwards, and
keeps all its intermediates for it. But second derivatives commute:

    u^T dg/d(theta, eta)  =  d/de [ grad_(theta, eta) L(theta + e u, eta) ]   at e = 0

one `jvp` of a gradient, which needs no memory beyond that of an ordinary backward pass
and its tangents. Everything else in the step (such as an optax update) is mostly elementwise and
differentiated as usual. The inner gradients are residuals of each rematerialised step, saved by
name, so that the backward pass does not compute them again; except with remat="segments" or a
`budget`, where they would be most of the saved memory.

Second derivatives commute where g is the gradient of L as JAX differentiates it. A function in L
with a custom derivative rule that is not its derivative (a straight-through estimator, a clipped
or reversed gradient, a surrogate gradient) makes g the gradient of no function. Custom rules are
probed when a program is traced (`metalearn.engines.custom_rules`): an inner gradient through a
rule that is not, or may not be, a derivative is differentiated by reverse over reverse. That is
exact too, and takes as much memory as `Reverse("step")`.

Mixed flow is as general as reverse mode, within the limits of JAX's custom derivative rules: a
meta-gradient is differentiated once more through `rollout` alone, as a level above does, and inner
gradients must have a derivative. A
callback or a kernel whose backward pass has no derivative works with no engine, and is refused.
Parameters may be complex; as everywhere in JAX, the gradient of a real loss with respect to them
is conjugated. A step cannot take a `jax.jvp` of `grad`: compute a Hessian product as the `grad`
of `<grad, v>`, or by `jax.vjp`; both are exact.

Reference: Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
Differentiation" (arXiv:2505.00793).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from metalearn._utils.checks import Count, pick
from metalearn._utils.fields import check_fields
from metalearn.engines import custom_rules, segments
from metalearn.engines.base import Aux, MetaGradient
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.inner_loop import REMAT, Remat, backpropagate, rollout
from metalearn.engines.mixed_flow import forward_over_reverse as commuted
from metalearn.engines.mixed_flow import micro_batches
from metalearn.engines.mixed_flow.reverse_scan import (
    Anchors,
    Saved,
    in_bfloat16,
    needs_fetch,
    sweep,
    sweep_segment,
)
from metalearn.unroll import Unroll, horizon

RECONSTRUCT = "inexact_reconstruct"
STORES: dict[str, Saved | None] = {
    "device": None,  # by `jax.checkpoint`
    "host": needs_fetch(),
    "inexact_bfloat16": in_bfloat16(),
}


@dataclasses.dataclass(frozen=True)
class MixedFlow(MetaGradient):
    """Backpropagation through the loop whose inner Hessian products run forward.

    Exact, except for settings with "inexact" in their name. T: inner steps; state: the size of the
    inner state; g: the size of an inner gradient.

    | remat                 | saved residuals                        | extra computation           |
    |-----------------------|----------------------------------------|-----------------------------|
    | "none"                | all but the inner loss's activations   | none                        |
    | "step"                | T (state + g)                          | the optimizer update, again |
    | "nested"              | T g + 2 sqrt(T) states                 | the optimizer update, twice |
    | "segments"            | sqrt(T) (2 states + g)                 | one more forward loop       |
    | "inexact_reconstruct" | T / segment states                     | T inner gradients           |

    Args:
      remat: which residuals are saved for the backward pass, as above.
      segment: inner steps between saved states. "nested" and "segments": None is sqrt(T).
        "inexact_reconstruct": None is 32. It undoes steps (`Unroll.undo`, see
        `metalearn.optimizers.reversible`), and rounding errors grow geometrically from a saved
        state backwards: the relative error of the meta-gradient is 1e-5 with 16 and 3e-5 with 32
        in float32, against 6e-6 of exact modes (docs/results.md).
      budget: "nested": bytes that saved states of one task may take at a time, instead of a
        segment. Inner gradients are then recomputed rather than saved (see
        `metalearn.engines.nested_scan`).
      store: where remat="step" saves states and inner gradients. "device"; "host": in host memory,
        at the cost of the transfers; "inexact_bfloat16": on the device in half the bytes, which
        rounds the points where Hessian products are computed by 2^-9 (relative error 2e-3 to
        5e-3).
      peel: compute the first step outside the scan where theta_0 does not depend on eta: its
        Hessian product is not needed. Costs one more step to compile.
      micro_batches: compute inner gradients and Hessian products in this many parts of the batch;
        the inner loss must be a `metalearn.ExampleMean`. The activations of one part are alive at
        a time; same FLOPs, more time.
      true_rules: names of functions in the inner loss whose `custom_jvp` or `custom_vjp` rules are
        declared to be derivatives where probing cannot decide: kernels, functions too large to
        probe, or with a kink at zero. ("*",): all of them. A declared rule that probing refutes is
        refused. `trainer.check_health` lists rules that do not count as derivatives.
    """

    remat: str = "step"
    segment: Count | None = None
    budget: int | None = None
    store: str = "device"
    peel: bool = True
    micro_batches: Count = 1
    true_rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        custom_rules.check_names("MixedFlow", self.true_rules)
        check_fields(self)
        pick({**REMAT, RECONSTRUCT: Anchors}, self.remat, "remat")
        pick(STORES, self.store, "store")
        if self.store != "device" and self.remat != "step":
            raise ValueError(
                f"store={self.store!r} is for what remat='step' keeps, not for {self.remat!r}."
            )
        if self.remat == RECONSTRUCT and self.budget is not None:
            raise ValueError("`budget` is for remat='nested'; anchors take a `segment`.")
        if self.remat != RECONSTRUCT:
            self._remat()

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        if self._saved is not None and horizon(batches):
            return sweep(unroll, eta, batches, self._inner, self._saved, self.peel)
        remat = Remat() if self._saved is not None else self._remat()  # without steps, nothing
        return backpropagate(unroll, eta, batches, self._inner, remat)

    def rollout(self, unroll: Unroll, eta: Any, batches: Any) -> tuple[jax.Array, Aux]:
        """Return (loss (), aux), a function of eta that a level above may differentiate twice.

        Raises:
          ValueError: where an explicit reverse scan, and not JAX, differentiates the loop.
        """
        if self._saved is not None:
            return super().rollout(unroll, eta, batches)
        return rollout(unroll, eta, batches, self._inner, self._remat())

    def advance(
        self, unroll: Unroll, eta: Any, state: Any, batches: Any
    ) -> tuple[Any, Inner, segments.InnerGradients]:
        """Take the inner steps of a segment, without their derivative.

        Inner gradients are returned where `remat` saves those of all steps on the device.
        """
        inner = jax.value_and_grad if self.micro_batches == 1 else self._inner
        return segments.advance(unroll, eta, state, batches, inner, self._saves_gradients)

    def pull_back(
        self,
        unroll: Unroll,
        eta: Any,
        state: Any,
        batches: Any,
        gradients: segments.InnerGradients,
        cotangents: segments.Cotangents,
    ) -> segments.Cotangents:
        """Pull cotangents back through a segment.

        `remat`, `store` and `micro_batches` hold inside it, and `peel` does not.
        """
        inputs = unroll, eta, state, batches
        if self._saved is not None:
            return sweep_segment(*inputs, cotangents, self._inner, self._saved)
        policy = None if gradients else self._remat().policy  # `gradients` are saved already
        remat = dataclasses.replace(self._remat(), peel=False, policy=policy)
        return segments.pull_back(*inputs, gradients, cotangents, self._inner, remat)

    @property
    def _saves_gradients(self) -> bool:
        """Whether the inner gradients of all steps are residuals that are saved as they are."""
        return self._saved is None and self.remat != "segments" and self.budget is None

    @property
    def _inner(self) -> Any:
        """The inner `value_and_grad`."""
        if self.micro_batches > 1:
            return functools.partial(
                micro_batches.value_and_grad, parts=self.micro_batches, true_rules=self.true_rules
            )
        return functools.partial(commuted.value_and_grad, true_rules=self.true_rules)

    @property
    def _saved(self) -> Saved | None:
        """What an explicit reverse scan saves; None: `jax.checkpoint` saves residuals."""
        return Anchors(self.segment or 32) if self.remat == RECONSTRUCT else STORES[self.store]

    @property
    def commutes(self) -> bool:
        """Whether the engine assumes symmetric Jacobians of inner gradients: true."""
        return True

    def plan(self, call: commuted.Call) -> custom_rules.Plan:
        """Return which inputs of an inner gradient have Jacobians assumed symmetric, and why."""
        return commuted.planned(call, self.true_rules)

    def _remat(self) -> Remat:
        policy = jax.checkpoint_policies.save_only_these_names(commuted.INNER_GRADIENT)
        return Remat(self.remat, self.segment, self.budget, self.peel, policy)
