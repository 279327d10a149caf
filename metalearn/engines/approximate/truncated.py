"""Truncated hypergradients: reverse mode through the last k inner steps alone.

The first T - k steps run forward, with nothing saved, and theta_{T-k} is a constant:

    theta_{T-k} = T - k steps, no derivative          dF/deta through steps T-k .. T-1 alone

Memory is that of k steps, flat in T. What earlier steps contribute is lost. Where the loop
converges, that is a sum of powers of the Jacobian J of a step, so the error falls as the inner loop
itself does, like |J|^k (Shaban et al. 2019, arXiv:1810.10667): a hypergradient of a few steps is
good where steps contract fast, and none of a slow loop. k = 1 is the one-step hypergradient of
T1-T2 (Luketina et al. 2016, arXiv:1511.06727) and of DARTS (Liu et al. 2019, arXiv:1806.09055),
k = T the exact one.

It is not the truncation of `Trainer(truncation=)`: there eta is updated every K steps of an inner
loop that is carried on, here once per full loop.

By finite differences, as in DARTS, the Hessian product of a step is half the difference of the
gradients at theta + e u and theta - e u, over e, with e |u| = `finite_difference`: two gradients,
and no second derivative to compile or to hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import above, is_integer
from metalearn._utils.fields import check_fields
from metalearn.engines.approximate.finite_difference import value_and_grad
from metalearn.engines.approximate.reach import check_reach
from metalearn.engines.base import Aux, MetaGradient, check_eta
from metalearn.engines.custom_rules import Plan
from metalearn.engines.grad_recorder import Inner, joined
from metalearn.engines.inner_loop import Remat, backpropagate, step_body
from metalearn.engines.mixed_flow import forward_over_reverse as commuted
from metalearn.engines.mixed_flow.engine import MixedFlow
from metalearn.unroll import Batch, Eta, InnerState, Unroll, horizon


@dataclasses.dataclass(frozen=True)
class Truncated(MetaGradient):
    """Reverse mode through the last k inner steps: flat memory, and biased towards the short term.

    Args:
      last: k, the inner steps that are differentiated; T or more: all, exactly.
      through: the exact engine that differentiates them.
      finite_difference: take inner Hessian products by central differences of the inner gradient,
        theta moved by this much (0.01 in DARTS), instead of by `through`; None: exactly.
    """

    last: int = 1
    through: MetaGradient = MixedFlow()
    finite_difference: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "last")
        if not is_integer(self.last) or self.last < 1:
            raise ValueError(
                f"`Truncated(last={self.last!s:.80})` differentiates the last k inner steps, an "
                "integer, 1 or more: with none, only what the outer loss itself reads of eta would "
                "have a derivative."
            )
        above("Truncated", 0, finite_difference=self.finite_difference)
        if self.finite_difference is not None and self.through != MixedFlow():
            raise ValueError(
                f"`{self!r}`: finite differences take the place of the engine `through`. Set one."
            )

    @property
    def commutes(self) -> bool:
        """Whether Jacobians of inner gradients are taken for symmetric."""
        return self.finite_difference is not None or self.through.commutes

    def plan(self, call: commuted.Call) -> Plan:
        """Return what of an inner gradient's Jacobian is taken for symmetric, and why not all."""
        if self.finite_difference is not None:
            return commuted.planned(call, ())
        return self.through.plan(call)

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> Any:
        """Return (); ValueError if the engine `through` has a state."""
        if jax.tree.leaves(self.through.init(key, unroll, eta)):
            raise ValueError(
                f"`Truncated(through={self.through!r})`: an engine that carries a state of its own "
                "cannot differentiate the last steps. Use an exact one, such as `MixedFlow()`."
            )
        return ()

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), the hypergradient through the last steps, like eta)."""
        check_eta(eta)
        steps = horizon(batches)
        if self.last >= steps:
            return self._through(unroll, eta, batches)
        last_batch = jax.tree.map(lambda x: x[-1], batches)
        middle, first = forward(unroll, eta, batches, steps - self.last)
        seen = "the last inner step" if self.last == 1 else f"the last {self.last} inner steps"
        check_reach(self, unroll, eta, middle, last_batch, seen, self.last)
        unroll = unroll._replace(init=lambda eta: middle, begins=None)
        batches = jax.tree.map(lambda x: x[steps - self.last :], batches)
        (loss, aux), grads = self._through(unroll, eta, batches)
        tangents = aux.inner.tangent_norm  # the first steps push none
        none = jnp.zeros((steps - self.last, *tangents.shape[1:]), tangents.dtype)
        first = first._replace(tangent_norm=none)
        return (loss, aux._replace(inner=joined([first, aux.inner]))), grads

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the doubts of the engine `through`."""
        return self.through.doubts(metrics)

    def _through(
        self, unroll: Unroll, eta: Eta, batches: Batch
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        if self.finite_difference is None:
            return self.through.value_and_grad(unroll, eta, batches)
        inner = functools.partial(value_and_grad, move=self.finite_difference)
        return backpropagate(unroll, eta, batches, inner, Remat("step"))


def forward(unroll: Unroll, eta: Eta, batches: Batch, steps: int) -> tuple[InnerState, Inner]:
    """Take the first so many inner steps: (state, what was recorded). Batches are not copied."""
    body = step_body(unroll, eta, jax.value_and_grad)

    def indexed(state: InnerState, t: jax.Array) -> tuple[InnerState, Inner]:
        return body(state, jax.tree.map(lambda x: jnp.asarray(x)[t], batches))

    return jax.lax.scan(indexed, unroll.init(eta), jnp.arange(steps))
