"""A level more: the training problem is the meta-training of an algorithm.

The outer loop of an algorithm is itself a loop, of T steps on its meta-parameters eta, by an outer
optimizer. With an outer optimizer that has parameters phi of its own,

    eta_{t+1} = eta_t + u_t,   u_t = rule(phi)(grad F_t(eta_t), ...)        t = 0 .. T-1
    F_t(eta)  = mean over the tasks of step t of the outer loss of the algorithm
    G(phi)    = F(eta_T) on held-out tasks

which is the training of a theta, called eta here, by a learned optimizer. So `MetaTraining` is a
`Problem`, and `LearnedOptimizer(MetaTraining(MAML(...)), TunedRule(optax.adam, {...}), T)` learns
the outer learning rate of MAML in three levels. A `LearnedOptimizer` is an algorithm, whose
meta-training is the problem of a fourth level; the tasks have a `MetaTrainingRuns` for each level
above the second.

F_t is the inner loop of the algorithm and its outer loss as one function of eta, and its gradient
is the inner gradient of the level above: that level's engine differentiates it. `engine` says how
F_t itself is differentiated, and has to say it in a way that can be differentiated once more: all
of `Reverse`, and `MixedFlow` where `jax.checkpoint` saves its residuals. Others refuse, by
`MetaGradient.rollout`.

With B tasks a step, an outer step of the lower level is a step of this loop, and costs B inner
loops forward and backward; a full unroll differentiates T of them. T and the inner loop should be
short, or the upper unroll truncated or estimated (`Truncation`, `PES`).

References: Chandra et al. 2019, "Gradient Descent: The Ultimate Optimizer" (arXiv:1909.13371), of
towers of optimizers; Metz et al. 2021 (arXiv:2101.07367), of learned optimizers that train learned
optimizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import Count
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.algorithm import Algorithm
from metalearn.algorithms.learned_optimizer.problems import Problem, StepLoss
from metalearn.engines import MetaGradient, Reverse
from metalearn.tasks import AtOuterStep, Tasks, draw_task
from metalearn.unroll import Batch, Eta, Metrics


@readable
@dataclasses.dataclass(frozen=True)
class MetaTraining(Problem):
    """The meta-training of an algorithm: theta is its eta, a step is an outer step.

    Its tasks are `metalearn.datasets.MetaTrainingRuns`. The training loss of step t is the outer
    loss over the tasks of that step, at eta_t; the validation loss that over the held-out tasks, by
    the algorithm in evaluation (`Algorithm.evaluation`). Metrics are means over them.

    Args:
      algorithm: the lower level: what is meta-trained.
      engine: how the outer loss of the lower level is differentiated: `Reverse` or `MixedFlow`.
      tasks_per_step: tasks of an outer step of the lower level.
    """

    algorithm: Algorithm
    engine: MetaGradient = Reverse()
    tasks_per_step: Count = 4

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def reads_tasks(self) -> bool:
        """True: the support set is the distribution that the outer steps draw their tasks from."""
        return True

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (the initial meta-parameters of the lower level, no state)."""
        return self.algorithm.init(key), ()

    def check(self, support: Any, inner_steps: int) -> None:
        """Raise ValueError unless the support set is a distribution over tasks."""
        del inner_steps
        if not isinstance(support, Tasks):
            lower = type(self.algorithm).__name__
            raise ValueError(
                f"`MetaTraining({lower})` is one level more than these tasks are for: an episode "
                f"of them is one task of {lower}, and each step of the meta-training of {lower} "
                f"draws {self.tasks_per_step} of those. Wrap the tasks once for each level above "
                "the second: `metalearn.datasets.MetaTrainingRuns.create(tasks, held_out)`."
            )

    def batches(self, support: Any, steps: jax.Array, key: jax.Array) -> Batch:
        """Return (the numbers of the outer steps [t], keys of their tasks [t, tasks_per_step])."""

        def keys(step: jax.Array) -> jax.Array:
            return jax.random.split(jax.random.fold_in(key, step), self.tasks_per_step)

        return steps, jax.vmap(keys)(steps)

    def loss(
        self, params: Any, statistics: Any, support: Any, batch: Batch, key: jax.Array
    ) -> StepLoss:
        """Return the outer loss of the lower level over the tasks of a step."""
        del key
        step, keys = batch
        tasks = AtOuterStep(support, step) if self.algorithm.anneals else support
        loss, _ = self._mean_outer_loss(self.algorithm, params, tasks, keys)
        return StepLoss(loss, loss, statistics)

    def validate(self, params: Any, statistics: Any, query: Any) -> tuple[jax.Array, Metrics]:
        """Return the outer loss of the lower level over the held-out tasks, and its metrics."""
        del statistics
        tasks, keys = query
        return self._mean_outer_loss(self.algorithm.evaluation(), params, tasks, keys)

    def _mean_outer_loss(
        self, algorithm: Algorithm, eta: Eta, tasks: Tasks, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        def on_task(key: jax.Array) -> tuple[jax.Array, Metrics]:
            task = draw_task(algorithm, tasks, key)
            loss, aux = self.engine.rollout(task.unroll, eta, task.batches())
            return loss, aux.metrics

        losses, metrics = jax.vmap(on_task)(keys)
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    def shard_query(self, query: Any, shard: Callable[[Any], Any]) -> Any:
        """Return the query with the held-out tasks sharded, by their keys."""
        tasks, keys = query
        return tasks, shard(keys)

    def constants(self) -> Any:
        """Return the arrays that the models of the lower level hold."""
        return self.algorithm.constants()

    def bind(self, constants: Any) -> MetaTraining:
        """Return the same problem with these arrays."""
        if not jax.tree.leaves(constants):
            return self
        return dataclasses.replace(self, algorithm=self.algorithm.bind(constants))
