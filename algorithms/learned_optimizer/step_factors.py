"""What the steps of a learned optimizer may be multiplied with: features of one value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.algorithms.learned_optimizer.float_leaves import check_decays, precision
from metalearn.algorithms.learned_optimizer.parameter_features import Feature, Tensor, running_means


@dataclasses.dataclass(frozen=True)
class ParameterScale(Feature):
    """The root mean square of the tensor, but not below `least`: steps are relative to it."""

    least: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.least > 0:
            raise ValueError(
                f"A tensor of zeros would never move with least={self.least}. Take a positive one."
            )

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        square = (tensor.param**2).mean(keepdims=True)
        return slot, jnp.sqrt(jnp.maximum(square, self.least**2))[None]


@dataclasses.dataclass(frozen=True)
class ReciprocalRoot(Feature):
    """1 / sqrt(v + eps), v a running mean of the squared gradient. Slots: v."""

    decay: float = 0.999
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays((self.decay,))

    def size(self, directions: int) -> int:
        return 1

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((1, *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, jax.Array]:
        slot = running_means(slot, tensor.grad**2, (self.decay,))
        return slot, jax.lax.rsqrt(slot + self.eps)
