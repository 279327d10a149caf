"""Attribution: the score of every training example for every query set, by one training run.

    found = attribute(trainer, tasks, key, queries)
    found.scores[q].argsort()[::-1][:8]       # the most helpful examples for query set q

A score is minus the derivative of the outer loss on a query set with respect to the weight of an
example: positive where the example helps. To first order, leaving a set S of examples out raises
the loss by the sum of their scores (`predicted_changes`), which `metalearn.algorithms.leave_k_out`
compares with training again.

The run is that of one key, forward once for all query sets of one size, and their cotangents are
pulled back together (`Trainer.query_gradients`): in one program, or in segments where the trainer
cuts it. Memory of cotangents grows with the number of query sets; `at_once` bounds it.

MAGIC (arXiv:2504.16430); Engstrom et al. 2025 (arXiv:2503.13751).
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Tasks, Trainer
from metalearn._utils.checks import at_least
from metalearn._utils.labels import known
from metalearn.algorithms.data_weights.algorithm import DataWeights
from metalearn.algorithms.epochs import scaled
from metalearn.learner import check_key
from metalearn.rows import HostColumn, take
from metalearn.tasks import check_tasks, draw_episode, label_range
from metalearn.unroll import task_keys

BLOCK = 4096  # rows of a dataset that are compared with queries at a time
SHOWN = 5  # rows that a warning names

QuerySet = tuple[Any, Any]  # (inputs [m, ...], targets [m, ...])


class Attribution(NamedTuple):
    """The scores of a training run's examples.

    Args:
      scores: [Q, examples], or [Q, groups], or with a last axis [tokens]: minus the derivative of
        each outer loss with respect to the weights; positive: the example helps. Zero for an
        example that the run does not read.
      losses: [Q], the outer losses of the trained model.
      reads: [examples] int64, how often the run reads each example.
    """

    scores: np.ndarray
    losses: np.ndarray
    reads: np.ndarray


def attribute(
    trainer: Trainer,
    tasks: Tasks,
    key: jax.Array,
    queries: Sequence[QuerySet] | None = None,
    *,
    eta: jax.Array | None = None,
    at_once: int | None = None,
    check_overlap: bool = True,
) -> Attribution:
    """Train once, and return the score of every example for each query set.

    Args:
      trainer: with `DataWeights` as its algorithm, any exact engine, and `segment` and `replay` for
        a run that fits no program. Its outer optimizer is not used.
      tasks: training runs: `TrainingRuns`, `HeldOut`, `HostTrainingRuns` or `HostHeldOut`.
      key: (), of the run: theta_0, split, order of the examples and dropout.
      queries: query sets (inputs [m, ...], targets [m, ...]), like the dataset; m may differ. One
        example: `(x[None], y[None])`. None: the query of the task, as one set.
      eta: the weights to train with; None: ones.
      at_once: query sets that are pulled back together, each such part by a run of its own; None:
        all of one size.
      check_overlap: compare the queries with the training examples, which reads all of them.

    Raises:
      TypeError: for a trainer of another algorithm, or tasks that are no training runs.
      ValueError: for weights or queries of another shape than the dataset's.

    Warns:
      UserWarning: where query examples are training examples too.
    """
    algorithm, sets = check_run("attribute", trainer, tasks, key, queries)
    at_least("attribute", 1, at_once=at_once)
    if check_overlap:
        warn_of_overlap(tasks, key, sets)
    eta = algorithm.init(key) if eta is None else jnp.asarray(eta)
    scores: list[Any] = [None] * len(sets)
    losses = np.zeros(len(sets))
    with known(label_range(tasks), trainer.labels_seen):
        for numbers, stacked in stacks(sets, at_once):
            grads, metrics = trainer.query_gradients(eta, tasks, key, stacked)
            losses[numbers] = np.asarray(metrics["loss"])
            for number, grad in zip(numbers, np.asarray(grads), strict=True):
                scores[number] = -grad
    return Attribution(np.stack(scores), losses, reads(algorithm, tasks, key))


def reads(algorithm: DataWeights, tasks: Tasks, key: jax.Array) -> np.ndarray:
    """Return how often the run of a key reads each row of the dataset: [examples] int64."""
    rows, _ = _rows(algorithm, tasks, key)
    return np.bincount(np.asarray(rows).reshape(-1), minlength=algorithm.examples)


def predicted_changes(scores: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return by how much outer losses rise without some examples, to first order: [R, Q].

    Args:
      scores: [Q, examples] or [Q, examples, tokens], of `attribute`.
      left_out: [R, k], the examples that each run is without.
    """
    scores = scores.reshape(*scores.shape[:2], -1).sum(-1)
    return np.moveaxis(scores[:, left_out].sum(-1), 0, 1)


