"""Meta-Curvature: a learned preconditioner of the inner gradients, in Kronecker factors.

MAML with a learned linear map of each gradient before it is applied,

    theta_{t+1} = theta_t - alpha M(grad L_S(theta_t))      t = 0 .. T-1
    M(G)        = G x_1 M_f x_2 M_i x_3 M_o

for a kernel's gradient G [positions, inputs, outputs]: one square matrix along each axis, learned
with theta_0 and the same in all tasks and steps. All begin as the identity, which is MAML. Park and
Oliva 2019 (arXiv:1902.03356). A matrix of inputs to outputs has two factors and a vector one.

Kernels are those of Flax and Haiku, [..., inputs, outputs]; the axes before count as one, the
positions. The factors have about 2 d^2 numbers for a d x d layer, as many as the layer itself twice
over, and cost two matrix products a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import above, at_least, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import paths
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import Batch, Episode, GradFn, Metrics, ModelTraining, Unroll

MOST_POSITIONS = 4000  # of a kernel: the width of a projection to heads [width, heads, size]


class CurvedInitialisation(NamedTuple):
    """The meta-parameters eta of Meta-Curvature.

    params: theta_0, the model's own tree.
    factors: for each array of theta, in the order of the leaves, a list of square matrices.
    """

    params: Any
    factors: list[list[jax.Array]]


@readable
@dataclasses.dataclass(frozen=True)
class MetaCurvature(SupportAlgorithm):
    """Meta-Curvature: MAML with learned Kronecker factors of the gradient. Park and Oliva 2019.

    Support and query: (inputs [n, ...], targets [n, ...]).

    Args:
      model: the network that adapts.
      objective: outputs, targets -> loss (), metrics; of the inner and of the outer loss.
      rate: alpha, the inner learning rate.
      inner_steps: T, inner steps in training.
      eval_steps: inner steps in evaluation; None: as in training.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
    """

    model: Model
    objective: Objective = cross_entropy
    rate: float = 0.1
    inner_steps: int = 1
    eval_steps: int | None = None
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "inner_steps", "eval_steps")
        check_dropout("MetaCurvature", self.model)
        batch_norm_policy(self.batch_norm)
        above("MetaCurvature", 0, rate=self.rate)
        counts("MetaCurvature", 1, inner_steps=self.inner_steps)
        at_least("MetaCurvature", 1, eval_steps=self.eval_steps)

    def init(self, key: jax.Array) -> CurvedInitialisation:
        """Return the initialisation, and the identity for each factor.

        Raises:
          ValueError: for a parameter whose axes before the last two are too many positions.
        """
        params, _ = self.model.init(key)
        for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
            positions, *others = _axes(leaf.shape)
            if len(others) == 2 and positions > MOST_POSITIONS:
                raise ValueError(
                    f"`MetaCurvature` would learn a factor of {positions:,} x {positions:,} for "
                    f"{name} {list(leaf.shape)}: it takes a kernel for [..., inputs, outputs], "
                    "with one factor for all axes before. Kernels of Equinox are [outputs, inputs, "
                    "...]: take a network of Flax or Haiku."
                )
        factors = [
            [jnp.eye(size, dtype=leaf.dtype) for size in _axes(leaf.shape)]
            for leaf in jax.tree.leaves(params)
        ]
        return CurvedInitialisation(params, factors)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task."""
        policy = batch_norm_policy(self.batch_norm)
        inputs, targets = episode.support

        def init(eta: CurvedInitialisation) -> ModelTraining:
            return ModelTraining(eta.params, (), self.model.init(key)[1])

        def step(
            eta: CurvedInitialisation, state: ModelTraining, key: Batch, grad: GradFn
        ) -> ModelTraining:
            def support_loss(theta: Any) -> Any:
                outputs, statistics = self.model.apply(
                    theta, state.statistics, inputs, train=policy.train_on_support, key=key
                )
                return self.objective(outputs, targets)[0], statistics

            grads, statistics = grad(support_loss, has_aux=True)(state.params)
            leaves, treedef = jax.tree.flatten(grads)
            curved = [transformed(g, f) for g, f in zip(leaves, eta.factors, strict=True)]
            params = jax.tree.map(
                lambda p, g: p - self.rate * g, state.params, jax.tree.unflatten(treedef, curved)
            )
            return ModelTraining(
                params, (), statistics if policy.carry_statistics else state.statistics
            )

        def loss(eta: CurvedInitialisation, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            queries, labels = episode.query
            outputs = self.predict(*self.trained(eta, state), queries, key)
            return self.objective(outputs, labels)

        return Unroll(init, step, loss)

    def trained(self, eta: CurvedInitialisation, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the model after adaptation, its running statistics)."""
        del eta
        return state.params, state.statistics

    def evaluation(self) -> MetaCurvature:
        """Return the same algorithm with `eval_steps` inner steps."""
        return self if self.eval_steps is None else self.with_steps(self.eval_steps)

    def with_steps(self, steps: int) -> MetaCurvature:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)


def transformed(gradient: jax.Array, factors: list[jax.Array]) -> jax.Array:
    """Return a gradient multiplied by a square matrix along each of its axes.

    Args:
      gradient: of any shape; axes before the last two count as one.
      factors: a matrix for each of `_axes(gradient.shape)`.
    """
    out = gradient.reshape(_axes(gradient.shape))
    for axis, factor in enumerate(factors):
        out = jnp.moveaxis(jnp.tensordot(factor, out, (1, axis)), 0, axis)
    return out.reshape(gradient.shape)


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return (positions, inputs, outputs) of a kernel, or the shape of a matrix or a vector.

    >>> _axes((3, 3, 8, 16)), _axes((8, 16)), _axes(())
    ((9, 8, 16), (8, 16), (1,))
    """
    if len(shape) < 3:
        return shape or (1,)
    positions = 1
    for size in shape[:-2]:
        positions *= size
    return positions, *shape[-2:]
