"""A learned optimizer: an optax optimizer as a function of meta-parameters.

    u_t, slots = rule(eta)(g_t, slots, theta_t)         theta_{t+1} = theta_t + u_t

That is all an update rule is, so whatever is done with an optax optimizer can be done with a
learned one: chained, masked, wrapped, exported. Its members range from a hand-designed
optimizer whose few hyperparameters are learned to a network that is applied to every
parameter alike; `metalearn.algorithms.LearnedOptimizer` trains any of them.

References: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2020 (arXiv:2009.11243)
and 2022 (arXiv:2203.11860).

An update rule moves floating-point arrays of any rank; other leaves pass through unchanged.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.trees import paths


class UpdateRule(abc.ABC):
    """A learned optimizer, but for its eta. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Return eta before it is trained: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def optimizer(self, eta: Any) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer that eta stands for. Differentiable in eta, at every gradient."""


def precision(param: Any) -> Any:
    """Return the dtype a rule computes in: float32, or float64 for parameters of that."""
    return jnp.promote_types(jnp.result_type(param), jnp.float32)


def check_params(params: Any, rule: str) -> None:
    """Raise where parameters are missing (ValueError) or of a kind no rule moves (TypeError)."""
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
    """Raise ValueError for a decay of a running mean that is none, or for no decays."""
    decays = tuple(decays)
    if not decays or not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"Decays are one or more numbers from 0 to below 1, not {decays}.")
