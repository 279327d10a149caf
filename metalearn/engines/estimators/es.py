"""Evolution strategies: the meta-gradient of a smoothed loss, from losses alone.

    dF/deta  ~  mean_i (F(eta + eps_i) - F(eta - eps_i)) / (2 sigma^2) eps_i

with eps_i ~ N(0, sigma^2 I); see `metalearn.engines.estimators.antithetic` for the derivation. The
inner loop need not be differentiable. Where it is, the derivative may still be useless: after a
long unroll the loss is often chaotic in eta and its derivative explodes, while that of the
smoothed loss does not. The variance grows with the size of eta, so this engine is for
hyperparameters and small learned optimizers.

| n pairs | memory                     | time, in forward passes of the loop | bias       |
|---------|----------------------------|-------------------------------------|------------|
| `ES`    | 2n inner states, flat in T | 2n                                  | O(sigma^2) |

In truncated unrolls every particle starts from the one carried inner state, which is treated as a
constant. The estimate is then biased towards the short term, like truncated backpropagation;
`PES` is not.

References: Rechenberg 1973; Nesterov and Spokoiny 2017 (their Gaussian smoothing); Salimans et al.
2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"
(arXiv:1703.03864); for learned optimizers, Metz et al. 2019 (arXiv:1810.10180).
"""

from __future__ import annotations

import dataclasses

import jax

from metalearn.engines.estimators.antithetic import Antithetic, Particles, mirrored
from metalearn.unroll import Eta, InnerState, Unroll


@dataclasses.dataclass(frozen=True)
class ES(Antithetic):
    """Antithetic evolution strategies: unbiased for the smoothed loss of a full unroll.

    Args:
      pairs: n, mirrored pairs of perturbations; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations, in the units of eta. Large: a smoother loss,
        and a bias of O(sigma^2). Small: differences of losses are lost to rounding.
    """

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> jax.Array:
        """Return the key of the perturbations."""
        del unroll, eta
        return key

    def draw(self, eta: Eta, state: jax.Array) -> Particles:
        """Draw the particles of one call; no inner states are carried from call to call."""
        key, now = jax.random.split(state)
        directions = self.perturbations(now, eta)
        return Particles(mirrored(eta, directions), directions, (), key)

    def particle_unroll(self, unroll: Unroll, state: jax.Array, particle: InnerState) -> Unroll:
        """Return the unroll unchanged: every particle starts from its `init`."""
        del state, particle
        return unroll

    def next_state(self, particles: Particles, states: InnerState) -> jax.Array:
        """Return the key of the next call."""
        del states
        return particles.key
