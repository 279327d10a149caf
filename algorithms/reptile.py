"""Reptile: move the initialisation towards where the inner loop ends.

From eta = theta_0 the inner loop takes T steps on a task, and the outer step is

    theta_0 <- theta_0 + epsilon (theta_T - theta_0)

averaged over tasks. Nichol, Achiam and Schulman 2018 (arXiv:1803.02999). That is plain SGD, of
learning rate epsilon, on the "meta-gradient" theta_0 - theta_T, which is the derivative of no outer
loss. As an outer loss it is written with the end of the loop as a constant (`stop_gradient`),

    F(eta) = L_Q(theta_T) + D - stop_gradient(D),    D = |theta_0 - stop_gradient(theta_T)|^2 / 2

whose value is the loss of the queries, for logs and evaluations, and whose derivative is
theta_0 - theta_T under every engine that differentiates. The backward pass of the loop has nothing
to do, and is not computed: a step costs T inner gradients, in the memory of one. Estimators (`ES`,
`PES`) see values alone, and estimate the derivative of L_Q(theta_T) instead.

With T = 1 the expected update is that of training on all tasks at once; with more steps the inner
products of gradients of different batches grow, as in first-order MAML (section 5 of the paper),
which takes different batches: set `batch`. The paper takes plain SGD with a rate from 1 to 0 as
the outer optimizer, and Adam without momentum (b1=0) as the inner one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from metalearn._utils.checks import at_least, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithms.maml import MAML, Initialisation, SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import Batch, Episode, Metrics, ModelTraining, Unroll


@readable
@dataclasses.dataclass(frozen=True)
class Reptile(SupportAlgorithm):
    """Reptile: learn an initialisation close to every task's solution. Nichol et al. 2018.

    Support and query: (inputs [n, ...], targets [n, ...]). eta is that of `MAML`.

    Args:
      model: the network that adapts.
      objective: outputs, targets -> loss (), metrics; of the inner loss, and of the queries, whose
        loss is reported and not learned from.
      optimizer: the inner optimizer.
      inner_steps: T, inner steps in training.
      eval_steps: inner steps in evaluation; None: as in training.
      batch: support examples of an inner step, in shuffled epochs; None: the whole support set.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
      eval_batch: `batch` in evaluation, whose support sets may be smaller; None: as in training.
    """

    model: Model
    objective: Objective = cross_entropy
    optimizer: optax.GradientTransformation = described(optax.sgd, 0.02)
    inner_steps: int = 5
    eval_steps: int | None = None
    batch: int | None = None
    batch_norm: str = "transductive"
    eval_batch: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "inner_steps", "eval_steps", "batch", "eval_batch")
        check_dropout("Reptile", self.model)
        batch_norm_policy(self.batch_norm)
        counts("Reptile", 1, inner_steps=self.inner_steps)
        sizes = {"batch": self.batch, "eval_batch": self.eval_batch}
        at_least("Reptile", 1, eval_steps=self.eval_steps, **sizes)

    @functools.cached_property
    def maml(self) -> MAML:
        """The same inner loop, with the outer loss of MAML."""
        return MAML(
            self.model,
            self.objective,
            self.optimizer,
            self.inner_steps,
            self.eval_steps,
            batch=self.batch,
            batch_norm=self.batch_norm,
        )

    def init(self, key: jax.Array) -> Initialisation:
        """Return the initialisation."""
        return self.maml.init(key)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task."""
        adaptation = self.maml.unroll(episode, key)

        def loss(eta: Initialisation, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            start, end = jax.lax.stop_gradient((eta, state))
            value, metrics = adaptation.loss(start, end)
            adapted, _ = self.maml.trained(start, end)
            distance = optax.tree.norm(optax.tree.sub(eta.params, adapted), squared=True) / 2
            return value + (distance - jax.lax.stop_gradient(distance)), metrics

        return adaptation._replace(loss=loss)

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return the episode sharded, as MAML's."""
        return self.maml.shard_examples(episode, shard)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the inputs of the inner steps, as `MAML` does."""
        return self.maml.batches(episode, key)

    def trained(self, eta: Initialisation, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the model after adaptation, its running statistics)."""
        return self.maml.trained(eta, state)

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "adaptation": see `metalearn.algorithms.pictures`."""
        return self.maml.pictures()

    def evaluation(self) -> Reptile:
        """Return the same algorithm with `eval_steps` inner steps of `eval_batch` examples."""
        batch = self.batch if self.eval_batch is None else self.eval_batch
        return dataclasses.replace(self.with_steps(self.maml.evaluation_steps), batch=batch)

    def with_steps(self, steps: int) -> Reptile:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)
