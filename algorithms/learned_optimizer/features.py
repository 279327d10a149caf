"""Features of every parameter of a tensor: the inputs of a learned optimizer.

A feature computes, at every step, k values per parameter from the gradient and from slots of its
own (running means, for instance): [k, *shape], features first, so that each value is one contiguous
array. The features of a rule are evaluated in order. Some of them are *directions* (the gradient,
its running means): later features may divide directions by a root second moment, and so need no
running means of their own.

    (Gradient(), Momenta((0.9, 0.99)), SecondMoments((0.999,)))       3 + 1 + 1 + 3 values

Each value is divided by its root mean square over the tensor, so that the inputs of a network are
about one at any scale of the loss or of the tensor (Metz et al. 2020, arXiv:2009.11243; 2022,
arXiv:2203.11860). The derivative of this division grows as the tensor shrinks, and at zero it would
be 1e8 at each of T steps: a gradient or a parameter below 1e-8 is noise, and its derivative is cut.

Features are computed in float32, or float64 for float64 parameters, for tensors of any rank.

`FactoredMoments` approximate the second moments of a matrix from its rows and columns. Adafactor
(Shazeer & Stern 2018, arXiv:1804.04235) has running means of the squared gradient over each row
and over each column, n + m numbers for an n x m matrix, and uses

    v_ij = row_i column_j / mean(row)

instead of the second moment. For tensors of higher rank, rows and columns are the two longest axes;
tensors of rank 0 and 1 use the full second moment instead of both.

Step factors (`ParameterScale`, `ReciprocalRoot`) are features of one value by which the steps of a
learned optimizer are multiplied.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision
from metalearn.algorithms.learned_optimizer.update_rule import check_decays

Values = Float[Array, "size ..."]  # of a feature, for every parameter of a tensor
LEAST = 1e-16  # added inside a square root: corresponds to Adam's 1e-8 outside


class Tensor(NamedTuple):
    """The inputs of a feature for one tensor, in the dtype of the computation.

    grad: [*shape], the gradient.
    param: [*shape], the parameters.
    step: (), int32: updates before this one.
    directions: [d, *shape]: the directions among the features before this one.
    """

    grad: Float[Array, "*shape"]
    param: Float[Array, "*shape"]
    step: Int[Array, ""]
    directions: Float[Array, " d *shape"]


class Feature(abc.ABC):
    """Some values per parameter. Subclasses are frozen dataclasses.

    is_direction: whether later features may divide its values by a root second moment.
    is_normalized: whether its values are divided by their root mean square over the tensor.
    """

    is_direction: ClassVar[bool] = False
    is_normalized: ClassVar[bool] = True

    @abc.abstractmethod
    def size(self, directions: int) -> int:
        """Return the number of values, after features with this number of directions."""

    def init(self, param: jax.Array) -> Any:
        """Return the initial slots for a tensor."""
        del param
        return ()

    @abc.abstractmethod
    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
        """Return (next slots, values [size, *shape], or [size, 1, ...] where all are equal)."""


@dataclasses.dataclass(frozen=True)
class Gradient(Feature):
    """The gradient. A direction."""

    is_direction: ClassVar[bool] = True

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
        return slot, tensor.grad[None]


@dataclasses.dataclass(frozen=True)
class Momenta(Feature):
    """Running means of the gradient, one per decay. Directions. Slots: the running means.

    Args:
      decays: d of the running means d m + (1 - d) g.
    """

    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    is_direction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays(self.decays)

    def size(self, directions: int) -> int:
        return len(self.decays)

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((len(self.decays), *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, Values]:
        slot = running_means(slot, tensor.grad, self.decays)
        return slot, slot


@dataclasses.dataclass(frozen=True)
class SecondMoments(Feature):
    """Root second moments r as in Adam, 1 / r, and each direction over r, per decay.

    Slots: the running means of the squared gradient.

    Args:
      decays: d of the running means d v + (1 - d) g^2.
    """

    decays: tuple[float, ...] = (0.999,)

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays(self.decays)

    def size(self, directions: int) -> int:
        return len(self.decays) * (2 + directions)

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((len(self.decays), *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, Values]:
        slot = running_means(slot, tensor.grad**2, self.decays)
        inverse = jax.lax.rsqrt(slot + LEAST)
        values = [(slot + LEAST) * inverse, inverse, over(tensor.directions, inverse)]
        return slot, jnp.concatenate(values)


@dataclasses.dataclass(frozen=True)
class ParameterValue(Feature):
    """The value of the parameter."""

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
        return slot, tensor.param[None]


@dataclasses.dataclass(frozen=True)
class StepFeatures(Feature):
    """tanh(t / scale - 1) of the number of updates t: the progress of the run.

    Args:
      scales: one value per scale, in updates.
    """

    scales: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
    is_normalized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    def size(self, directions: int) -> int:
        return len(self.scales)

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
        dtype = tensor.grad.dtype
        values = jnp.tanh(tensor.step.astype(dtype) / jnp.asarray(self.scales, dtype) - 1)
        return slot, values.reshape(-1, *[1] * tensor.grad.ndim)


def init_slots(features: Sequence[Feature], param: jax.Array) -> tuple[Any, ...]:
    """Return the initial slots of every feature for one tensor."""
    return tuple(feature.init(param) for feature in features)


def width(features: Sequence[Feature]) -> int:
    """Return the total number of values of the features."""
    total, directions = 0, 0
    for feature in features:
        size = feature.size(directions)
        total, directions = total + size, directions + feature.is_direction * size
    return total


def evaluate(
    features: Sequence[Feature], slots: Sequence[Any], tensor: Tensor
) -> tuple[tuple[Any, ...], Float[Array, " width *shape"]]:
    """Return (next slots, values [width, *shape], normalised)."""
    tensor = tensor._replace(grad=above_noise(tensor.grad), param=above_noise(tensor.param))
    shape, next_slots, columns = tensor.grad.shape, [], []
    for feature, slot in zip(features, slots, strict=True):
        slot, values = feature(slot, tensor)
        next_slots.append(slot)
        columns.append(normalized(values) if feature.is_normalized else values)
        if feature.is_direction:
            directions = jnp.concatenate([tensor.directions, values])
            tensor = tensor._replace(directions=directions)
    wide = [jnp.broadcast_to(values, (len(values), *shape)) for values in columns]
    return tuple(next_slots), jnp.concatenate(wide)


def above_noise(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x, its derivative cut if its root mean square is below 1e-8."""
    return jnp.where((x**2).mean() < LEAST, jax.lax.stop_gradient(x), x)


