"""The inner runs of an outer step, and the mean meta-gradient over its tasks.

`InnerRuns` are whole: every task of every outer step has a new one, from its beginning to its
end. Others carry something from program to program, in `TrainState.inner`: runs that go on from
step to step (`metalearn.training.truncated_unroll`), and whole ones that take several programs
(`metalearn.training.segmented_unroll`).

What is reported of a task: its outer loss, its inner loop, and what its algorithm adds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.algorithm import Algorithm
from metalearn.engines import Aux, MetaGradient
from metalearn.evaluation import merged
from metalearn.tasks import Tasks, draw
from metalearn.training.faults import all_finite, mean_of_finite, or_zero
from metalearn.training.task_batch import TaskBatch
from metalearn.unroll import Unroll

Result = tuple[tuple[jax.Array, Aux], Any]  # ((loss (), aux), meta-gradient)


class Posed(NamedTuple):
    """One task, ready to be unrolled."""

    unroll: Unroll
    batches: Callable[[], Any]  # () -> leaves [T, ...]
    batches_at: Callable[[jax.Array], Any]  # numbers of steps [t] -> leaves [t, ...]
    engine: Any  # the engine's state for its first call


def pose(
    algorithm: Algorithm, engine: MetaGradient, eta: Any, tasks: Tasks, key: jax.Array
) -> Posed:
    """Return the task that `key` draws, ready to be unrolled."""
    sample_key, unroll_key, batch_key, engine_key = jax.random.split(key, 4)
    episode = draw(tasks, sample_key)
    unroll = algorithm.unroll(episode, unroll_key)
    whole = functools.partial(algorithm.batches, episode, batch_key)
    part = functools.partial(algorithm.batches_at, episode, batch_key)
    return Posed(unroll, whole, part, engine.init(engine_key, unroll, eta))


@dataclasses.dataclass(frozen=True)
class InnerRuns:
    """Whole inner runs, a new one for each task of every outer step."""

    algorithm: Algorithm
    engine: MetaGradient
    batch: TaskBatch
    isolate: bool  # tasks that are not finite are left out of the mean

    def begin(self, eta: Any, tasks: Tasks | None, keys: jax.Array) -> Any:
        """Return what a train state carries of inner runs before the first step: nothing."""
        del eta, tasks, keys
        return ()

    def mean_gradient(
        self, eta: Any, tasks: Tasks, keys: jax.Array, carried: Any, first: jax.Array
    ) -> tuple[Any, dict[str, jax.Array], Any]:
        """Return (meta-gradient, metrics, what is carried on).

        Args:
          eta: the meta-parameters.
          tasks: where the tasks come from.
          keys: [tasks of a step], each draws one.
          carried: from `begin`, or from the outer step before.
          first: (), bool: whether this is the first outer step of a run.
        """
        del first
        means = self.batch.mean(self._of_task, (eta, tasks), keys)
        return *self._of_step(means), carried

    def solve(self, algorithm: Algorithm, eta: Any, tasks: Tasks, key: jax.Array) -> Result:
        """Return ((loss, aux), meta-gradient) of the whole run of the task that `key` draws."""
        posed = pose(algorithm, self.engine, eta, tasks, key)
        return self.engine.value_and_grad(posed.unroll, eta, posed.batches(), posed.engine)

    def pose(self, eta: Any, tasks: Tasks, key: jax.Array) -> Posed:
        """Return the task that `key` draws, on the devices of the batch."""
        return pose(self.batch.laid_out(self.algorithm), self.engine, eta, tasks, key)

    def _of_task(self, eta: Any, tasks: Tasks, key: jax.Array) -> Any:
        return self._counted(self.solve(self.batch.laid_out(self.algorithm), eta, tasks, key))

    def _counted(self, result: Result) -> Any:
        """Return what is averaged of a task: (meta-gradient, metrics), and if it counts."""
        (loss, aux), grads = result
        found = grads, step_metrics(loss, aux)
        return or_zero(all_finite(loss, aux, grads), found) if self.isolate else found

    def _of_step(self, means: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Return (meta-gradient, metrics) of an outer step from the means over its tasks."""
        if not self.isolate:
            return means
        grads, metrics, left_out = mean_of_finite(means, self.batch.size)
        return grads, {**metrics, "tasks_left_out": left_out}


def step_metrics(loss: jax.Array, aux: Aux) -> dict[str, jax.Array]:
    """Return the metrics of a task in an outer step; see `Trainer.step`."""
    return merged({"loss": loss, **_inner_metrics(aux)}, aux.metrics)


def _inner_metrics(aux: Aux) -> dict[str, jax.Array]:
    losses, finite, update_norm, tangent_norm = aux.inner
    if not losses.size:
        return {}
    moved = {"inner_update_norm": update_norm.mean()} if update_norm.size else {}
    pushed = {"inner_tangent_norm": tangent_norm[-1].max()} if tangent_norm.size else {}
    fine = finite.all(1) & jnp.isfinite(tangent_norm).all(1)
    return {
        "inner_loss_first": losses[0].mean(),
        "inner_loss_last": losses[-1].mean(),
        "inner_finite": finite.mean(),
        "inner_steps_finite": jnp.cumprod(fine).sum(),
        **moved,
        **pushed,
    }
