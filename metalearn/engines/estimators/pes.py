"""Persistent evolution strategies: unbiased estimates from truncated unrolls.

A long inner loop is cut into truncated unrolls of K inner steps, with an update of eta after each.
Evolution strategies within one of them estimate the effect of eta on the loss through these K
steps, and miss its effect on the inner state that they start from. In PES every particle has its
own inner state, carried across the truncated unrolls, is perturbed anew in each, and accumulates
the sum of its perturbations:

    xi_tau    = xi_(tau-1) + eps_tau,    xi_(-1) = 0,    eps_tau ~ N(0, sigma^2 I)
    d/deta    ~ mean_i (L_tau(theta_i+) - L_tau(theta_i-)) / (2 sigma^2) xi_(tau, i)

With a separate perturbation in each truncated unroll, the loss L_tau depends on eps_0 .. eps_tau,
and its total derivative is the sum of the derivatives with respect to each. Evolution strategies
estimate each of them as the same loss difference times that eps, so their sum is the difference
times xi_tau. The sum over tau is therefore unbiased for the (smoothed) sum of the losses while eta
is constant, and nearly so while it changes slowly.

| n pairs      | memory                     | time, in forward passes | bias in truncated unrolls |
|--------------|----------------------------|-------------------------|---------------------------|
| `PES`        | 2n inner states, carried   | 2n                      | O(sigma^2)                |
| `ES`         | 2n inner states            | 2n                      | ignores earlier unrolls   |
| `Reverse`    | K activations              | a few                   | ignores earlier unrolls   |

xi is a random walk, so the variance grows with the number of truncated unrolls since the inner
loop began. With a single one PES is antithetic `ES`, with the same perturbations for the same key.

Reference: Vicol, Metz and Sohl-Dickstein 2021, "Unbiased Gradient Estimation in Unrolled
Computation Graphs with Persistent Evolution Strategies" (arXiv:2112.13835).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.trees import select, strong
from metalearn.engines.estimators.antithetic import Antithetic, Particles, mirrored
from metalearn.unroll import Eta, InnerState, Unroll, resumed


class PESState(NamedTuple):
    """State of PES with n pairs, carried from one truncated unroll to the next.

    Args:
      key: () of the perturbations.
      xi: like eta, leaves [n, ...]: the sum of the perturbations of the first particle of a pair.
      states: inner states, leaves [2n, ...]: at eta + eps_i, then at eta - eps_i.
      fresh: (), bool: whether the inner loop starts anew; xi and states are then not read.
    """

    key: jax.Array
    xi: Eta
    states: InnerState
    fresh: jax.Array


@dataclasses.dataclass(frozen=True)
class PES(Antithetic):
    """Persistent evolution strategies: unbiased across truncated unrolls, for the smoothed loss.

    Args:
      pairs: n, mirrored pairs of particles; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations of one truncated unroll, in the units of eta.
        Large: a smoother loss, and a bias of O(sigma^2). Small: differences of losses are lost to
        rounding.
    """

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> PESState:
        """Return the state before the first truncated unroll of an inner loop."""
        count = 2 * self.pairs

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (count, *x.shape))

        def zeros(x: Any) -> jax.Array:
            return jnp.zeros((self.pairs, *jnp.shape(x)), jnp.result_type(x))

        states = jax.tree.map(repeated, strong(unroll.init(eta)))  # for their shapes
        return PESState(key, jax.tree.map(zeros, eta), states, jnp.array(True))

    def draw(self, eta: Eta, state: PESState) -> Particles:
        """Draw the perturbations of one truncated unroll; inner states are carried."""
        key, now = jax.random.split(state.key)
        eps = self.perturbations(now, eta)
        carried = select(state.fresh, jax.tree.map(jnp.zeros_like, eps), state.xi)
        xi = jax.tree.map(jnp.add, carried, eps)
        return Particles(mirrored(eta, eps), xi, state.states, key)

    def particle_unroll(self, unroll: Unroll, state: PESState, particle: InnerState) -> Unroll:
        """Return the unroll from the particle's carried inner state, or anew if `state.fresh`."""
        return resumed(unroll, state.fresh, particle)

    def next_state(self, particles: Particles, states: InnerState) -> PESState:
        """Return the state of the next truncated unroll of the same inner loop."""
        return PESState(particles.key, particles.directions, strong(states), jnp.array(False))
