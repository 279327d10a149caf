"""Mixed flow: reverse over the loop, forward-over-reverse inside the inner gradient.

Write the inner step with its gradient as a node of its own, g = grad L(theta, eta, x).
With a cotangent u on g, backpropagation through the loop needs u^T dg/dtheta and
u^T dg/deta. Reverse mode gets them by differentiating a backward pass backwards, and
keeps all its intermediates for it. But second derivatives commute:

    u^T dg/d(theta, eta)  =  d/de [ grad_(theta, eta) L(theta + e u, eta) ]   at e = 0

one `jvp` of a gradient, which needs no memory beyond a forward-mode sweep of an
ordinary backward pass. Everything else in the step (an optax update, say) is mostly
elementwise and differentiated as usual. The inner gradients themselves are kept by name
through the checkpoint of each step, so that the way back never computes them again.

Exact, and as general as reverse mode, within the limits of JAX's custom derivative
rules: the meta-gradient cannot itself be differentiated; what `grad` differentiates with
respect to is real; and a model with an operation that has no JVP (a fused kernel, or a
`custom_vjp` whose forward or backward rule has none) is refused by JAX, and needs `Reverse`.
For the same reason a step cannot push a `jax.jvp` through `grad`: take a Hessian product as
the `grad` of `<grad, v>`, or by `jax.vjp`, both exact here.

Reference: Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
Differentiation" (arXiv:2505.00793).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from metalearn.engines import commuted, micro_batches
from metalearn.engines.engine import Aux, MetaGradient
from metalearn.engines.loop import Kept, backpropagate
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class MixedFlow(MetaGradient):
    """Backpropagation through the loop whose inner Hessian products run forward."""

    remat: str = "step"  # "none", "step" or "nested"; inner gradients are kept in all
    segment: int | None = None  # "nested": inner steps between kept states; None: sqrt(T)
    # Take the first step apart where theta_0 does not depend on eta: its Hessian product is
    # not needed. Costs one more step to compile.
    peel: bool = True
    # Take inner gradients and Hessian products a part of the batch at a time; the inner loss
    # must be a `metalearn.ExampleMean`. Holds one part's activations; same FLOPs, more time.
    micro_batches: int = 1

    def __post_init__(self) -> None:
        self._kept()
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}, but one is the least.")

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        inner = commuted.value_and_grad
        if self.micro_batches > 1:
            inner = functools.partial(micro_batches.value_and_grad, parts=self.micro_batches)
        return backpropagate(unroll, eta, batches, inner, self._kept())

    def _kept(self) -> Kept:
        policy = jax.checkpoint_policies.save_only_these_names(commuted.INNER_GRADIENT)
        return Kept(self.remat, self.segment, self.peel, policy)
