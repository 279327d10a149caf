"""Reverse mode through the inner loop: `jax.grad` of the unrolled loop.

One backward pass gives the derivative for any number of meta-parameters. It needs the
residuals of every inner step, and `remat` says which are saved and which are recomputed.
With T inner steps, |theta| the size of the inner state and A the activations of one step:

| remat      | memory                   | extra time               |
|------------|--------------------------|--------------------------|
| "none"     | T (A + |theta|)          | none                     |
| "step"     | T |theta| + A            | one more forward loop    |
| "segments" | sqrt(T) (A + 2 |theta|)  | one more forward loop    |
| "nested"   | 2 sqrt(T) |theta| + A    | two more forward loops   |

With a `budget`, "nested" takes the fewest levels of segments that fit: L levels save
L T^(1/L) states and take L more forward loops.

References: Maclaurin et al. 2015 (arXiv:1502.03492); Franceschi et al. 2017
(arXiv:1703.01785) for reverse against forward; Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from metalearn._utils.checks import Count
from metalearn._utils.fields import check_fields
from metalearn.engines import segments
from metalearn.engines.base import Aux, MetaGradient
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.inner_loop import Remat, backpropagate, rollout
from metalearn.unroll import Batch, Eta, InnerState, Unroll


@dataclasses.dataclass(frozen=True)
class Reverse(MetaGradient):
    """Backpropagation through the unrolled loop, exact for any eta.

    Args:
      remat: "none", "step", "segments" or "nested".
      segment: "segments" and "nested": inner steps between saved states; None: sqrt(T).
      budget: "nested": bytes that the saved states of one task may take, instead of a segment.
      peel: take the first step outside the scan where theta_0 does not depend on eta: fewer FLOPs,
        one more step to compile. Off by default: then this is textbook backpropagation.
    """

    remat: str = "none"
    segment: Count | None = None
    budget: int | None = None
    peel: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        self._remat()

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), meta-gradient like eta)."""
        return backpropagate(unroll, eta, batches, jax.value_and_grad, self._remat())

    def rollout(self, unroll: Unroll, eta: Eta, batches: Batch) -> tuple[jax.Array, Aux]:
        """Return (loss (), aux), a function of eta that a level above may differentiate twice."""
        return rollout(unroll, eta, batches, jax.value_and_grad, self._remat())

    def advance(
        self, unroll: Unroll, eta: Eta, state: InnerState, batches: Batch
    ) -> tuple[InnerState, Inner, segments.InnerGradients]:
        """Take the inner steps of a segment, without their derivative."""
        return segments.advance(unroll, eta, state, batches)

    def pull_back(
        self,
        unroll: Unroll,
        eta: Eta,
        state: InnerState,
        batches: Batch,
        gradients: segments.InnerGradients,
        cotangents: segments.Cotangents,
    ) -> segments.Cotangents:
        """Pull cotangents back through a segment; `remat` holds inside it, and `peel` does not."""
        inputs = unroll, eta, state, batches, gradients, cotangents, jax.value_and_grad
        return segments.pull_back(*inputs, dataclasses.replace(self._remat(), peel=False))

    def _remat(self) -> Remat:
        return Remat(self.remat, self.segment, self.budget, self.peel)
