"""Are scores right? Leave examples out, train again, and compare with what the scores predicted.

The linear datamodelling score (LDS; Park et al. 2023, arXiv:2303.14186; MAGIC, arXiv:2504.16430) of
a query set is the rank correlation, over random subsets that are left out, of the predicted and the
true change of its loss after training. Here an example is left out by the weight zero: theta_0, the
order of all other examples and the size of batches stay as they are, so that the change is due to
the examples. All retrainings are one program, vmapped over their weights.

    left_out = leave_k_out(trainer, tasks, key, queries, k=10, runs=100)
    lds(predicted_changes(scores, left_out.rows), left_out.changes)

A score of one: the order is right. What a score has to beat costs no derivative through training
(`attribution_baselines`): the cosine of an example's gradient with that of the query at the last
parameters, and the example's loss there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metalearn import Tasks, Trainer
from metalearn._utils.checks import counts
from metalearn.algorithms.data_weights.algorithm import DataWeights
from metalearn.algorithms.data_weights.attribution import QuerySet, check_run, reads, stacks
from metalearn.algorithms.epochs import read_rows
from metalearn.engines.inner_loop import inner_loop
from metalearn.tasks import draw_episode, draw_task

AT_ONCE = 25  # retrainings of a program


class LeaveOut(NamedTuple):
    """Trainings without some of the examples.

    Args:
      rows: [R, k] int64, what each training is without: examples, or groups.
      changes: [R, Q], the outer losses after it, minus those after training on everything.
    """

    rows: np.ndarray
    changes: np.ndarray


class Correlation(NamedTuple):
    """A mean rank correlation and its interval.

    Args:
      mean: over query sets.
      low: the lower end of the 95% interval, by the bootstrap over trainings.
      high: its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


class Baselines(NamedTuple):
    """Scores that take no derivative through training.

    Args:
      cosine: [Q, examples], of the gradients of an example and of each query set, at the last
        parameters.
      loss: [examples], of each example there.
    """

    cosine: np.ndarray
    loss: np.ndarray


def leave_k_out(
    trainer: Trainer,
    tasks: Tasks,
    key: jax.Array,
    queries: Sequence[QuerySet] | None = None,
    *,
    k: int,
    runs: int = 100,
    seed: int = 0,
    at_once: int = AT_ONCE,
) -> LeaveOut:
    """Train without k random examples, many times, and return by how much the losses change.

    Args:
      trainer: as of `attribute`, here and below. All steps of a run are one program here, and rows
        on the host that it reads are on the device.
      tasks: likewise.
      key: likewise: the run that the scores are of.
      queries: likewise.
      k: examples (or groups) that are left out, of those that the run reads.
      runs: R, how many trainings.
      seed: decides which examples each is without.
      at_once: trainings that are vmapped together.

    Raises:
      ValueError: if k is not below the number of examples that the run reads.
    """
    algorithm, sets = check_run("leave_k_out", trainer, tasks, key, queries)
    counts("leave_k_out", 1, k=k, runs=runs, at_once=at_once)
    units = _units(algorithm, tasks, key)
    if k >= len(units):
        kind = "examples" if algorithm.groups is None else "groups of examples"
        raise ValueError(
            f"`leave_k_out(k={k})` leaves nothing to train on: the run reads {len(units):,} "
            f"{kind}. Take a small part of them, such as a hundredth: scores are of first order."
        )
    draw = np.random.default_rng(seed)
    rows = np.stack([draw.choice(units, k, replace=False) for _ in range(runs)])
    ones = algorithm.init(key)
    losses = np.empty((1 + runs, len(sets)))
    at_once = min(at_once, runs + 1)
    for numbers, stacked in stacks(sets):
        with_queries = trainer.query_gradients.with_queries(tasks, key, stacked)
        for begin in range(0, 1 + runs, at_once):
            etas = np.tile(np.asarray(ones), (at_once, *[1] * ones.ndim))
            length = min(at_once, 1 + runs - begin)
            for place in range(length):
                if run := begin + place:  # the first is the one on everything
                    etas[place, rows[run - 1]] = 0
            outputs = trainer.query_gradients.losses(jnp.asarray(etas), with_queries, key)
            losses[begin : begin + length, numbers] = np.asarray(outputs)[:length]
    return LeaveOut(rows, losses[1:] - losses[:1])


