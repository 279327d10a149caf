"""Features of every parameter of a tensor: the inputs of a learned optimizer.

A feature is a part. It holds slots for a tensor (running means, say), and at every step turns
them and the gradient into values, k per parameter: [k, *shape], features first, so that each
is one contiguous array. The features of a rule are taken in order, and some of them are
*directions* (the gradient, its running means): features that come later may divide them by a
root second moment, and so need no running means of their own.

    (Gradient(), Momenta((0.9, 0.99)), SecondMoments((0.999,)))       3 + 1 + 1 + 3 values

Each is divided by its root mean square over the tensor, so that a network meets values of
about one whatever the scale of the loss or of the tensor (Metz et al. 2020, arXiv:2009.11243;
2022, arXiv:2203.11860). The derivative of that grows as the tensor shrinks, and at zero it would
be 1e8 at each of T steps: a gradient, or a parameter, below 1e-8 is noise and has none instead.

All is computed in float32, or float64 for parameters of that, whatever the dtype of the
parameters, and for tensors of any rank.

`FactoredMoments` are second moments of a matrix from those of its rows and columns. Adafactor
(Shazeer & Stern 2018, arXiv:1804.04235) keeps running means of the squared gradient
over each row and over each column, n + m numbers for a matrix of n m, and takes

    v_ij = row_i column_j / mean(row)

in the place of the second moment. For tensors of higher rank, rows and columns are those of
the two longest axes; tensors of rank 0 and 1 have the full second moment in the place of both.

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

from metalearn._utils.fields import check_fields
from metalearn.algorithms.learned_optimizer.update_rule import check_decays, precision

LEAST = 1e-16  # added below a root: as small as Adam's 1e-8 beside one


class Tensor(NamedTuple):
    """What is known of a tensor at a step."""

    grad: jax.Array  # [*shape], in the dtype that is computed in
    param: jax.Array  # [*shape], the same
    step: jax.Array  # (), int32: updates before this one
    directions: jax.Array  # [d, *shape]: the directions among the features before this one


class Feature(abc.ABC):
    """Some values per parameter. Subclasses are frozen dataclasses."""

    is_direction: ClassVar[bool] = False  # whether later features may divide it by a root
    is_normalized: ClassVar[bool] = True  # whether it is divided by its root mean square

    @abc.abstractmethod
    def size(self, directions: int) -> int:
        """Return how many values it has, where so many directions come before it."""

    def init(self, param: jax.Array) -> Any:
        """Return the slots of a tensor before the first step."""
        del param
        return ()

    @abc.abstractmethod
    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        """Return (next slots, values [size, *shape], or [size, 1, ...] where all are equal)."""


@dataclasses.dataclass(frozen=True)
class Gradient(Feature):
    """The gradient. A direction."""

    is_direction: ClassVar[bool] = True

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        return slot, tensor.grad[None]


@dataclasses.dataclass(frozen=True)
class Momenta(Feature):
    """Running means of the gradient, one for each decay. Directions. Slots: as many."""

    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    is_direction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays(self.decays)

    def size(self, directions: int) -> int:
        return len(self.decays)

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((len(self.decays), *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, jax.Array]:
        slot = running_means(slot, tensor.grad, self.decays)
        return slot, slot


@dataclasses.dataclass(frozen=True)
class SecondMoments(Feature):
    """Root second moments r as Adam's, 1 / r, and each direction over r. Slots: one a decay."""

    decays: tuple[float, ...] = (0.999,)

    def __post_init__(self) -> None:
        check_fields(self)
        check_decays(self.decays)

    def size(self, directions: int) -> int:
        return len(self.decays) * (2 + directions)

    def init(self, param: jax.Array) -> jax.Array:
        return jnp.zeros((len(self.decays), *param.shape), precision(param))

    def __call__(self, slot: jax.Array, tensor: Tensor) -> tuple[jax.Array, jax.Array]:
        slot = running_means(slot, tensor.grad**2, self.decays)
        inverse = jax.lax.rsqrt(slot + LEAST)
        values = [(slot + LEAST) * inverse, inverse, over(tensor.directions, inverse)]
        return slot, jnp.concatenate(values)


@dataclasses.dataclass(frozen=True)
class ParameterValue(Feature):
    """The parameter."""

    def size(self, directions: int) -> int:
        return 1

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        return slot, tensor.param[None]


@dataclasses.dataclass(frozen=True)
class StepFeatures(Feature):
    """tanh(t / scale - 1) of the number of updates t: where in a run this is."""

    scales: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
    is_normalized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    def size(self, directions: int) -> int:
        return len(self.scales)

    def __call__(self, slot: Any, tensor: Tensor) -> tuple[Any, jax.Array]:
        dtype = tensor.grad.dtype
        values = jnp.tanh(tensor.step.astype(dtype) / jnp.asarray(self.scales, dtype) - 1)
        return slot, values.reshape(-1, *[1] * tensor.grad.ndim)


def init_slots(features: Sequence[Feature], param: jax.Array) -> tuple[Any, ...]:
    """Return the slots of every feature, for one tensor."""
    return tuple(feature.init(param) for feature in features)


def width(features: Sequence[Feature]) -> int:
    """Return how many values the features have together."""
    total, directions = 0, 0
    for feature in features:
        size = feature.size(directions)
        total, directions = total + size, directions + feature.is_direction * size
    return total


def evaluate(
    features: Sequence[Feature], slots: Sequence[Any], tensor: Tensor
) -> tuple[tuple[Any, ...], jax.Array]:
    """Return (next slots, values [width, *shape], normalised)."""
    tensor = tensor._replace(grad=above_noise(tensor.grad), param=above_noise(tensor.param))
    shape, following, found = tensor.grad.shape, [], []
    for feature, slot in zip(features, slots, strict=True):
        slot, values = feature(slot, tensor)
        following.append(slot)
        found.append(normalized(values) if feature.is_normalized else values)
        if feature.is_direction:
            directions = jnp.concatenate([tensor.directions, values])
            tensor = tensor._replace(directions=directions)
    wide = [jnp.broadcast_to(values, (len(values), *shape)) for values in found]
    return tuple(following), jnp.concatenate(wide)


def above_noise(x: jax.Array) -> jax.Array:
    """Return x, but without a derivative where its root mean square is below 1e-8."""
    return jnp.where((x**2).mean() < LEAST, jax.lax.stop_gradient(x), x)


def normalized(values: jax.Array) -> jax.Array:
    """Divide each of values [k, *shape] by its root mean square over the tensor."""
    axes = tuple(range(1, values.ndim))
    return values * jax.lax.rsqrt((values**2).mean(axes, keepdims=True) + LEAST)


def running_means(slots: jax.Array, new: jax.Array, decays: Sequence[float]) -> jax.Array:
    """Return d slot + (1 - d) new for every decay d: [k, *new.shape]."""
    d = jnp.asarray(decays, new.dtype).reshape(-1, *[1] * new.ndim)
    return d * slots + (1 - d) * new[None]


def over(directions: jax.Array, inverse: jax.Array) -> jax.Array:
    """Multiply all directions [d, *shape] by all inverse roots [k, *shape]: [k d, *shape]."""
    count, *shape = directions.shape
    return (inverse[:, None] * directions[None]).reshape(len(inverse) * count, *shape)


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
