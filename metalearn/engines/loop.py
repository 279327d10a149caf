"""The inner loop as a scan, and what of it is kept for the way back.

Reverse mode reads every step again, backwards. Keeping what each step computed costs
O(T) activations; keeping only the states costs one more forward pass; keeping the
state of every sqrt(T)-th step costs two, and memory O(sqrt(T)) (Griewank 1992,
Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.engines.check import check_eta, horizon
from metalearn.engines.engine import Aux
from metalearn.engines.recorder import Inner, Recorder
from metalearn.names import pick
from metalearn.unroll import Unroll

REMAT = {
    "none": "every step keeps all it computed",
    "step": "every step keeps its state",
    "nested": "about every sqrt(T)-th step keeps its state",
}
Body = Callable[[Any, Any], tuple[Any, Inner]]


def check_remat(name: str) -> None:
    """Raise ValueError, with the choices, where a `remat` is none of them."""
    pick(REMAT, name, "remat")


def step_body(unroll: Unroll, eta: Any, value_and_grad: Callable[..., Any]) -> Body:
    """Return one inner step as a scan body: state, batch -> state, what it saw."""

    def body(state: Any, batch: Any) -> tuple[Any, Inner]:
        recorder = Recorder(value_and_grad)
        state = unroll.step(eta, state, batch, recorder.grad)
        return state, recorder.inner()

    return body


def backpropagate(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    remat: str = "none",
    policy: Callable[..., bool] | None = None,
) -> tuple[tuple[jax.Array, Aux], Any]:
    """Return ((loss (), aux), meta-gradient like eta), by reverse mode over the loop."""
    check_eta(eta)

    def objective(eta: Any) -> tuple[jax.Array, Aux]:
        return rollout(unroll, eta, batches, value_and_grad, remat, policy)

    return jax.value_and_grad(objective, has_aux=True)(eta)


def rollout(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    remat: str = "none",
    policy: Callable[..., bool] | None = None,
) -> tuple[jax.Array, Aux]:
    """Run the inner loop and the outer loss: (loss (), aux). Differentiable in eta."""
    body = step_body(unroll, eta, value_and_grad)
    state, inner = scan(body, unroll.init(eta), batches, remat, policy)
    loss, metrics = unroll.loss(eta, state)
    return loss, Aux(metrics, state, inner)


def scan(
    body: Body, state: Any, batches: Any, remat: str, policy: Callable[..., bool] | None
) -> tuple[Any, Inner]:
    """Scan `body` over the T slices of `batches`, checkpointed as `remat` says."""
    once = horizon(batches) == 1
    if remat == "none":
        return _once(body, state, batches) if once else jax.lax.scan(body, state, batches)
    step = jax.checkpoint(body, policy=policy, prevent_cse=once)
    if once:
        return _once(step, state, batches)
    if remat == "step":
        return jax.lax.scan(step, state, batches)
    return _nested(step, state, batches, policy)


def _once(body: Body, state: Any, batches: Any) -> tuple[Any, Inner]:
    """Take the only step without a loop, which would copy all it keeps for the way back."""
    state, inner = body(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], inner)


def _nested(
    step: Body, state: Any, batches: Any, policy: Callable[..., bool] | None
) -> tuple[Any, Inner]:
    """Scan over about sqrt(T) segments, each a scan, both levels checkpointed."""
    steps = horizon(batches)
    length = math.isqrt(steps - 1) + 1
    whole = steps - steps % length

    def segment(state: Any, batches: Any) -> tuple[Any, Inner]:
        return jax.lax.scan(step, state, batches)

    head = jax.tree.map(lambda x: x[:whole].reshape(-1, length, *x.shape[1:]), batches)
    checkpointed = jax.checkpoint(segment, policy=policy, prevent_cse=False)
    state, inner = jax.lax.scan(checkpointed, state, head)
    inner = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), inner)
    if whole == steps:
        return state, inner
    state, rest = segment(state, jax.tree.map(lambda x: x[whole:], batches))
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), inner, rest)