def normalized(values: Float[Array, " k *shape"]) -> Float[Array, " k *shape"]:
    """Return each of the values [k, *shape] divided by its root mean square over the tensor."""
    axes = tuple(range(1, values.ndim))
    return values * jax.lax.rsqrt((values**2).mean(axes, keepdims=True) + LEAST)


def running_means(
    slots: Float[Array, " k *shape"], new: Float[Array, "*shape"], decays: Sequence[float]
) -> Float[Array, " k *shape"]:
    """Return d slot + (1 - d) new for every decay d: [k, *new.shape]."""
    d = jnp.asarray(decays, new.dtype).reshape(-1, *[1] * new.ndim)
    return d * slots + (1 - d) * new[None]


def over(
    directions: Float[Array, " d *shape"], inverse: Float[Array, " k *shape"]
) -> Float[Array, " k*d *shape"]:
    """Return all directions [d, *shape] times all inverse roots [k, *shape]: [k d, *shape]."""
    count, *shape = directions.shape
    return (inverse[:, None] * directions[None]).reshape(len(inverse) * count, *shape)


@dataclasses.dataclass(frozen=True)
class FactoredMoments(Feature):
    """Roots r of row and column second moments, 1 / r, and each direction over both, per decay.

    Slots: running means of the squared gradient over rows and columns, as in Adafactor.

    Args:
      decays: of the running means.
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

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
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
    """Return the axes over which rows and columns are averaged: the two longest, or none."""
    longest = np.argsort(shape, kind="stable")[::-1]
    return [int(axis) for axis in longest[:2]] if len(shape) > 1 else []


def _parts(square: jax.Array) -> list[jax.Array]:
    """Return the means over rows and over columns, with averaged axes of size 1; or the tensor."""
    return [square.mean(axis, keepdims=True) for axis in _axes(square.shape)] or [square]


def _inverse_root(slot: Any, axes: list[int]) -> jax.Array:
    """Return 1 / sqrt(v) from the running means: [k, *shape]."""
    if len(slot) == 1:
        return jax.lax.rsqrt(slot[0] + LEAST)
    row, column = slot
    mean = row.mean(1 + axes[1], keepdims=True)
    share = (row + LEAST) / (mean + LEAST)
    return jax.lax.rsqrt(share) * jax.lax.rsqrt(column + LEAST)


@dataclasses.dataclass(frozen=True)
class ParameterScale(Feature):
    """The root mean square of the tensor, at least `least`, which makes steps relative to it.

    Args:
      least: the lower bound, so that a tensor of zeros moves.
    """

    least: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.least > 0:
            raise ValueError(
                f"A tensor of zeros would never move with least={self.least}. Take a positive one."
            )

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, Values]:
        square = (tensor.param**2).mean(keepdims=True)
        return slot, jnp.sqrt(jnp.maximum(square, self.least**2))[None]


@dataclasses.dataclass(frozen=True)
class ReciprocalRoot(Feature):
    """1 / sqrt(v + eps), v a running mean of the squared gradient. Slots: v.

    Args:
      decay: of the running mean.
      eps: added to v, an upper bound of the factor.
    """

    decay: float = 0.999
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays((self.decay,))

    def size(self, directions: int) -> int:
        return 1

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((1, *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, Values]:
        slot = running_means(slot, tensor.grad**2, (self.decay,))
        return slot, jax.lax.rsqrt(slot + self.eps)
