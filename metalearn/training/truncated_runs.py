"""Inner runs that go on from outer step to outer step, a truncation each time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from metalearn.tasks import Tasks
from metalearn.training.inner_metrics import step_metrics
from metalearn.training.inner_runs import InnerRuns, Posed
from metalearn.training.isolation import mean_of_finite, or_zero
from metalearn.training.truncation import Carried, Truncation, advance, due


@dataclasses.dataclass(frozen=True)
class TruncatedRuns(InnerRuns):
    """See `metalearn.training.truncation`. What is not finite is left out, and its run replaced."""

    truncation: Truncation

    def begin(self, eta: Any, tasks: Tasks | None, keys: jax.Array) -> Carried:
        """Return inner runs [tasks] in whose place new tasks are due."""
        if tasks is None:
            raise ValueError(
                "Truncated training carries inner states from step to step, and their shapes "
                "are those of the tasks: call `Trainer.init(key, tasks)`."
            )
        return jax.jit(self._due)(eta, tasks, keys)

    def _due(self, eta: Any, tasks: Tasks, keys: jax.Array) -> Carried:
        return jax.vmap(lambda key: due(self.pose(eta, tasks, key), eta, key))(keys)

    def mean_gradient(
        self, eta: Any, tasks: Tasks, keys: jax.Array, carried: Any, first: jax.Array
    ) -> tuple[Any, dict[str, jax.Array], Carried]:
        if not isinstance(carried, Carried):
            raise ValueError(
                "This state has no inner runs to go on with: it is not of truncated training. "
                "Begin with `Trainer.init(key, tasks)` of this trainer."
            )
        shares = self.truncation.shares(self.batch.size, first)
        inputs = carried, keys, shares
        means, carried = self.batch.mean_and_each(self._advance, (eta, tasks), inputs)
        grads, metrics, left_out = mean_of_finite(means, self.batch.size)
        return grads, {**metrics, "tasks_reset": left_out}, carried

    def _advance(
        self, eta: Any, tasks: Tasks, run: tuple[Carried, jax.Array, jax.Array]
    ) -> tuple[Any, Carried]:
        """Take the next truncation of a run: ((meta-gradient, metrics, finite), the run then).

        What is not finite counts as zero, of a run that does not count.
        """

        def pose_of(key: jax.Array) -> Posed:
            return self.pose(eta, tasks, key)

        solve = self.engine.value_and_grad
        result, finite, carried = advance(self.truncation, solve, pose_of, eta, *run)
        (loss, aux), grads = result
        return or_zero(finite, (grads, step_metrics(loss, aux))), carried
