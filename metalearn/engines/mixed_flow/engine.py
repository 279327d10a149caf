"""Mixed flow: reverse over the loop, forward-over-reverse inside the inner gradient.

Write the inner step with its gradient as a node of its own, g = grad L(theta, eta, x).
With a cotangent u on g, backpropagation through the loop needs u^T dg/dtheta and
u^T dg/deta. Reverse mode gets them by differentiating a backward pass backwards, and
keeps all its intermediates for it. But second derivatives commute:

    u^T dg/d(theta, eta)  =  d/de [ grad_(theta, eta) L(theta + e u, eta) ]   at e = 0

one `jvp` of a gradient, which needs no memory beyond a forward-mode sweep of an
ordinary backward pass. Everything else in the step (an optax update, say) is mostly
elementwise and differentiated as usual. The inner gradients themselves are kept by name
through the checkpoint of each step, so that the backward pass never computes them again; but for
remat="segments" or a `budget`, where that would be the most of what is kept.

They commute where g is the gradient of L as JAX differentiates it. A function in L with a
derivative rule of its own that is no derivative (a straight-through estimator, a clipped or a
reversed gradient, a surrogate gradient) makes g the gradient of nothing. Rules are found and
probed when a program is traced (`metalearn.engines.custom_rules`): an inner gradient that
passes one that is none, or may be none, is differentiated as it stands, by reverse over reverse.
That is exact too, and takes the memory that `Reverse("step")` takes for it.

As general as reverse mode, within the limits of JAX's custom derivative rules: the
meta-gradient cannot itself be differentiated, and inner gradients must have a derivative. A
callback or a kernel without any derivative of its backward pass serves no engine, and is refused.
Parameters may be complex; as everywhere in JAX, the gradient of a real loss with respect to them
is conjugated. A step cannot push a `jax.jvp` through `grad`: take a Hessian product as the `grad`
of `<grad, v>`, or by `jax.vjp`, both exact here.

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
from metalearn.engines import custom_rules
from metalearn.engines.base import Aux, MetaGradient
from metalearn.engines.inner_loop import REMAT, Remat, backpropagate
from metalearn.engines.mixed_flow import forward_over_reverse as commuted
from metalearn.engines.mixed_flow import micro_batches
from metalearn.engines.mixed_flow.reverse_scan import Anchors, in_bfloat16, on_host, sweep
from metalearn.unroll import Unroll

RECONSTRUCT = "inexact_reconstruct"
STORES: dict[str, Any] = {
    "device": None,  # by `jax.checkpoint`
    "host": on_host(),
    "inexact_bfloat16": in_bfloat16(),
}


@dataclasses.dataclass(frozen=True)
class MixedFlow(MetaGradient):
    """Backpropagation through the loop whose inner Hessian products run forward.

    Exact as it stands; what is not exact has "inexact" in its name. T inner steps, "state" the
    size of the inner state, g that of an inner gradient:

    | remat                 | keeps                                  | extra work            |
    |-----------------------|----------------------------------------|-----------------------|
    | "none"                | all but the inner loss's activations   | none                  |
    | "step"                | T (state + g)                          | the optimizer, again  |
    | "nested"              | T g + 2 sqrt(T) states                 | the optimizer, twice  |
    | "segments"            | sqrt(T) (2 states + g)                 | one more forward loop |
    | "inexact_reconstruct" | T / segment states                     | T inner gradients     |

    Args:
      remat: as above.
      segment: inner steps between kept states. "nested" and "segments": None is sqrt(T).
        "inexact_reconstruct": between anchors, None is 32. It undoes steps (`Unroll.undo`, see
        `metalearn.optimizers.reversible`), and rounding errors grow geometrically from an anchor
        backwards: the meta-gradient is off by 1e-5 with 16 and 3e-5 with 32 in float32, against
        6e-6 of exact modes (docs/results.md).
      budget: "nested": bytes that kept states of one task may take at a time, instead of a
        segment. Inner gradients are then taken again rather than kept (see
        `metalearn.engines.nested_scan`).
      store: where remat="step" keeps states and inner gradients. "device"; "host", its memory,
        for the price of the transfers; "inexact_bfloat16", on the device in half the bytes,
        which rounds the points at which Hessian products are taken by 2^-9 (off by 2e-3 to 5e-3).
      peel: take the first step apart where theta_0 does not depend on eta: its Hessian product
        is not needed. Costs one more step to compile.
      micro_batches: take inner gradients and Hessian products a part of the batch at a time; the
        inner loss must be a `metalearn.ExampleMean`. Holds one part's activations; same FLOPs,
        more time.
      true_rules: names of functions in the inner loss whose `custom_jvp` or `custom_vjp` rules are
        true derivatives, and shall be believed where trying cannot tell: kernels, functions too
        large to be tried, or with a kink where arguments are zero. ("*",) is all. A rule that was
        tried and is none is refused. What was not believed, `metalearn.diagnostics.health` lists.
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
        inner: Any = functools.partial(commuted.value_and_grad, true_rules=self.true_rules)
        if self.micro_batches > 1:
            inner = functools.partial(
                micro_batches.value_and_grad, parts=self.micro_batches, true_rules=self.true_rules
            )
        if self.remat == RECONSTRUCT:
            return sweep(unroll, eta, batches, inner, Anchors(self.segment or 32), self.peel)
        if self.store != "device":
            return sweep(unroll, eta, batches, inner, STORES[self.store], self.peel)
        return backpropagate(unroll, eta, batches, inner, self._remat())

    @property
    def commutes(self) -> bool:
        """Whether it takes Jacobians of inner gradients for symmetric: it does."""
        return True

    def plan(self, call: commuted.Call) -> custom_rules.Plan:
        """Say what of an inner gradient's Jacobian is taken for symmetric, and why not all."""
        return commuted.planned(call, self.true_rules)

    def _remat(self) -> Remat:
        policy = jax.checkpoint_policies.save_only_these_names(commuted.INNER_GRADIENT)
        return Remat(self.remat, self.segment, self.budget, self.peel, policy)