def _units(algorithm: DataWeights, tasks: Tasks, key: jax.Array) -> np.ndarray:
    """Return the entries of eta that the run reads: examples, or groups."""
    rows = np.flatnonzero(reads(algorithm, tasks, key))
    return rows if algorithm.groups is None else np.unique(np.asarray(algorithm.groups)[rows])


def lds(
    predicted: np.ndarray, changes: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> Correlation:
    """Return the linear datamodelling score: Spearman's correlation, the mean over query sets.

    Args:
      predicted: [R, Q], of `predicted_changes`.
      changes: [R, Q], of `leave_k_out`.
      samples: of the bootstrap, each R of the trainings, with replacement.
      seed: of the bootstrap.

    Raises:
      ValueError: for shapes that differ, or fewer than three trainings.
    """
    predicted, changes = np.asarray(predicted, float), np.asarray(changes, float)
    if predicted.shape != changes.shape or predicted.ndim != 2 or len(changes) < 3:
        raise ValueError(
            f"`lds` compares predicted changes [R, Q] with true ones of the same shape, of three "
            f"trainings or more, not {[*predicted.shape]} with {[*changes.shape]}."
        )
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(changes), (samples, len(changes)))
    drawn = [_spearman(predicted[pick], changes[pick]) for pick in picks]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Correlation(_spearman(predicted, changes), float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of columns [R, Q], the mean over Q; 0 for a constant column."""
    from scipy.stats import rankdata  # a dependency of jax, imported where it is needed

    ranks = [rankdata(each, axis=0) for each in (a, b)]
    x, y = (each - each.mean(0) for each in ranks)
    norms = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(np.divide((x * y).sum(0), norms, out=np.zeros_like(norms), where=norms > 0).mean())


def attribution_baselines(
    trainer: Trainer,
    tasks: Tasks,
    key: jax.Array,
    queries: Sequence[QuerySet] | None = None,
    *,
    block: int = 64,
) -> Baselines:
    """Train once, and return the gradient cosines and losses of all examples at the end.

    Args:
      trainer: as of `attribute`, here and below.
      tasks: likewise.
      key: likewise.
      queries: likewise.
      block: examples whose gradients are in memory at a time.
    """
    algorithm, sets = check_run("attribution_baselines", trainer, tasks, key, queries)
    counts("attribution_baselines", 1, block=block)
    cosine, loss = np.empty((len(sets), algorithm.examples)), np.empty(algorithm.examples)
    for numbers, stacked in stacks(sets):
        cosines, losses = _baselines(algorithm, block, tasks, key, stacked)
        cosine[numbers], loss = np.asarray(cosines), np.asarray(losses)
    return Baselines(cosine, loss)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _baselines(
    algorithm: DataWeights, block: int, tasks: Tasks, key: jax.Array, queries: Any
) -> tuple[jax.Array, jax.Array]:
    """Return (cosines [Q, examples], losses [examples])."""
    task, eta = draw_task(algorithm, tasks, key), algorithm.init(key)
    state, _ = inner_loop(task.unroll, eta, task.batches())
    params, statistics = algorithm.trained(eta, state)
    flat, unravel = ravel_pytree(params)
    support = draw_episode(tasks, key).support

    def loss(flat: jax.Array, inputs: Any, targets: Any) -> jax.Array:
        outputs = algorithm.predict(unravel(flat), statistics, inputs, None)
        return algorithm.losses(outputs, targets).mean()

    def direction(inputs: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
        value, grads = jax.value_and_grad(loss)(flat, inputs, targets)
        norm = jnp.sqrt((grads**2).sum())
        return value, grads / jnp.where(norm > 0, norm, 1)

    inputs, targets, _ = queries
    _, of_queries = jax.vmap(direction)(inputs, targets)

    def of_row(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, of_example = direction(*read_rows(support, row[None]))
        return of_queries @ of_example, value

    cosines, losses = jax.lax.map(of_row, jnp.arange(algorithm.examples), batch_size=block)
    return cosines.T, losses
