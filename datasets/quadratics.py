"""Quadratic bowls: the inner tasks on which optimizers can be checked by hand.

A task is L(theta) = mean of a_i (theta_i - c_i)^2 / 2 with curvatures a_i log-uniform in a
range and a normal minimum c. The ratio of the range is the condition number, which is what
makes a bowl hard for an optimizer with one learning rate.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

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