# What `attribute`, `leave_k_out` and `attribution_baselines` have in common.


def check_run(
    what: str, trainer: Trainer, tasks: Tasks, key: Any, queries: Sequence[QuerySet] | None
) -> tuple[DataWeights, list[QuerySet]]:
    """Return (the algorithm, the query sets as arrays), after checking them.

    Args:
      what: the function that its user called.
      trainer: as of `attribute`, here and below.
      tasks: likewise.
      key: likewise.
      queries: likewise.
    """
    if not isinstance(trainer, Trainer) or not isinstance(trainer.algorithm, DataWeights):
        kind = trainer.algorithm if isinstance(trainer, Trainer) else trainer
        raise TypeError(
            f"`{what}(trainer=)` takes a `Trainer(DataWeights(...))`, whose eta is a weight for "
            f"each example, not one of {type(kind).__name__}. For the meta-gradients of any other "
            "algorithm: `Trainer.query_gradients`."
        )
    check_tasks(f"{what}(tasks=)", tasks)
    check_key(f"{what}(key=)", key)
    episode = jax.eval_shape(lambda key: draw_episode(tasks, key), key)
    support = episode.support
    if not isinstance(support, tuple) or len(support) != 3:
        raise TypeError(
            f"`{what}(tasks=)` takes training runs, whose support is a dataset and the rows to "
            f"train on, not `{type(tasks).__name__}`. Make them of arrays with "
            "`metalearn.datasets.HeldOut.create` or `TrainingRuns.create`, of data on the host "
            "with `HostHeldOut.create` or `HostTrainingRuns.create`."
        )
    if queries is None:
        return trainer.algorithm, [query_of(tasks, key)]
    if not isinstance(queries, list | tuple) or not queries:
        raise TypeError(
            f"`{what}(queries=)` is a list of query sets (inputs [m, ...], targets [m, ...]), one "
            f"at least, not {type(queries).__name__}. Each example of its own: "
            "`[(x[None], y[None]) for x, y in zip(inputs, targets)]`."
        )
    example = [_example(column) for column in support[:2]]
    return trainer.algorithm, [_checked(what, query, example) for query in queries]


def _checked(what: str, query: Any, example: Sequence[Any]) -> QuerySet:
    """Return a query set as arrays, after comparing it with an example of the dataset."""
    if not isinstance(query, tuple | list) or len(query) != 2:
        raise TypeError(
            f"`{what}(queries=)` has a query set that is no pair (inputs [m, ...], targets "
            f"[m, ...]), but {type(query).__name__} of "
            f"{len(query) if isinstance(query, tuple | list) else 1}. A list of one set: "
            "`[(inputs, targets)]`."
        )
    arrays = [np.asarray(part) for part in query]
    for name, array, one in zip(("inputs", "targets"), arrays, example, strict=True):
        if array.shape[1:] != one.shape or not array.ndim or not len(array):
            raise ValueError(
                f"`{what}(queries=)` has {name} of the shape {[*array.shape]}, and those of the "
                f"dataset are {[*one.shape]} each: a query set has an axis [m] before it, m at "
                "least 1. One example: `x[None]`."
            )
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(
            f"`{what}(queries=)` has a query set of {len(arrays[0])} inputs and {len(arrays[1])} "
            "targets, but every example is one of each."
        )
    return arrays[0], arrays[1]


