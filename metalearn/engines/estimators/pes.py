"""Persistent evolution strategies: unbiased estimates from truncated unrolls.

A long run is cut into truncations of K inner steps, with an update of eta after each. Evolution
strategies within a truncation see what eta does to the loss there and now, and miss what it did
to the state that the truncation began with. Let every particle keep an inner state of its own
instead, perturbed anew in every truncation, and remember the sum of its perturbations:

    xi_tau    = xi_(tau-1) + eps_tau,    xi_(-1) = 0,    eps_tau ~ N(0, sigma^2 I)
    d/deta    ~ mean_i (L_tau(theta_i+) - L_tau(theta_i-)) / (2 sigma^2) xi_(tau, i)

Unrolled with a perturbation of its own for each truncation, the loss L_tau depends on eps_0 ..
eps_tau, and the total derivative is the sum of its derivatives with respect to each: the
estimates of one sum of losses by evolution strategies, each multiplied with its own eps. Factored
out, that is the difference times xi_tau. So the sum over truncations is unbiased for the
(smoothed) sum of their losses, as long as eta stands still, and nearly so while it moves slowly.

| n pairs      | memory                     | time, in forward passes | bias under truncation   |
|--------------|----------------------------|-------------------------|-------------------------|
| `PES`        | 2n inner states, carried   | 2n                      | O(sigma^2)              |
| `ES`         | 2n inner states            | 2n                      | misses earlier parts    |
| `Reverse`    | K activations              | a few                   | misses earlier parts    |

xi is a random walk, and the variance grows with the truncations that a run has behind it. A run of
one truncation is antithetic `ES`, to the same draws for the same key.

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
from metalearn.unroll import Unroll, resumed


class PESState(NamedTuple):
    """What PES carries from truncation to truncation, for n pairs."""

    key: jax.Array  # (): of the perturbations
    xi: Any  # like eta, leaves [n, ...]: the sum of the perturbations of a pair's first particle
    states: Any  # inner states, leaves [2n, ...]: those of eta + eps_i, then those of eta - eps_i
    fresh: jax.Array  # (), bool: whether a new run begins; xi and states are then not read


@dataclasses.dataclass(frozen=True)
class PES(Antithetic):
    """Persistent evolution strategies: unbiased for the smoothed loss across truncations.

    Args:
      pairs: n, of particles that mirror each other; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations of one truncation, in the units of eta.
    """

    def init(self, key: jax.Array, unroll: Unroll, eta: Any) -> PESState:
        """Return the state before the first truncation of a run."""
        count = 2 * self.pairs

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (count, *x.shape))

        def zeros(x: Any) -> jax.Array:
            return jnp.zeros((self.pairs, *jnp.shape(x)), jnp.result_type(x))

        states = jax.tree.map(repeated, strong(unroll.init(eta)))  # for their shapes
        return PESState(key, jax.tree.map(zeros, eta), states, jnp.array(True))

    def draw(self, eta: Any, state: PESState) -> Particles:
        """Draw the particles of one truncation, which go on from where they are."""
        key, now = jax.random.split(state.key)
        eps = self.perturbations(now, eta)
        before = select(state.fresh, jax.tree.map(jnp.zeros_like, eps), state.xi)
        xi = jax.tree.map(jnp.add, before, eps)
        return Particles(mirrored(eta, eps), xi, state.states, key)

    def particle_unroll(self, unroll: Unroll, state: PESState, particle: Any) -> Unroll:
        """Return the unroll from a particle's own state, or from the beginning of a run."""
        return resumed(unroll, state.fresh, particle)

    def next_state(self, particles: Particles, states: Any) -> PESState:
        """Return the state of the next truncation of the same run."""
        return PESState(particles.key, particles.directions, strong(states), jnp.array(False))
