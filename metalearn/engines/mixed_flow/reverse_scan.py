"""An explicit reverse scan over inner steps, for saving less than the inner states themselves.

`jax.checkpoint` saves residuals or recomputes them. Here the backward loop is explicit,

    c_t  =  (d theta_{t+1} / d theta_t)^T c_{t+1}        c_T = dF / d theta_T
    dF/deta  =  sum_t (d theta_{t+1} / d eta)^T c_{t+1}  + direct terms

so that the inner states can be saved in other ways: `Copies` saves all T of them, and the inner
gradients, in host memory or in low precision; `Anchors` saves every k-th state and undoes the
steps in between. Inner gradients are recorded in the forward pass and replayed in the backward
pass, so that no loss is evaluated again for them. The first step is peeled: where theta_0 does not
depend on eta, c_0 is not computed.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import split
from metalearn.engines.base import Aux, check_eta, going_backwards, outer_loss
from metalearn.engines.grad_recorder import OneStep, ValueAndGrad, joined
from metalearn.engines.inner_loop import depends
from metalearn.engines.segments import Cotangents
from metalearn.unroll import Unroll, horizon


def sweep(
    unroll: Unroll,
    eta: Any,
    batches: Any,
    value_and_grad: ValueAndGrad,
    saved: Saved,
    peel: bool = True,
) -> tuple[tuple[jax.Array, Aux], Any]:
    """Differentiate an unroll: ((loss (), aux), meta-gradient like eta).

    Args:
      unroll: the inner loop.
      eta: the meta-parameters.
      batches: leaves [T, ...].
      value_and_grad: for inner gradients.
      saved: which residuals are saved for the backward pass, and how.
      peel: compute the first step outside the scan.
    """
    check_eta(eta)
    with going_backwards():
        return _swept(unroll, eta, batches, value_and_grad, saved, peel)


def _swept(
    unroll: Unroll, eta: Any, batches: Any, value_and_grad: ValueAndGrad, saved: Saved, peel: bool
) -> tuple[tuple[jax.Array, Aux], Any]:
    one_step = horizon(batches) == 1
    step = OneStep(unroll, eta, value_and_grad)
    first, rest = jax.tree.map(lambda x: x[0], batches), jax.tree.map(lambda x: x[1:], batches)
    theta_0 = unroll.init(eta)
    theta_1, (first_inner, tape) = step.forward(theta_0, first)
    inner = jax.tree.map(lambda x: x[None], first_inner)
    theta_T, residuals = theta_1, None
    if not one_step:
        theta_T, rest_inner, residuals = saved.forward(step, theta_1, rest)
        inner = joined([inner, rest_inner])

    floats, others, join = split(theta_T)

    def outer(eta: Any, floats: list[Any]) -> tuple[jax.Array, Any]:
        return outer_loss(unroll, eta, join(floats, others))

    (loss, metrics), bars = jax.value_and_grad(outer, (1, 0), has_aux=True)(eta, floats)
    state_bar, eta_bar = bars if one_step else saved.back(step, theta_T, rest, residuals, bars)
    needs_state_bar = not peel or depends(unroll.init, eta)
    state_bar, first_eta_bar = step.back(theta_0, first, tape, state_bar, needs_state_bar)
    eta_bar = jax.tree.map(jnp.add, eta_bar, first_eta_bar)
    if needs_state_bar:
        _, pull = jax.vjp(lambda eta: split(unroll.init(eta))[0], eta)
        eta_bar = jax.tree.map(jnp.add, eta_bar, *pull(state_bar))
    return (loss, Aux(metrics, theta_T, inner)), eta_bar


def sweep_segment(
    unroll: Unroll,
    eta: Any,
    state: Any,
    batches: Any,
    cotangents: Cotangents,
    value_and_grad: ValueAndGrad,
    saved: Saved,
) -> Cotangents:
    """Pull cotangents back through a segment; see `metalearn.engines.segments.pull_back`."""
    with going_backwards():
        step = OneStep(unroll, eta, value_and_grad)
        after, _, residuals = saved.forward(step, state, batches)
        bars = jax.tree.leaves(cotangents.state), cotangents.eta
        state_bar, eta_bar = saved.back(step, after, batches, residuals, bars)
        _, others, join = split(state)
        return Cotangents(join(state_bar, [None] * len(others)), eta_bar)


Bars = tuple[list[jax.Array], Any]  # cotangents of the state's float leaves, and of eta


class Saved(abc.ABC):
    """Which residuals of a loop over batches [T, ...] are saved for the backward pass. T >= 1."""

    @abc.abstractmethod
    def forward(self, step: OneStep, state: Any, batches: Any) -> tuple[Any, Any, Any]:
        """Return (last state, inner losses and norms [T, ...], residuals)."""

    @abc.abstractmethod
    def back(self, step: OneStep, state: Any, batches: Any, residuals: Any, bars: Bars) -> Bars:
        """Pull cotangents of the last state back to the first, and accumulate those of eta."""


@dataclasses.dataclass(frozen=True)
class Copies(Saved):
    """Save every state and inner gradient.

    Args:
      put: array -> its stored form.
      get: (stored form, dtype of the array) -> array.
    """

    put: Callable[[jax.Array], Any]
    get: Callable[[Any, Any], jax.Array]

    def forward(self, step: OneStep, state: Any, batches: Any) -> tuple[Any, Any, Any]:
        """Scan over the steps, saving states and tapes."""

        def body(state: Any, batch: Any) -> Any:
            after, (inner, tape) = step.forward(state, batch)
            return after, (inner, jax.tree.map(self.put, (state, tape)))

        state, (inner, residuals) = jax.lax.scan(body, state, batches)
        return state, inner, residuals

    def back(self, step: OneStep, state: Any, batches: Any, residuals: Any, bars: Bars) -> Bars:
        """Scan backwards over the saved states."""
        first = jax.tree.map(lambda x: x[0], batches)
        _, (_, tape) = jax.eval_shape(step.forward, state, first)
        dtypes = jax.tree.map(lambda x: x.dtype, (state, tape))

        def body(bars: Bars, slice_: Any) -> Any:
            batch, stored = slice_
            state, tape = jax.tree.map(self.get, stored, dtypes)
            return _added(bars, step.back(state, batch, tape, bars[0])), None

        return jax.lax.scan(body, bars, (batches, residuals), reverse=True)[0]


def in_bfloat16() -> Copies:
    """Save real floating-point arrays as the bits of bfloat16: XLA would undo a conversion."""

    def put(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)

    def get(x: jax.Array, dtype: Any) -> jax.Array:
        if x.dtype == dtype:
            return x
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(dtype)

    return Copies(put, get)


def needs_fetch() -> Copies:
    """Save arrays in host memory; no transfer if that is the device's memory too."""
    device, host = jax.memory.Space.Device, jax.memory.Space.Host
    return Copies(lambda x: jax.device_put(x, host), lambda x, _: jax.device_put(x, device))