def _example(column: Any) -> Any:
    """Return the shape of one row of a column."""
    rows = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(lambda column, rows: take(column, rows), column, rows)
    return jax.ShapeDtypeStruct(shapes.shape[1:], shapes.dtype)


def stacks(
    sets: Sequence[QuerySet], at_once: int | None = None
) -> Iterator[tuple[list[int], tuple[Any, Any, Any]]]:
    """Yield query sets of one size, stacked: (their numbers, (inputs, targets, rows) [Q, m, ...]).

    Args:
      sets: of any sizes.
      at_once: at most so many together; None: all of one size.
    """
    sizes = [len(targets) for _, targets in sets]
    for size in dict.fromkeys(sizes):
        same = [number for number, each in enumerate(sizes) if each == size]
        length = at_once or len(same)
        for begin in range(0, len(same), length):
            numbers = same[begin : begin + length]
            inputs, targets = (
                jnp.asarray(np.stack([sets[n][part] for n in numbers])) for part in range(2)
            )
            rows = jnp.tile(jnp.arange(size, dtype=jnp.int32), (len(numbers), 1))
            yield numbers, (inputs, targets, rows)


@functools.partial(jax.jit, static_argnums=0)
def _rows(algorithm: DataWeights, tasks: Tasks, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rows that the run of a key reads, [T, batch], and those it may read, [m]."""
    episode, steps = draw_episode(tasks, key), jnp.arange(algorithm.inner_steps, dtype=jnp.int32)
    return algorithm.rows_at(episode, task_keys(key).batches, steps), episode.support[2]


@jax.jit
def query_of(tasks: Tasks, key: jax.Array) -> QuerySet:
    """Return the query of the task that `key` draws, as one set: (inputs [m, ...], targets)."""
    inputs, targets, rows = draw_episode(tasks, key).query
    return take(inputs, rows), take(targets, rows)


def warn_of_overlap(tasks: Tasks, key: jax.Array, sets: Sequence[QuerySet]) -> None:
    """Warn where the inputs of query examples are those of training examples."""
    queries: dict[bytes, list[int]] = {}
    for number, digest in enumerate(d for inputs, _ in sets for d in _digests(inputs)):
        queries.setdefault(digest, []).append(number)
    both: dict[bytes, int] = {}  # digest -> a row of the dataset
    inputs, _, rows = draw_episode(tasks, key).support
    for begin in range(0, len(rows), BLOCK):
        block = np.asarray(rows[begin : begin + BLOCK])
        if isinstance(inputs, HostColumn):
            values = inputs.table.read(block.astype(np.int64))[inputs.part]
        else:
            values = np.asarray(take(inputs, jnp.asarray(block)))
        for row, digest in zip(block.tolist(), _digests(values), strict=True):
            if digest in queries:
                both.setdefault(digest, row)
    count, total = sum(len(queries[d]) for d in both), sum(len(targets) for _, targets in sets)
    if count:
        named = ", ".join(map(str, [*both.values()][:SHOWN])) + (", ..." * (len(both) > SHOWN))
        warnings.warn(
            f"{count} of the {total} query examples are training examples too (rows {named} have "
            "the same inputs). Their scores say how well the run fits them, and an example helps "
            "itself most. Leave them out of the queries, or of the training set.",
            UserWarning,
            stacklevel=3,
        )


def _digests(inputs: Any) -> list[bytes]:
    """Return a digest of each input [n, ...], images as they are read by the model."""
    values = np.asarray(inputs)
    if values.dtype == np.uint8:
        values = np.asarray(scaled(jnp.asarray(values)), np.float32)
    elif values.dtype.kind == "f":
        values = values.astype(np.float32)
    rows = np.ascontiguousarray(values).reshape(len(values), -1)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
