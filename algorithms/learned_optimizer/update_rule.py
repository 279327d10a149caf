"""A learned optimizer: an optax optimizer as a function of meta-parameters.

    u_t, slots = rule(eta)(g_t, slots, theta_t)         theta_{t+1} = theta_t + u_t

For fixed eta an update rule is an optax optimizer, so it can be chained, masked, wrapped and
exported like any other. Update rules range from a hand-designed optimizer whose few hyperparameters
are learned to a network that is applied to every parameter; `metalearn.algorithms.LearnedOptimizer`
trains any of them.

References: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2020 (arXiv:2009.11243)
and 2022 (arXiv:2203.11860).

An update rule updates floating-point arrays of any rank; leaves that are not arrays (masked ones)
pass through unchanged.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.trees import paths
from metalearn.unroll import Eta


class UpdateRule(abc.ABC):
    """A learned optimizer as a function of eta. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Eta:
        """Return the initial eta: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def optimizer(self, eta: Eta) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer with parameters eta. Differentiable in eta, at every gradient."""


def check_params(params: Any, rule: str) -> None:
    """Raise ValueError for missing parameters, TypeError for those that are not floating-point."""
    if params is None:
        raise ValueError(
            f"`{rule}` reads the parameters, and its `update` got none. Write "
            "`optimizer.update(grads, state, params)`."
        )
    for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`{rule}` moves floating-point parameters, and {name or 'the parameter'} is of "
                f"{jnp.result_type(leaf)}. Leave it out, such as by `optax.masked`."
            )


def check_decays(decays: Iterable[float]) -> None:
    """Raise ValueError unless there are decays of running means, each from 0 to below 1."""
    decays = tuple(decays)
    if not decays or not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"Decays are one or more numbers from 0 to below 1, not {decays}.")
