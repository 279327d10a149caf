"""A learned optimizer: an optax optimizer as a function of meta-parameters.

    u_t, slots = rule(eta)(g_t, slots, theta_t)         theta_{t+1} = theta_t + u_t

That is all an update rule is, so whatever is done with an optax optimizer can be done with a
learned one: chained, masked, wrapped, exported. Its members range from a hand-designed
optimizer whose few hyperparameters are learned to a network that is applied to every
parameter alike; `metalearn.algorithms.LearnedOptimizer` trains any of them.

References: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2020 (arXiv:2009.11243)
and 2022 (arXiv:2203.11860).
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import optax


class UpdateRule(abc.ABC):
    """A learned optimizer, but for its eta. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Return eta before it is trained: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def optimizer(self, eta: Any) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer that eta stands for. Differentiable in eta, at every gradient."""
