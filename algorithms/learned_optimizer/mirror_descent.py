"""Mirror descent whose mirror map is learned.

    u_t         = mu u_{t-1} + g_t
    theta_{t+1} = (grad psi)^-1 (grad psi(theta_t) - alpha u_t)

Gradient descent is mirror descent with psi = theta^2 / 2; another convex psi measures distances by
another Bregman divergence, and suits other problems. Learning psi from training runs is Gao et al.
2022, "Meta Mirror Descent" (arXiv:2203.02711). Here psi is of the family of the hypentropy (Ghai,
Hazan and Singer 2020, arXiv:1902.01903), one number beta:

    grad psi(theta) = beta arcsinh(theta / beta)

As beta goes to infinity this is gradient descent; as it goes to zero, the multiplicative update of
exponentiated gradients, on both signs, which favours sparse solutions. For small steps the rate of
a parameter is alpha sqrt(1 + theta^2 / beta^2): larger parameters move faster. eta is three
numbers: log alpha, log beta and the logit of mu. (A quadratic psi, a matrix per tensor that is
learned, is `metalearn.algorithms.MetaCurvature`.)

A step is computed by its difference, so that theta keeps its digits where beta is large; one step
changes arcsinh(theta / beta) by at most 10, which a step that diverges would exceed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import above
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule, check_params
from metalearn.unroll import Eta

LARGEST = 10.0  # change of arcsinh(theta / beta) in a step


@dataclasses.dataclass(frozen=True)
class MirrorDescent(UpdateRule):
    """Learn the mirror map of mirror descent. eta: {"log_rate", "log_beta", "logit_momentum"}.

    Args:
      rate: the initial value of alpha, the learning rate of a parameter that is zero.
      beta: the initial value of beta, the size of a parameter above which it moves faster.
      momentum: the initial value of mu.
    """

    rate: float = 0.1
    beta: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_fields(self)
        above("MirrorDescent", 0, rate=self.rate, beta=self.beta)
        if not 0 < self.momentum < 1:
            raise ValueError(
                f"Momentum is learned as a logit, so `MirrorDescent(momentum={self.momentum})` "
                "must lie strictly between 0 and 1. Start from a small one, such as 0.01."
            )

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the initial values of the three numbers, leaves ()."""
        del key
        return {
            "log_rate": jnp.asarray(math.log(self.rate)),
            "log_beta": jnp.asarray(math.log(self.beta)),
            "logit_momentum": jnp.asarray(math.log(self.momentum / (1 - self.momentum))),
        }

    def optimizer(self, eta: Eta) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer. Its update is a smooth function of gradients and parameters."""

        def init(params: Any) -> Any:
            check_params(params, "MirrorDescent")
            return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), precision(p)), params)

        def update(grads: Any, velocity: Any, params: Any = None, **extra: Any) -> Any:
            del extra
            check_params(params, "MirrorDescent")

            def next_velocity(g: Any, u: jax.Array) -> jax.Array:
                momentum = jax.nn.sigmoid(eta["logit_momentum"]).astype(u.dtype)
                return momentum * u + jnp.asarray(g, u.dtype)

            def step(g: Any, u: jax.Array, p: Any) -> jax.Array:
                theta, beta = jnp.asarray(p, u.dtype), jnp.exp(eta["log_beta"]).astype(u.dtype)
                s = jnp.exp(eta["log_rate"]).astype(u.dtype) / beta * u
                s = jnp.clip(s, -LARGEST, LARGEST)
                # beta sinh(arcsinh(theta / beta) - s) - theta, without cancellation
                change = 2 * theta * jnp.sinh(s / 2) ** 2
                change = change - jnp.sqrt(theta**2 + beta**2) * jnp.sinh(s)
                return change.astype(jnp.result_type(g))

            velocity = jax.tree.map(next_velocity, grads, velocity)
            return jax.tree.map(step, grads, velocity, params), velocity

        return optax.GradientTransformationExtraArgs(init, update)
