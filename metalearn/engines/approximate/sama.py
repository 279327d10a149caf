"""SAMA: a one-step hypergradient adapted to the inner optimizer, without second derivatives.

Implicit differentiation with its inverse left out, w = dF/d theta, but with the inner optimizer
kept in. With u(g) the update that the optimizer makes of a gradient g,

    dF/deta  ~  dF/deta (direct)  +  (d step / d eta)^T dF/d theta,   d step / d eta = u'(g) dg/deta

at theta_T, the last batch and the optimizer's last state. u'(g) is the algorithmic adaptation of
Choe et al. 2023 (arXiv:2310.05674): for Adam the entries of the hypergradient are scaled as its
updates are. There it is derived for each optimizer by hand, here it is the derivative of `step`.
The product with dg/deta is a central difference of two gradients, so one hypergradient costs three
gradients of the inner loss, whatever T is, no second derivative, and the memory of a gradient.

The paper's further move of theta along the difference is a change of the inner loop, and is not
made. Where Adam's v may be zero its derivative is infinite: `eps_root=1e-8`, as for every engine.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from metalearn._utils.checks import above
from metalearn._utils.fields import check_fields
from metalearn.engines import segments
from metalearn.engines.approximate.finite_difference import value_and_grad
from metalearn.engines.approximate.reach import check_reach, last_batch
from metalearn.engines.base import Aux, MetaGradient, check_eta
from metalearn.engines.custom_rules import Plan
from metalearn.engines.inner_loop import Remat
from metalearn.engines.mixed_flow import forward_over_reverse as commuted
from metalearn.unroll import Batch, Eta, Unroll


@dataclasses.dataclass(frozen=True)
class SAMA(MetaGradient):
    """One step at the end of the loop, adapted to the inner optimizer: three gradients in all.

    Args:
      finite_difference: how far theta is moved for the difference of two inner gradients.
    """

    finite_difference: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        above("SAMA", 0, finite_difference=self.finite_difference)

    @property
    def commutes(self) -> bool:
        """Whether the engine assumes symmetric Jacobians of inner gradients: true."""
        return True

    def plan(self, call: commuted.Call) -> Plan:
        """Return which inputs of an inner gradient have Jacobians assumed symmetric, and why."""
        return commuted.planned(call, ())

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), the hypergradient of one step at theta_T, like eta)."""
        check_eta(eta)
        batch = last_batch(self, batches)
        theta_T, inner, _ = segments.advance(unroll, eta, unroll.init(eta), batches)
        last = jax.tree.map(lambda x: x[-1:], batches)
        seen = "one inner step at the end of the loop"
        check_reach(self, unroll, eta, theta_T, batch, seen, 1)
        (loss, metrics), bars = segments.outer_cotangents(unroll, eta, theta_T)
        difference = functools.partial(value_and_grad, move=self.finite_difference)
        bars = segments.pull_back(unroll, eta, theta_T, last, [], bars, difference, Remat())
        return (loss, Aux(metrics, theta_T, inner)), bars.eta
