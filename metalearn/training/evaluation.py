"""Evaluation on held-out tasks: adapt to each, and say how sure the mean is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import MOST_TASKS, at_most, counts
from metalearn._utils.intervals import Estimate, interval
from metalearn.algorithm import Algorithm
from metalearn.engines.base import check_eta
from metalearn.engines.inner_loop import rollout
from metalearn.tasks import Tasks, draw_task
from metalearn.unroll import Eta, Metrics, Unroll

OURS = {"meta_grad_norm", "meta_update_norm", "tasks_reset", "tasks_left_out", "step_skipped"}


def task_metrics(
    algorithm: Algorithm,
    eta: Eta,
    tasks: Tasks,
    key: jax.Array,
    steps: int | None = None,
    transform: Callable[[Unroll], Unroll] | None = None,
) -> Metrics:
    """Draw one task, run its inner loop and return its outer loss and metrics.

    Args:
      algorithm: to evaluate.
      eta: the meta-parameters.
      tasks: the distribution to draw from.
      key: (), of the task.
      steps: the number of inner steps to take; None: all T.
      transform: applied to the unroll; see `metalearn.tasks.draw_task`.
    """
    check_eta(eta)
    task = draw_task(algorithm, tasks, key, transform)
    loss, aux = rollout(task.unroll, eta, task.first_batches(steps))
    return merged({"loss": loss}, aux.metrics)


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Join our metrics and an algorithm's; ValueError if one has a name that we reserve."""
    reserved = sorted((ours.keys() | OURS) & theirs.keys())
    if reserved:
        raise ValueError(
            f"The algorithm's `loss` returns a metric called {reserved[0]!r}, a name that the "
            "Trainer needs for its own. Call it something else."
        )
    return {**ours, **theirs}


def estimate(
    metrics_of: Callable[[jax.Array, int], dict[str, jax.Array]],
    key: jax.Array,
    tasks: int,
    chunk: int,
) -> dict[str, Estimate]:
    """Run `metrics_of` over `tasks` keys: keys [chunk], tasks before them -> metrics [chunk]."""
    counts("evaluate", 1, tasks=tasks)
    at_most("evaluate", MOST_TASKS, tasks=tasks)
    keys = jax.random.split(key, tasks)
    padded = -(-tasks // chunk) * chunk  # one shape, one compilation; the surplus is dropped
    keys = keys[jnp.arange(padded) % tasks]
    rows = [metrics_of(keys[i : i + chunk], i) for i in range(0, padded, chunk)]
    columns = {name: np.concatenate([np.asarray(row[name]) for row in rows]) for name in rows[0]}
    return {name: interval(column[:tasks]) for name, column in columns.items()}
