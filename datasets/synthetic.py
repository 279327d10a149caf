"""Tasks that need no data: quadratic bowls, sinusoids, and several distributions side by side.

`Quadratics`: L(theta) = mean of a_i (theta_i - c_i)^2 / 2 with curvatures a_i log-uniform in a
range and a normal minimum c. The ratio of the range is the condition number, which is what
makes a bowl hard for an optimizer with one learning rate.

`Sinusoid`, the first experiment of MAML (Finn et al. 2017, arXiv:1703.03400): one sine wave,
y = A sin(x - phi), with its amplitude A and phase phi drawn per task; the learner gets a few points
of it and is judged on others of the same wave. It is small enough that a mistake in a meta-gradient
shows within seconds on a CPU. No fixed function does well: the mean over tasks is close to zero
everywhere, so a learner that does not adapt predicts about nothing.

`SideBySide`: a task has one episode of each of several distributions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import Count
from metalearn._utils.fields import check_fields
from metalearn.tasks import Tasks
from metalearn.unroll import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratics(Tasks):
    """Bowls of one dimension d, for `metalearn.algorithms.Quadratic`."""

    dimension: int = dataclasses.field(metadata={"static": True})
    curvature: tuple[float, float] = dataclasses.field(
        default=(0.1, 10.0), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.curvature
        if self.dimension < 1 or not 0 < low <= high:
            raise ValueError(
                f"`Quadratics` got dimension={self.dimension}, curvature={self.curvature}, but a "
                "bowl has at least one dimension, and curvatures from a positive low to a high."
            )

    def sample(self, key: jax.Array) -> Episode:
        """Draw one bowl: support = query = (curvatures [d], minimum [d]), float32."""
        curvature_key, minimum_key = jax.random.split(key)
        low, high = jnp.log(jnp.asarray(self.curvature, jnp.float32))
        drawn = jax.random.uniform(curvature_key, (self.dimension,), jnp.float32)
        bowl = (
            jnp.exp(low + (high - low) * drawn),
            jax.random.normal(minimum_key, (self.dimension,), jnp.float32),
        )
        return Episode(bowl, bowl)


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sinusoid(Tasks):
    """Sine waves. The ranges are uniform and default to those of section 5.1 of MAML."""

    shots: Count = _static(10)  # support points per task
    queries: Count = _static(10)  # query points per task
    amplitude: tuple[float, float] = _static((0.1, 5.0))
    phase: tuple[float, float] = _static((0.0, np.pi))  # radians
    inputs: tuple[float, float] = _static((-5.0, 5.0))  # radians

    def __post_init__(self) -> None:
        check_fields(self)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one wave: support = (x [shots, 1], y [shots, 1]) float32, query likewise."""
        a_key, phi_key, support_key, query_key = jax.random.split(key, 4)
        amplitude = _uniform(a_key, (), self.amplitude)
        phase = _uniform(phi_key, (), self.phase)

        def points(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
            x = _uniform(key, (n, 1), self.inputs)
            return x, amplitude * jnp.sin(x - phase)

        return Episode(points(support_key, self.shots), points(query_key, self.queries))


def _uniform(key: jax.Array, shape: tuple[int, ...], bounds: tuple[float, float]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, *bounds)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SideBySide(Tasks):
    """One task of each, under its name, for `metalearn.algorithms.Together`. A pytree."""

    parts: Mapping[str, Tasks]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping):
            raise TypeError(
                f"`SideBySide(parts={self.parts!r})`: it is a dictionary of distributions over "
                f"tasks by name, not a {type(self.parts).__name__}."
            )
        if not self.parts:
            raise ValueError("`SideBySide` takes at least one distribution: {name: tasks}.")

    def sample(self, key: jax.Array) -> Episode:
        """Draw one of each: support = {name: support}, query = {name: query}."""
        keys = jax.random.split(key, len(self.parts))
        drawn = {n: self.parts[n].sample(k) for n, k in zip(sorted(self.parts), keys, strict=True)}
        return Episode(
            {n: e.support for n, e in drawn.items()}, {n: e.query for n, e in drawn.items()}
        )
