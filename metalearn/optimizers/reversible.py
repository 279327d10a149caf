"""Inner optimizers whose step can be undone, without the gradient that it took.

Adam's update is a function of its moments after the step, so the parameters before it are

    theta_t = theta_{t+1} - u(m_{t+1}, v_{t+1})

and with the gradient g_t computed there again, m_t = (m_{t+1} - (1 - b1) g_t) / b1 and v_t
likewise. An inner loop then need not save its states for the backward pass
(`MixedFlow(remat="inexact_reconstruct")`): memory is flat in T. But 1 / b1 > 1: what rounding
adds grows geometrically, step by step back, so the states are kept again every so often.

Maclaurin et al. 2015 (arXiv:1502.03492) undo momentum steps exactly, in integers, at the
price of an information buffer; here nothing is buffered, and the states are inexact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Reversible(NamedTuple):
    """An optax transformation (`init`, `update`), and how to undo it."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    last_update: Callable[[Any], Any]  # state after a step -> the update of that step
    before: Callable[[Any, Any], Any]  # state after a step, its gradients -> state before it


def adam(
    learning_rate: float | optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
) -> Reversible:
    """Return `optax.adam` without its further options, its step reversible.

    Args:
      learning_rate: a number, or a function of the step.
      b1: the decay of the mean of gradients, between 0 and 1.
      b2: the decay of the mean of squared gradients, between 0 and 1.
      eps: added to the root of the mean of squares.
      eps_root: added under that root.
    """
    if not (0 < b1 < 1 and 0 < b2 < 1):
        raise ValueError(
            "A reversible Adam divides its moments by b1 and b2, which therefore lie between 0 "
            f"and 1; not b1={b1}, b2={b2}."
        )
    plain = optax.scale_by_adam(b1, b2, eps, eps_root)

    def last_update(state: optax.ScaleByAdamState) -> Any:
        rate = learning_rate(state.count - 1) if callable(learning_rate) else learning_rate

        def of(m: jax.Array, v: jax.Array) -> jax.Array:
            m_hat, v_hat = m / (1 - b1**state.count), v / (1 - b2**state.count)
            return -rate * m_hat / (jnp.sqrt(v_hat + eps_root) + eps)

        return jax.tree.map(of, state.mu, state.nu)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = plain.update(grads, state, params)
        return last_update(state), state

    def before(state: optax.ScaleByAdamState, grads: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda m, g: (m - (1 - b1) * g) / b1, state.mu, grads)
        nu = jax.tree.map(
            lambda v, g: _positive(v - (1 - b2) * (g * g.conj()).real) / b2, state.nu, grads
        )
        return optax.ScaleByAdamState(state.count - 1, mu, nu)

    return Reversible(plain.init, update, last_update, before)


def _positive(v: jax.Array) -> jax.Array:
    """Keep a second moment from falling below zero by rounding."""
    return jnp.maximum(v, 0)
