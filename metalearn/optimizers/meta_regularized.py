"""Meta-Regularization: SGD whose learning rate is the solution of a problem of its own.

Xie et al. 2021 (arXiv:2104.05447) regularise the learning rate a = 1 / b beside the step, and take
both from a maxmin problem. With a phi-divergence as the regulariser, g the gradient at x_t, and s a
length that makes the units agree,

    b_{t+1}, x_{t+1} = max_b min_x  <g, x - x_t> + b/2 |x - x_t|^2 - s^2/2 b_t phi(b / b_t)

The minimum is a gradient step of rate 1 / b. Then b solves u^2 phi'(u) = r with u = b / b_t and
r = |g|^2 / (s b_t)^2, the square of the step's length in units of s:

    phi(u)             u              name
    u + 1/u - 2        sqrt(1 + r)    "adagrad_norm": b_t^2 = b_0^2 + sum |g|^2 / s^2
    u - 1 - log u      (1 + sqrt(1 + 4 r)) / 2    "reverse_kl"
    u log u - u + 1    exp(W(2 r) / 2), W Lambert's function    "kl"

u is at least 1, so the rate never rises; it hardly falls while steps are short beside s. This was
derived from the problem as the abstract of the paper states it; where the paper has other
constants, they are in s and b_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import above, pick


class MetaRegularizedState(NamedTuple):
    """State of `meta_regularized`.

    Args:
      step: (), steps taken.
      decay: (), the first learning rate over the present one, at least 1.
    """

    step: jax.Array
    decay: jax.Array


def meta_regularized(
    learning_rate: optax.ScalarOrSchedule, scale: float = 1.0, divergence: str = "adagrad_norm"
) -> optax.GradientTransformation:
    """Return gradient descent whose one learning rate falls by Meta-Regularization.

    Its derivatives of all orders are finite, at a gradient of zeros too. Both numbers may be
    traced: `FDS(optimizer=meta_regularized)` learns them.

    Args:
      learning_rate: a_0, which the first step already reduces; a number, or a function of the step
        whose values are divided by what the rate has fallen by.
      scale: s, in units of the parameters: the rate falls by steps that are long beside it.
      divergence: of `DIVERGENCES`; after long steps the rate falls by "adagrad_norm" and
        "reverse_kl" in proportion to their length, by "kl" more slowly.

    Raises:
      ValueError: for an unknown divergence, or for a number that is not positive.
    """
    growth = pick(DIVERGENCES, divergence, "divergence")
    numbers: dict[str, Any] = {"learning_rate": learning_rate, "scale": scale}
    known = {
        n: x for n, x in numbers.items() if not callable(x) and not isinstance(x, jax.core.Tracer)
    }
    above("meta_regularized", 0, **known)

    def init(params: Any) -> MetaRegularizedState:
        one = jnp.ones((), jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        return MetaRegularizedState(jnp.zeros((), jnp.int32), one)

    def update(
        grads: Any, state: MetaRegularizedState, params: Any = None
    ) -> tuple[Any, MetaRegularizedState]:
        del params
        first: Any = learning_rate(state.step) if callable(learning_rate) else learning_rate
        precise = jax.tree.map(lambda g: g.astype(state.decay.dtype), grads)
        squares = optax.tree.norm(precise, squared=True)
        length = squares * (first / (scale * state.decay)) ** 2
        decay = (state.decay * growth(length)).astype(state.decay.dtype)
        rate = first / decay
        updates = jax.tree.map(lambda g: (-rate * g).astype(g.dtype), grads)
        return updates, MetaRegularizedState(state.step + 1, decay)

    return optax.GradientTransformation(init, update)


def _adagrad_norm(r: jax.Array) -> jax.Array:
    return jnp.sqrt(1 + r)


def _reverse_kl(r: jax.Array) -> jax.Array:
    return (1 + jnp.sqrt(1 + 4 * r)) / 2


def _kl(r: jax.Array) -> jax.Array:
    return jnp.exp(lambert_w(2 * r) / 2)


DIVERGENCES: dict[str, Callable[[jax.Array], jax.Array]] = {  # r -> u
    "adagrad_norm": _adagrad_norm,
    "reverse_kl": _reverse_kl,
    "kl": _kl,
}


@jax.custom_jvp
def lambert_w(x: jax.Array) -> jax.Array:
    """Return w >= 0 with w exp(w) = x >= 0, by Halley's iteration. Its derivatives are exact."""
    log = jnp.log1p(x)
    w = log * (1 - jnp.log1p(log) / (2 + log))  # so near that three reach float64, for any x
    for _ in range(3):
        excess = w - x * jnp.exp(-w)
        w = w - excess / (1 + w - (w + 2) * excess / (2 * w + 2))
    return w


@lambert_w.defjvp
def _lambert_w_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    w = lambert_w(*primals)
    return w, tangents[0] * jnp.exp(-w) / (1 + w)
