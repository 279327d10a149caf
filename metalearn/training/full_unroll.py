"""Full unrolls: an outer step unrolls every task from its first inner step to its last.

Three kinds of outer step share an interface. `FullUnroll` carries nothing from one program to
the next. `metalearn.training.truncated_unroll` carries inner states across outer steps, and
`metalearn.training.segmented_unroll` across the programs of one outer step; both in
`TrainState.inner`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from metalearn.algorithm import Algorithm
from metalearn.engines import Aux, Inner, MetaGradient
from metalearn.tasks import DrawnTask, Tasks, draw_task
from metalearn.training.evaluation import merged
from metalearn.training.faults import all_finite, mean_of_finite, or_zero
from metalearn.training.task_batch import TaskBatch
from metalearn.unroll import Eta, Metrics, Unroll

Result: TypeAlias = tuple[tuple[jax.Array, Aux], Eta]  # ((loss (), aux), meta-gradient)


@dataclasses.dataclass(frozen=True)
class FullUnroll:
    """Full unrolls of a batch of tasks, and the mean of their meta-gradients.

    Args:
      algorithm: the meta-learning method: meta-parameters and inner loop.
      engine: differentiates the unroll.
      batch: the tasks of an outer step, over devices and in chunks.
      isolate: leave non-finite tasks out of the mean.
    """

    algorithm: Algorithm
    engine: MetaGradient
    batch: TaskBatch
    isolate: bool

    def begin(self, eta: Eta, tasks: Tasks | None, keys: jax.Array) -> Any:
        """Return what `TrainState.inner` holds before the first outer step: nothing."""
        del eta, tasks, keys
        return ()

    def mean_gradient(
        self, eta: Eta, tasks: Tasks, keys: jax.Array, carried: Any, first: jax.Array
    ) -> tuple[Eta, Metrics, Any]:
        """Return (meta-gradient, metrics, what is carried to the next outer step).

        Args:
          eta: the meta-parameters.
          tasks: where the tasks come from.
          keys: [tasks of a step], each draws one.
          carried: from `begin`, or from the outer step before.
          first: (), bool: whether this is the first outer step of a run.
        """
        del first
        means = self.batch.mean(self._of_task, (eta, tasks), keys)
        return *self.of_step(means), carried

    def draw(self, tasks: Tasks, key: jax.Array) -> DrawnTask:
        """Return the task that `key` draws, its inner states laid out as the batch says."""
        return draw_task(self.algorithm, tasks, key, layout=self.batch.inner_layout)

    def solve(
        self,
        eta: Eta,
        tasks: Tasks,
        key: jax.Array,
        transform: Callable[[Unroll], Unroll] | None = None,
        steps: int | None = None,
    ) -> Result:
        """Return ((loss, aux), meta-gradient) of the task that `key` draws.

        Args:
          eta: the meta-parameters.
          tasks: where the task comes from.
          key: () of the task.
          transform: applied to the unroll; None: nothing.
          steps: take no more inner steps than the first so many; None: all.
        """
        task = draw_task(self.algorithm, tasks, key, transform, self.batch.inner_layout)
        state = self.engine.init(task.engine_key, task.unroll, eta)
        return self.engine.value_and_grad(task.unroll, eta, task.first_batches(steps), state)

    def _of_task(self, eta: Eta, tasks: Tasks, key: jax.Array) -> Any:
        return self.counted(self.solve(eta, tasks, key))

    def counted(self, result: Result) -> Any:
        """Return (meta-gradient, metrics) of a task, and with `isolate` whether it is finite."""
        (loss, aux), grads = result
        outputs = grads, step_metrics(loss, aux)
        return or_zero(all_finite(loss, aux, grads), outputs) if self.isolate else outputs

    def of_step(self, means: Any) -> tuple[Eta, Metrics]:
        """Return (meta-gradient, metrics) of an outer step from the means over its tasks."""
        if not self.isolate:
            return means
        grads, metrics, left_out = mean_of_finite(means, self.batch.size)
        return grads, {**metrics, "tasks_left_out": left_out}


def step_metrics(loss: jax.Array, aux: Aux) -> Metrics:
    """Return the metrics of a task in an outer step; see `Trainer.step`."""
    return merged({"loss": loss, **_inner_metrics(aux.inner)}, aux.metrics)


def _inner_metrics(inner: Inner) -> Metrics:
    losses, finite, update_norm, tangent_norm = inner
    if not losses.size:
        return {}
    metrics = {
        "inner_loss_first": losses[0].mean(),
        "inner_loss_last": losses[-1].mean(),
        "inner_finite": finite.mean(),
        "inner_steps_finite": jnp.cumprod(finite.all(1) & jnp.isfinite(tangent_norm).all(1)).sum(),
    }
    if update_norm.size:
        metrics["inner_update_norm"] = update_norm.mean()
    if tangent_norm.size:
        metrics["inner_tangent_norm"] = tangent_norm[-1].max()
    return metrics
