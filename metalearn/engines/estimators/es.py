"""Evolution strategies: the derivative of a smoothed loss, from losses alone.

    dF/deta  ~  mean_i (F(eta + eps_i) - F(eta - eps_i)) / (2 sigma^2) eps_i

with eps_i ~ N(0, sigma^2 I); `metalearn.engines.estimators.antithetic` derives it. The inner loop need not
be differentiable, nor differentiable to any use: after long unrolls the loss is often chaotic in
eta, its derivative explodes, and that of the smoothed loss does not. The price is variance: it
grows with the size of eta, so this is for hyperparameters and small learned optimizers.

| n pairs | memory                     | time, in forward passes of the loop | bias       |
|---------|----------------------------|-------------------------------------|------------|
| `ES`    | 2n inner states, flat in T | 2n                                  | O(sigma^2) |

Truncated, every particle starts from the one carried state, which then counts as a constant: the
estimate is biased towards the short term, as truncated backpropagation is. `PES` is not.

References: Rechenberg 1973; Nesterov and Spokoiny 2017 (their Gaussian smoothing); Salimans et al.
2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"
(arXiv:1703.03864); for learned optimizers, Metz et al. 2019 (arXiv:1810.10180).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from metalearn.engines.estimators.antithetic import Antithetic, Particles, mirrored
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class ES(Antithetic):
    """Antithetic evolution strategies: unbiased for the smoothed loss of a whole unroll.

    Args:
      pairs: n, of perturbations that mirror each other; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations, in the units of eta.
    """

    def init(self, key: jax.Array, unroll: Unroll, eta: Any) -> Any:
        """Return the key of the perturbations."""
        del unroll, eta
        return key

    def draw(self, eta: Any, state: Any) -> Particles:
        """Draw the particles of one call; they carry nothing from call to call."""
        key, now = jax.random.split(state)
        directions = self.perturbations(now, eta)
        return Particles(mirrored(eta, directions), directions, (), key)

    def particle_unroll(self, unroll: Unroll, state: Any, particle: Any) -> Unroll:
        """Return the unroll as it is: every particle starts where it says."""
        del state, particle
        return unroll

    def next_state(self, particles: Particles, states: Any) -> Any:
        """Return the key of the next call."""
        del states
        return particles.key
