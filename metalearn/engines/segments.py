"""The inner loop in segments: one function advances a state, one pulls cotangents back.

A run of T steps that is cut into segments of K is differentiated by two functions, whatever T is,

    advance     eta, state, batches [K]                          -> state
    pull_back   eta, state, batches [K], cotangents of the end   -> cotangents of the beginning

the second of which computes the steps of its segment again, and differentiates them as the engine
does, with its rematerialisation and its Hessian products. What is left are theta_0 = init(eta) and
the outer loss, which are small functions of their own. Between two calls the cotangents are all
that has to be remembered: those of the state's float leaves, and the sum of those of eta so far.

Integer, boolean and key leaves of a state have no derivative: `pull_back` reads their values at the
beginning of the segment and returns cotangents of the float leaves alone.

The host drives these functions, and says which states it keeps (`metalearn.training.segment_run`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.trees import split
from metalearn.engines.base import check_eta, going_backwards, outer_loss
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.inner_loop import Remat, scan, step_body
from metalearn.unroll import Batch, Eta, InnerState, Metrics, Unroll


class Cotangents(NamedTuple):
    """The derivative of the outer loss of a run with respect to its state between two steps.

    Args:
      state: like the inner state, with None for leaves that have no derivative. Its paths are
        those of the inner state, by which it is sharded.
      eta: like eta: through all later steps, and the outer loss itself.
    """

    state: InnerState
    eta: Eta


def advance(
    unroll: Unroll,
    eta: Eta,
    state: InnerState,
    batches: Batch,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
) -> tuple[InnerState, Inner]:
    """Take the next inner steps: (state after them, what was recorded of them).

    Args:
      unroll: the inner loop.
      eta: the meta-parameters.
      state: before the first of these steps.
      batches: of these steps, leaves [K, ...].
      value_and_grad: takes the inner gradients.
    """
    return jax.lax.scan(step_body(unroll, eta, value_and_grad), state, batches)


def pull_back(
    unroll: Unroll,
    eta: Eta,
    state: InnerState,
    batches: Batch,
    cotangents: Cotangents,
    value_and_grad: Callable[..., Any],
    remat: Remat,
) -> Cotangents:
    """Pull cotangents of the state after some steps back to the state before them.

    Args:
      unroll: the inner loop.
      eta: the meta-parameters.
      state: before the first of these steps.
      batches: of these steps, leaves [K, ...].
      cotangents: after the last of these steps.
      value_and_grad: takes the inner gradients, and says how they are differentiated.
      remat: which residuals of the segment are saved for its backward pass.
    """
    floats, others, join = split(state)

    def segment(eta: Eta, floats: list[jax.Array]) -> list[jax.Array]:
        body = step_body(unroll, eta, value_and_grad)
        return split(scan(body, join(floats, others), batches, remat)[0])[0]

    with going_backwards():
        _, pull = jax.vjp(segment, eta, floats)
    eta_bar, state_bar = pull(jax.tree.leaves(cotangents.state))
    eta_bar = jax.tree.map(jnp.add, cotangents.eta, eta_bar)
    return Cotangents(join(state_bar, [None] * len(others)), eta_bar)


def outer_cotangents(
    unroll: Unroll, eta: Eta, state: InnerState
) -> tuple[tuple[jax.Array, Metrics], Cotangents]:
    """Return ((outer loss (), metrics), cotangents of the state after the last step)."""
    check_eta(eta)
    floats, others, join = split(state)

    def outer(floats: list[jax.Array], eta: Eta) -> tuple[jax.Array, Metrics]:
        return outer_loss(unroll, eta, join(floats, others))

    judged, (state_bar, eta_bar) = jax.value_and_grad(outer, (0, 1), has_aux=True)(floats, eta)
    return judged, Cotangents(join(state_bar, [None] * len(others)), eta_bar)


def through_init(unroll: Unroll, eta: Eta, cotangents: Cotangents) -> Eta:
    """Return the meta-gradient, like eta, from the cotangents of theta_0."""
    _, pull = jax.vjp(lambda eta: split(unroll.init(eta))[0], eta)
    (eta_bar,) = pull(jax.tree.leaves(cotangents.state))
    return jax.tree.map(jnp.add, cotangents.eta, eta_bar)
