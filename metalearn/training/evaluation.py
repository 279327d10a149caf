"""Evaluation on held-out tasks: adapt to each, and say how sure the mean is.

One task whose inner loop diverges makes a mean NaN. It stays NaN, or a method that fails on hard
tasks would look better than one that does not; such tasks are counted, and the first is named. With
`isolate` they are left out and counted, as in training.

Training runs on data of the host, whose rows may not all fit the device, are evaluated in segments
of inner steps: the rows of a segment are read while the device computes the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import MOST_TASKS, at_most, counts
from metalearn._utils.intervals import Estimate, interval
from metalearn.algorithm import Algorithm
from metalearn.engines.base import check_eta, outer_loss
from metalearn.engines.inner_loop import inner_loop, rollout
from metalearn.sharding.distributed import say
from metalearn.sharding.layout import Layout
from metalearn.tasks import ALL_STEPS, Reads, Tasks, draw_task, needs_fetch
from metalearn.unroll import Eta, Metrics, horizon

SEGMENT = 2**24  # bytes that the inner steps of a segment read; a few segments are in memory
LEFT_OUT, NOT_FINITE = "tasks_left_out", "tasks_not_finite"
OURS = {"meta_grad_norm", "meta_update_norm", "tasks_reset", LEFT_OUT, NOT_FINITE, "step_skipped"}


def task_metrics(
    algorithm: Algorithm,
    eta: Eta,
    tasks: Tasks,
    key: jax.Array,
    steps: int | None = None,
    layout: Layout | None = None,
) -> Metrics:
    """Draw one task, run its inner loop and return its outer loss and metrics.

    Args:
      algorithm: to evaluate.
      eta: the meta-parameters.
      tasks: the distribution to draw from.
      key: (), of the task.
      steps: the number of inner steps to take; None: all T.
      layout: of inner batches and inner states; see `metalearn.tasks.draw_task`.
    """
    check_eta(eta)
    task = draw_task(algorithm, tasks, key, layout=layout)
    loss, aux = rollout(task.unroll, eta, task.first_batches(steps))
    return merged({"loss": loss}, aux.metrics)


def segments_of(algorithm: Algorithm, tasks: Tasks, count: int) -> list[Reads]:
    """Return the segments of the inner loops of an evaluation: one, of all steps, if it can be.

    Args:
      algorithm: to evaluate.
      tasks: the distribution to draw from.
      count: tasks that are evaluated at once.
    """
    step_bytes = tasks.step_bytes(algorithm) if needs_fetch(tasks) and tasks.reads_steps else 0
    if not step_bytes:
        return [ALL_STEPS]
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda key: draw_task(algorithm, tasks, key).batches(), key)
    steps = horizon(shapes)
    if not steps:
        return [ALL_STEPS]
    most = max(SEGMENT // (count * step_bytes), 1)  # inner steps of a segment
    length = -(-steps // -(-steps // most))
    starts = range(0, steps, length)
    return [Reads(start, min(length, steps - start), start == starts[-1]) for start in starts]


def advanced(
    algorithm: Algorithm,
    segment: Reads,
    layout: Layout | None,
    shared: tuple[Eta, Tasks, jax.Array],
    run: tuple[jax.Array, Any],
) -> Any:
    """Advance a task by a segment: return its inner state, or its metrics after the last segment.

    Args:
      algorithm: to evaluate.
      segment: its number of `steps`; `start` 0 for the first segment, `query` for the last.
      layout: as of `task_metrics`.
      shared: (the meta-parameters, the distribution, the first inner step of the segment ()).
      run: (the key of the task, its inner state, which the first segment ignores).
    """
    eta, tasks, start = shared
    key, state = run
    task = draw_task(algorithm, tasks, key, layout=layout)
    unroll = task.unroll._replace(init=lambda eta: state) if segment.start else task.unroll
    batches = task.batches_at(start + jnp.arange(segment.steps, dtype=jnp.int32))
    state, _ = inner_loop(unroll, eta, batches)
    if not segment.query:
        return state
    loss, metrics = outer_loss(unroll, eta, state)
    return merged({"loss": loss}, metrics)


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Join our metrics of a task and an algorithm's, which are averaged over tasks.

    Raises:
      ValueError: if one of the algorithm's has a name that we reserve.
      TypeError: if one is no number.
    """
    reserved = sorted((ours.keys() | OURS) & theirs.keys())
    if reserved:
        raise ValueError(
            f"The algorithm's `loss` returns a metric called {reserved[0]!r}, a name that the "
            "Trainer needs for its own. Call it something else."
        )
    for name, value in theirs.items():
        shape = jax.tree.map(lambda leaf: list(jnp.shape(leaf)), value)
        if shape != []:
            raise TypeError(
                f"Metrics are numbers, whose mean over tasks the Trainer reports, but the "
                f"algorithm's `loss` returns a metric {name!r} of shape {shape}. Take its mean, or "
                "give each entry a name of its own."
            )
    return {**ours, **theirs}


