"""The way back through the loop written out, for keeping less than the states themselves.

`jax.checkpoint` keeps values or computes them again. Here the backward loop is explicit,

    c_t  =  (d theta_{t+1} / d theta_t)^T c_{t+1}        c_T = dF / d theta_T
    dF/deta  =  sum_t (d theta_{t+1} / d eta)^T c_{t+1}  + direct terms

so that the state it needs at step t may come from elsewhere (`kept.py`). Inner gradients are
recorded and played back (`tape.py`), so that no loss is evaluated again for them. The first
step is taken apart: where theta_0 does not depend on eta, c_0 is not computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import split
from metalearn.engines.base import Aux, check_eta, going_backwards, horizon, outer_loss
from metalearn.engines.grad_recorder import OneStep, ValueAndGrad, joined
from metalearn.engines.inner_loop import depends
from metalearn.engines.mixed_flow.kept import Kept
from metalearn.unroll import Unroll


def sweep(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: ValueAndGrad,
    kept: Kept,
    peel: bool = True,
) -> tuple[tuple[jax.Array, Aux], Any]:
    """Return ((loss (), aux), meta-gradient like eta)."""
    check_eta(eta)
    with going_backwards():
        return _swept(unroll, eta, batches, value_and_grad, kept, peel)


def _swept(
    unroll: Unroll, eta: Any, batches: Any, value_and_grad: ValueAndGrad, kept: Kept, peel: bool
) -> tuple[tuple[jax.Array, Aux], Any]:
    alone = horizon(batches) == 1
    step = OneStep(unroll, eta, value_and_grad)
    first, rest = jax.tree.map(lambda x: x[0], batches), jax.tree.map(lambda x: x[1:], batches)
    theta_0 = unroll.init(eta)
    theta_1, (seen, tape) = step.forward(theta_0, first)
    inner = jax.tree.map(lambda x: x[None], seen)
    theta_T, stored = theta_1, None
    if not alone:
        theta_T, seen, stored = kept.forward(step, theta_1, rest)
        inner = joined([inner, seen])

    floats, others, join = split(theta_T)

    def outer(eta: Any, floats: list[Any]) -> tuple[jax.Array, Any]:
        return outer_loss(unroll, eta, join(floats, others))

    (loss, metrics), bars = jax.value_and_grad(outer, (1, 0), has_aux=True)(eta, floats)
    state_bar, eta_bar = bars if alone else kept.back(step, theta_T, rest, stored, bars)
    wanted = not peel or depends(unroll.init, eta)
    state_bar, from_first = step.back(theta_0, first, tape, state_bar, wanted)
    eta_bar = jax.tree.map(jnp.add, eta_bar, from_first)
    if wanted:
        _, pull = jax.vjp(lambda eta: split(unroll.init(eta))[0], eta)
        eta_bar = jax.tree.map(jnp.add, eta_bar, *pull(state_bar))
    return (loss, Aux(metrics, theta_T, inner)), eta_bar
