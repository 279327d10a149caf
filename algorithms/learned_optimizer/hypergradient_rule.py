"""SGD with a learning rate that adapts during the run; how it adapts is learned.

    u_t     = mu u_{t-1} + g_t
    alpha_t = alpha_{t-1} exp(beta cos(g_t, u_{t-1}))                 alpha_0 = alpha
    theta_{t+1} = theta_t - alpha_t u_t

While the gradient has the direction of the last step, the rate was too small, and grows: the
multiplicative hypergradient rule (Baydin et al. 2018, arXiv:1703.04782). The factor is the
exponential of a cosine, so one step changes a rate by at most a factor exp(beta), and rates stay
positive. eta is three numbers: log alpha, log beta and the logit of mu.

The state is u and one number per rate, the sum of beta cos so far.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import pick
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule, check_params
from metalearn.unroll import Eta

LEAST = 1e-16  # added to squared norms: cosines go to zero where a norm is below 1e-8


class HypergradientState(NamedTuple):
    """The state of `HypergradientRule`: trees like the parameters.

    velocity: u, in float32 or float64.
    gain: (), the logarithm of the factor between each tensor's current and initial rate.
    """

    velocity: Any
    gain: Any


# From the inner products of each tensor, [3], to those that its cosine is computed from.
RATES: dict[str, Callable[[list[jax.Array]], list[jax.Array]]] = {
    "per tensor": lambda dots: dots,
    "global": lambda dots: [jnp.stack(dots).sum(0)] * len(dots),
}


@dataclasses.dataclass(frozen=True)
class HypergradientRule(UpdateRule):
    """Learn how SGD adapts its rate. eta: {"log_rate", "log_hyper_rate", "logit_momentum"}.

    Args:
      rate: the initial value of alpha, the learning rate at the start of a run.
      hyper_rate: the initial value of beta, which scales the changes of the rate.
      momentum: the initial value of mu.
      rates: "per tensor", or "global": one rate for all tensors.
    """

    rate: float = 0.01
    hyper_rate: float = 0.02
    momentum: float = 0.9
    rates: str = "per tensor"

    def __post_init__(self) -> None:
        check_fields(self)
        pick(RATES, self.rates, "kind of rates")
        if not (self.rate > 0 and self.hyper_rate > 0):
            raise ValueError(
                f"Rates are learned as logarithms, so rate={self.rate} and hyper_rate="
                f"{self.hyper_rate} must be positive. Start from a small one, such as 1e-4."
            )
        if not 0 < self.momentum < 1:
            raise ValueError(
                f"Momentum is learned as a logit, so momentum={self.momentum} must lie strictly "
                "between 0 and 1. Start from a small one, such as 0.01."
            )

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the initial values of the three numbers, leaves ()."""
        del key
        return {
            "log_rate": jnp.asarray(math.log(self.rate)),
            "log_hyper_rate": jnp.asarray(math.log(self.hyper_rate)),
            "logit_momentum": jnp.asarray(math.log(self.momentum / (1 - self.momentum))),
        }

    def optimizer(self, eta: Eta) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer. Its derivative is finite where gradients are exactly zero."""

        def init(params: Any) -> HypergradientState:
            check_params(params, "HypergradientRule")
            velocity = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), precision(p)), params)
            return HypergradientState(
                velocity, jax.tree.map(lambda p: jnp.zeros((), precision(p)), params)
            )

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            del extra, params
            wide = jax.tree.map(lambda g, u: jnp.asarray(g, u.dtype), grads, state.velocity)
            cosines = self._cosines(wide, state.velocity)

            def next_gain(gain: jax.Array, cosine: jax.Array) -> jax.Array:
                return gain + _like(gain, jnp.exp(eta["log_hyper_rate"])) * cosine

            def next_velocity(u: jax.Array, g: jax.Array) -> jax.Array:
                return _like(u, jax.nn.sigmoid(eta["logit_momentum"])) * u + g

            def step(g: Any, u: jax.Array, gain: jax.Array) -> jax.Array:
                rate = jnp.exp(_like(gain, eta["log_rate"]) + gain)
                return (-rate * u).astype(jnp.result_type(g))

            gain = jax.tree.map(next_gain, state.gain, cosines)
            velocity = jax.tree.map(next_velocity, state.velocity, wide)
            updates = jax.tree.map(step, grads, velocity, gain)
            return updates, HypergradientState(velocity, gain)

        return optax.GradientTransformationExtraArgs(init, update)

    def _cosines(self, grads: Any, velocity: Any) -> Any:
        """Return cos(g_t, u_{t-1}) of each tensor, leaves (); 0 where either is zero."""
        leaves, treedef = jax.tree.flatten(grads)
        dots = [_dots(g, u) for g, u in zip(leaves, jax.tree.leaves(velocity), strict=True)]
        return jax.tree.unflatten(treedef, [_cosine(d) for d in RATES[self.rates](dots)])


def _dots(g: jax.Array, u: jax.Array) -> jax.Array:
    """Return (g u, g g, u u): [3]."""
    return jnp.stack([(g * u).sum(), (g * g).sum(), (u * u).sum()])


def _cosine(dots: jax.Array) -> jax.Array:
    dots = jnp.where(jnp.isfinite(dots).all(), dots, 0)  # no angle where a norm overflows
    return dots[0] * jax.lax.rsqrt(dots[1] + LEAST) * jax.lax.rsqrt(dots[2] + LEAST)


def _like(array: jax.Array, number: Any) -> jax.Array:
    """Return a number of eta in the dtype of an array."""
    return jnp.asarray(number, array.dtype)