def estimate(
    metrics_of: Callable[[jax.Array, int], dict[str, jax.Array]],
    key: jax.Array,
    tasks: int,
    chunk: int,
    isolate: bool = False,
) -> dict[str, Estimate]:
    """Run `metrics_of` over `tasks` keys, and return the mean of each metric with its interval.

    Args:
      metrics_of: keys [chunk], tasks before them -> metrics [chunk].
      key: splits into those of the tasks.
      tasks: how many.
      chunk: tasks of one call.
      isolate: leave tasks that are not finite out of the means.
    """
    counts("evaluate", 1, tasks=tasks)
    at_most("evaluate", MOST_TASKS, tasks=tasks)
    keys, rows = jax.random.split(key, tasks), []
    for i in range(0, tasks, chunk):
        first = max(min(i, tasks - chunk), 0)  # one shape, one compilation: the last overlaps
        row = metrics_of(keys[(first + jnp.arange(chunk)) % tasks], first)
        rows.append((row, slice(i - first, tasks - first)))  # read once all are on their way
    columns = {
        name: np.concatenate([np.asarray(row[name])[part] for row, part in rows])
        for name in rows[0][0]
    }
    return summarised(columns, isolate)


def summarised(columns: dict[str, np.ndarray], isolate: bool = False) -> dict[str, Estimate]:
    """Return the mean of each metric with its interval; count and report non-finite tasks.

    A task is not finite if one of its metrics is not. The number of these tasks is the metric
    `tasks_left_out` with `isolate`, which leaves them out of all means (NaN if none is finite), and
    `tasks_not_finite` without, if there are any.

    Args:
      columns: metrics by name, each [tasks].
      isolate: leave tasks that are not finite out of the means.
    """
    columns = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    finite = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
    over_all = {name: interval(column) for name, column in columns.items()}
    over_finite = {name: interval(column[finite]) for name, column in columns.items()}
    tasks, wrong = len(finite), int((~finite).sum())
    count = Estimate(wrong, 0.0, tasks)
    if wrong:
        first = int(np.argmin(finite))
        name = next(name for name, column in columns.items() if not np.isfinite(column[first]))
        say(
            f"{wrong} of {tasks} tasks {'is' if wrong == 1 else 'are'} not finite in this "
            f"evaluation (the first: task {first}, {name} {columns[name][first]}). "
            + _consequence(over_finite, tasks - wrong, isolate)
        )
    if isolate:
        return {**over_finite, LEFT_OUT: count}
    return {**over_all, NOT_FINITE: count} if wrong else over_all


def _consequence(over_finite: dict[str, Estimate], others: int, isolate: bool) -> str:
    if isolate:
        return f"The means are over the other {others}."
    means = ", ".join(f"{name} {value}" for name, value in over_finite.items())
    return (
        f"The means are therefore not finite either; over the other {others}: {means}. "
        "`Trainer(isolate=True)`, or config.isolate, leaves such tasks out, and counts them."
    )