@dataclasses.dataclass(frozen=True)
class Anchors(Saved):
    """Save every k-th state, and undo the steps in between.

    Args:
      every: k, in inner steps.
    """

    every: int

    def forward(self, step: OneStep, state: Any, batches: Any) -> tuple[Any, Any, Any]:
        """Scan over segments, saving the state at the end of each."""

        def body(state: Any, batch: Any) -> Any:
            state, (inner, _) = step.forward(state, batch)
            return state, inner

        def segment(state: Any, batches: Any) -> Any:
            state, inner = jax.lax.scan(body, state, batches)
            return state, (inner, state)

        head, tail = self._segments(batches)
        state, (inner, ends) = jax.lax.scan(segment, state, head)
        inner = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), inner)
        state, rest = jax.lax.scan(body, state, tail)
        return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), inner, rest), ends

    def back(self, step: OneStep, state: Any, batches: Any, residuals: Any, bars: Bars) -> Bars:
        """Scan backwards over segments, each from the saved state at its end."""

        def body(carry: Any, batch: Any) -> Any:
            state, bars = carry
            state, tape = step.undone(state, batch)
            return (state, _added(bars, step.back(state, batch, tape, bars[0]))), None

        def segment(bars: Bars, slice_: Any) -> Any:
            end, batches = slice_
            (_, bars), _ = jax.lax.scan(body, (end, bars), batches, reverse=True)
            return bars, None

        head, tail = self._segments(batches)
        bars, _ = segment(bars, (state, tail))
        return jax.lax.scan(segment, bars, (residuals, head), reverse=True)[0]

    def _segments(self, batches: Any) -> tuple[Any, Any]:
        """Return the batches of complete segments [n, every, ...], and the remaining ones."""
        steps = jax.tree.leaves(batches)[0].shape[0]
        complete = steps - steps % self.every
        sizes = complete // self.every, self.every
        head = jax.tree.map(lambda x: x[:complete].reshape(*sizes, *x.shape[1:]), batches)
        return head, jax.tree.map(lambda x: x[complete:], batches)


def _added(bars: Bars, step: Bars) -> Bars:
    return step[0], jax.tree.map(jnp.add, bars[1], step[1])
