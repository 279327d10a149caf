"""Tasks that need no data: quadratics, sinusoids, and several distributions side by side.

`Quadratics`: L(theta) = mean of a_i (theta_i - c_i)^2 / 2 with curvatures a_i log-uniform in a
range and a normal minimum c. The ratio of the range bounds the condition number, which makes a
quadratic hard for an optimizer with one learning rate.

`Sinusoid`, the first experiment of MAML (Finn et al. 2017, arXiv:1703.03400): one sine wave,
y = A sin(x - phi), with its amplitude A and phase phi drawn per task; support and query are points
of the same wave. It is small enough that an error in a meta-gradient shows within seconds on a CPU.
No fixed function has a small loss. The phases span half a turn, so the mean over tasks is not zero
but -(2 / pi) E[A] cos x = -1.62 cos x: a learner that does not adapt has a squared error of 3.0 at
best, that function's, where predicting zero has E[A^2] / 2 = 4.25.

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
    """Random quadratics, for `metalearn.algorithms.Quadratic`.

    Args:
      dimension: d.
      curvature: the range of the curvatures.
    """

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
        """Draw one quadratic: support = query = (curvatures [d], minimum [d]), float32."""
        curvature_key, minimum_key = jax.random.split(key)
        low, high = jnp.log(jnp.asarray(self.curvature, jnp.float32))
        uniforms = jax.random.uniform(curvature_key, (self.dimension,), jnp.float32)
        quadratic = (
            jnp.exp(low + (high - low) * uniforms),
            jax.random.normal(minimum_key, (self.dimension,), jnp.float32),
        )
        return Episode(quadratic, quadratic)


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sinusoid(Tasks):
    """Sine waves, drawn uniformly from ranges, by default those of section 5.1 of MAML.

    Args:
      shots: support points of a task.
      queries: query points of a task.
      amplitude: the range of A.
      phase: the range of phi, in radians.
      inputs: the range of x, in radians.
    """

    shots: Count = _static(10)
    queries: Count = _static(10)
    amplitude: tuple[float, float] = _static((0.1, 5.0))
    phase: tuple[float, float] = _static((0.0, np.pi))
    inputs: tuple[float, float] = _static((-5.0, 5.0))

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
    """One task of each of several distributions, for `metalearn.algorithms.Together`. A pytree.

    Args:
      parts: the distributions by name.
    """

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
        """Draw one task of each: support = {name: support}, query = {name: query}."""
        keys = jax.random.split(key, len(self.parts))
        pairs = zip(sorted(self.parts), keys, strict=True)
        episodes = {name: self.parts[name].sample(key) for name, key in pairs}
        return Episode(
            {name: episode.support for name, episode in episodes.items()},
            {name: episode.query for name, episode in episodes.items()},
        )
