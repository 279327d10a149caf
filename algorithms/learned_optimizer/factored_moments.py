"""Second moments of a matrix from those of its rows and columns, as a feature.

Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) keeps running means of the squared gradient
over each row and over each column, n + m numbers for a matrix of n m, and takes

    v_ij = row_i column_j / mean(row)

in the place of the second moment. For tensors of higher rank, rows and columns are those of
the two longest axes; tensors of rank 0 and 1 have the full second moment in the place of both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn.algorithms.learned_optimizer.float_leaves import check_decays, precision
from metalearn.algorithms.learned_optimizer.parameter_features import (
    LEAST,
    Feature,
    Tensor,
    over,
    running_means,
)


@dataclasses.dataclass(frozen=True)
class FactoredMoments(Feature):
    """Roots r of the row's and the column's second moment, 1 / r, and each direction over both.

    Slots: a row and a column for each decay.
    """

    decays: tuple[float, ...] = (0.9, 0.99, 0.999)

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays(self.decays)

    def size(self, directions: int) -> int:
        return len(self.decays) * (4 + directions)

    def init(self, param: jax.Array) -> Any:
        square = jnp.zeros(param.shape, precision(param))
        return tuple(
            jnp.zeros((len(self.decays), *part.shape), part.dtype) for part in _parts(square)
        )

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        parts = _parts(tensor.grad**2)
        slot = tuple(running_means(s, p, self.decays) for s, p in zip(slot, parts, strict=True))
        inverses = [jax.lax.rsqrt(means + LEAST) for means in slot]
        roots = [(means + LEAST) * inverse for means, inverse in zip(slot, inverses, strict=True)]
        each = [*roots, *inverses] if len(slot) == 2 else [*roots * 2, *inverses * 2]
        shape = (len(self.decays), *tensor.grad.shape)
        values = [jnp.broadcast_to(part, shape) for part in each]
        inverse = _inverse_root(slot, _axes(tensor.grad.shape))
        return slot, jnp.concatenate([*values, over(tensor.directions, inverse)])


def _axes(shape: tuple[int, ...]) -> list[int]:
    """Return the axis that rows are averaged over, and columns: the longest two; none below."""
    longest = np.argsort(shape, kind="stable")[::-1]
    return [int(axis) for axis in longest[:2]] if len(shape) > 1 else []


def _parts(square: jax.Array) -> list[jax.Array]:
    """Return the means of each row and of each column, averaged axes kept; or the whole."""
    return [square.mean(axis, keepdims=True) for axis in _axes(square.shape)] or [square]


def _inverse_root(slot: Any, axes: list[int]) -> jax.Array:
    """Return 1 / sqrt(v) from the running means: [k, *shape]."""
    if len(slot) == 1:
        return jax.lax.rsqrt(slot[0] + LEAST)
    row, column = slot
    mean = row.mean(1 + axes[1], keepdims=True)
    share = (row + LEAST) / (mean + LEAST)
    return jax.lax.rsqrt(share) * jax.lax.rsqrt(column + LEAST)
