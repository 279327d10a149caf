"""The inner loop in segments: one function advances a state, one pulls cotangents back.

A run of T steps that is cut into segments of K is differentiated by two functions, whatever T is,

    advance     eta, state, batches [K]                          -> state, inner gradients [K]
    pull_back   eta, state, batches [K], inner gradients [K],
                cotangents of the end                            -> cotangents of the beginning

the second of which computes the steps of its segment again, and differentiates them as the engine
does, with its rematerialisation and its Hessian products. What is left are theta_0 = init(eta) and
the outer loss, which are small functions of their own. Between two calls the cotangents are all
that has to be remembered: those of the state's float leaves, and the sum of those of eta so far.

Inner gradients are residuals of the backward pass of an engine that differentiates them on their
own: with their values at hand, `MixedFlow` runs the optimizer's update again and evaluates no inner
loss but in Hessian products. Such an engine's `pull_back` reads those that `advance` has returned,
so that the caller may keep them, or call `advance` again for them. For any other engine there are
none: `Reverse` computes the residuals of the gradients again, with their values or without.

Integer, boolean and key leaves of a state have no derivative: `pull_back` reads their values at the
beginning of the segment and returns cotangents of the float leaves alone.

The host drives these functions, and says which states it keeps (`metalearn.training.segment_run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from metalearn._utils.trees import split
from metalearn.engines.base import check_eta, going_backwards, outer_loss
from metalearn.engines.grad_recorder import Inner, OneStep
from metalearn.engines.inner_loop import Remat, scan, step_body
from metalearn.engines.nested_scan import Body
from metalearn.unroll import Batch, Eta, InnerState, Metrics, Unroll

# The inner gradients of K steps, and what else `grad` returned that the next states depend on:
# leaves [K, ...]. Empty if the engine's `pull_back` reads none.
InnerGradients: TypeAlias = list[jax.Array]


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
    returns_gradients: bool = False,
) -> tuple[InnerState, Inner, InnerGradients]:
    """Take the next inner steps: (state after them, what was recorded of them, inner gradients).

    Args:
      unroll: the inner loop.
      eta: the meta-parameters.
      state: before the first of these steps.
      batches: of these steps, leaves [K, ...].
      value_and_grad: takes the inner gradients.
      returns_gradients: return what the inner gradients of these steps are, for `pull_back`.
    """
    if not returns_gradients:
        return *jax.lax.scan(step_body(unroll, eta, value_and_grad), state, batches), []
    step = OneStep(unroll, eta, value_and_grad)
    read = _read_by_step(step, state, batches)[1]

    def body(state: InnerState, batch: Batch) -> Any:
        after, (inner, tape) = step.forward(state, batch)
        leaves = zip(jax.tree.leaves(tape), read, strict=True)
        return after, (inner, [jnp.asarray(leaf) for leaf, is_read in leaves if is_read])

    state, (inner, gradients) = jax.lax.scan(body, state, batches)
    return state, inner, gradients


def pull_back(
    unroll: Unroll,
    eta: Eta,
    state: InnerState,
    batches: Batch,
    gradients: InnerGradients,
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
      gradients: of these steps, from `advance`; []: compute them again.
      cotangents: after the last of these steps.
      value_and_grad: takes the inner gradients, and says how they are differentiated. If there are
        `gradients`, with an argument `result`: see `grad_recorder.Playback`.
      remat: which residuals of the segment are saved for its backward pass.
    """
    floats, others, join = split(state)
    step = OneStep(unroll, eta, value_and_grad)
    tape_of = _tape_of(step, state, batches) if gradients else None

    def segment(eta: Eta, floats: list[jax.Array]) -> list[jax.Array]:
        body, inputs = step_body(unroll, eta, value_and_grad), batches
        if tape_of is not None:
            body, inputs = _played_back(step, eta, tape_of), (batches, gradients)
        return split(scan(body, join(floats, others), inputs, remat)[0])[0]

    with going_backwards():
        _, pull = jax.vjp(segment, eta, floats)
    eta_bar, state_bar = pull(jax.tree.leaves(cotangents.state))
    eta_bar = jax.tree.map(jnp.add, cotangents.eta, eta_bar)
    return Cotangents(join(state_bar, [None] * len(others)), eta_bar)


def _played_back(step: OneStep, eta: Eta, tape_of: Callable[[InnerGradients], Any]) -> Body:
    """Return an inner step as a scan body whose inner gradients are inputs beside the batch."""

    def body(state: InnerState, inputs: Any) -> tuple[InnerState, Inner]:
        batch, gradients = inputs
        return step.played_back(state, batch, tape_of(gradients), eta)

    return body


def _tape_of(
    step: OneStep, state: InnerState, batches: Batch
) -> Callable[[InnerGradients], list[Any]]:
    """Return the function from what `advance` returned of one step to the tape of that step."""
    shapes, read = _read_by_step(step, state, batches)
    leaves, treedef = jax.tree.flatten(shapes)

    def tape(gradients: InnerGradients) -> list[Any]:
        recorded = iter(gradients)
        return jax.tree.unflatten(
            treedef,
            [
                next(recorded) if is_read else jnp.zeros(leaf.shape, leaf.dtype)
                for leaf, is_read in zip(leaves, read, strict=True)
            ],
        )

    return tape


def _read_by_step(step: OneStep, state: InnerState, batches: Batch) -> tuple[Any, list[bool]]:
    """Return (shapes of the tape of a step, which of its leaves the next state depends on).

    A step may ask `grad` for outputs of its loss that it only reports, or not at all: logits, for
    instance. Those are not worth the memory.
    """
    batch = jax.tree.map(lambda x: x[0], batches)
    _, (_, shapes) = jax.eval_shape(step.forward, state, batch)

    def next_state(tape: list[Any], state: InnerState, batch: Batch) -> InnerState:
        def recorded(*call: Any, result: Any) -> Any:
            return step.value_and_grad(*call) if result is None else lambda *_, **__: result

        return dataclasses.replace(step, value_and_grad=recorded).played_back(state, batch, tape)[0]

    traced = jax.make_jaxpr(next_state)(shapes, state, batch).jaxpr
    _, used = dce_jaxpr(traced, [True] * len(traced.outvars))
    leaves = jax.tree.leaves(shapes)
    extended = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves]
    return shapes, [a or b for a, b in zip(used, extended, strict=False)]


def outer_cotangents(
    unroll: Unroll, eta: Eta, state: InnerState
) -> tuple[tuple[jax.Array, Metrics], Cotangents]:
    """Return ((outer loss (), metrics), cotangents of the state after the last step)."""
    check_eta(eta)
    floats, others, join = split(state)

    def outer(floats: list[jax.Array], eta: Eta) -> tuple[jax.Array, Metrics]:
        return outer_loss(unroll, eta, join(floats, others))

    loss, (state_bar, eta_bar) = jax.value_and_grad(outer, (0, 1), has_aux=True)(floats, eta)
    return loss, Cotangents(join(state_bar, [None] * len(others)), eta_bar)


def through_init(unroll: Unroll, eta: Eta, cotangents: Cotangents) -> Eta:
    """Return the meta-gradient, like eta, from the cotangents of theta_0."""
    _, pull = jax.vjp(lambda eta: split(unroll.init(eta))[0], eta)
    (eta_bar,) = pull(jax.tree.leaves(cotangents.state))
    return jax.tree.map(jnp.add, cotangents.eta, eta_bar)
