"""The parameters an update rule can move: floating-point arrays, whatever their rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import paths


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
