"""Training runs on data that stay on the host: larger than the device, or than memory.

`HostTrainingRuns` draws the runs that `TrainingRuns` draws, and `HostHeldOut` those of `HeldOut`,
with the same bits for the same key. The inner loops of FDS and of learned optimizers read their
rows by number, and which rows a step reads is a function of the key and of the step. So the rows of
those inner steps that a program takes are read before it runs, each row once, in the order of the
source, and sent to the device in their stored type: all T steps of a full unroll, K of a truncated
or a segmented one, in any order and as often as a replay asks. What is on the device is then no
more than these rows, and the rows of the queries where the program takes the outer loss. The query
of a run is one piece, since the outer loss reads it whole.

On the host the row numbers of a run are 4 bytes for each row of the dataset, a few times
(`metalearn.datasets.run_rows`).

`Trainer.fit` reads ahead in a thread (`metalearn.training.prefetch`). Inside a program of your own
that calls `sample(key)`, every inner step calls back to the host and waits for its rows: correct,
but slow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn._utils.pixels import are_pixels
from metalearn.algorithm import Algorithm
from metalearn.datasets.arrays import least_and_largest, one_array
from metalearn.datasets.run_rows import RowNumbers, RunTable
from metalearn.datasets.sources import ArrayRows, Part, Rows, pairs_of
from metalearn.datasets.training_runs import random_split, validation_examples
from metalearn.rows import ABSENT, HostColumn, ReadColumn, StepRows
from metalearn.tasks import Reads, Tasks, episode_keys, number_of
from metalearn.unroll import Episode


class _HostRuns(Tasks):
    """Runs on a table of the host, of which a program reads the rows of its own inner steps."""

    table: RunTable
    numbers: RowNumbers
    labels: tuple[int, int] | None

    @property
    def needs_fetch(self) -> bool:
        """True."""
        return True

    @property
    def reads_steps(self) -> bool:
        """True."""
        return True

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target of arrays; None for those of items."""
        return self.labels

    def step_bytes(self, algorithm: Algorithm) -> int:
        """Return the bytes of the rows of an inner step."""
        return self.numbers.batch_of(algorithm) * self.table.row_bytes

    def fetch(self, keys: jax.Array, first: int) -> Tasks:
        """Refuse: which rows are read depends on the algorithm. See `fetch_steps`."""
        raise TypeError(
            "Which rows a training run reads depends on the algorithm and its inner steps: call "
            "`fetch_steps(keys, first, algorithm, reads)`, or `metalearn.tasks.fetched`."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FetchedRuns(Tasks):
    """Training runs of some keys, with the rows that some inner steps read.

    For another key, and in another step, what is read is NaN or the largest integer.

    Args:
      keys: [n], of the episodes.
      start: [n] int32, the first of these steps.
      positions: [n, t, batch] int32, where the rows of the steps are in `data`.
      query: [n, v] int32, where the rows of the queries are in `query_data`.
      data: (inputs [k, ...], targets [k], training targets [k]), the rows that were read.
      query_data: (inputs [m, ...], targets [m]) of the queries; None: those of `data`.
      numbers: [k] int32, the number in the dataset of each row of `data`.
      count: the rows of the dataset.
    """

    keys: jax.Array = dataclasses.field(repr=False)
    start: jax.Array = dataclasses.field(repr=False)
    positions: jax.Array = dataclasses.field(repr=False)
    query: jax.Array = dataclasses.field(repr=False)
    data: tuple[jax.Array, jax.Array, jax.Array] = dataclasses.field(repr=False)
    query_data: tuple[jax.Array, jax.Array] | None = dataclasses.field(repr=False)
    numbers: jax.Array = dataclasses.field(repr=False)
    count: int = dataclasses.field(metadata={"static": True})

    def sample(self, key: jax.Array) -> Episode:
        """Return the episode of `key`."""
        number, present = number_of(self.keys, key)
        columns = (ReadColumn(column, self.count) for column in self.data)
        inputs, targets, inner_targets = columns
        if self.query_data is not None:
            inputs_of_query, targets = (ReadColumn(column) for column in self.query_data)
        else:
            inputs_of_query = inputs
        positions = jnp.where(present, self.positions[number], ABSENT)
        query = jnp.where(present, self.query[number], ABSENT)
        support = inputs, inner_targets, StepRows(positions, self.start[number], self.numbers)
        return Episode(support, (inputs_of_query, targets, query))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostTrainingRuns(_HostRuns):
    """Training runs on random splits of a dataset on the host.

    Create it with `HostTrainingRuns.create`. A pytree without leaves. Its runs are those of
    `TrainingRuns` of the same data, bit for bit.

    Args:
      table: the rows of the source.
      numbers: which rows the runs read.
      validation: the number of examples of the outer loss.
      labels: the least and the largest target, where they were read; None: unknown.
    """

    table: RunTable = dataclasses.field(metadata={"static": True}, repr=False)
    numbers: RowNumbers = dataclasses.field(metadata={"static": True}, repr=False)
    validation: int = dataclasses.field(metadata={"static": True})
    labels: tuple[int, int] | None = dataclasses.field(metadata={"static": True}, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        source: Any,
        targets: Any = None,
        *,
        validation: int | float,
        training_targets: Any = None,
        inputs: Part = None,
        target: Part = None,
        threads: int = 1,
    ) -> HostTrainingRuns:
        """Make training runs of a source, after checking that it can be split.

        Args:
          source: an array or `numpy.memmap` [n, ...], or an object with `len(source)` and
            `source[i]`, whose items are pairs (input, target) or dictionaries; see
            `metalearn.datasets.sources`. An inner step scales uint8 images to 0..1, and reads any
            other type unchanged.
          targets: [n], for the objective; None: they are read from the items, with the inputs.
          validation: the validation examples of a run, a number or a share; see `TrainingRuns`.
          training_targets: [n], the targets of the inner loop, such as noisy labels; None: equal
            to `targets`.
          inputs: which part of an item the inputs are: a key, a number, or a function of an item.
            None: the first of a pair; all of a dictionary but its "label".
          target: likewise for the target; None: the second of a pair, "label" of a dictionary.
          threads: threads that read items, where the source takes it (decoding of images).

        Raises:
          ValueError: if lengths differ, or one side of the split is empty; or for uint8 inputs
            that are not images.
          TypeError: if the source has no rows, or items without the parts that are asked for.
        """
        what = "HostTrainingRuns"
        data = pairs_of(what, source, targets, inputs, target, threads)
        _check_inputs(what, data)
        count, n = validation_examples(what, validation, data.count), data.count
        inner_targets = _inner_targets(what, training_targets, n)
        labels = _label_range(targets, training_targets)
        numbers = RowNumbers(lambda key: random_split(key, n, count))
        return cls(RunTable(data, inner_targets), numbers, count, labels)

    def sample(self, key: jax.Array) -> Episode:
        """Draw one split of the rows; the data are read by callbacks.

        Returns:
          The support and the query of `TrainingRuns`, with `metalearn.rows.HostColumn` in place of
          the arrays of the data.
        """
        train, held_out = random_split(key, self.table.count, self.validation)
        inputs, targets, inner_targets = (HostColumn(self.table, part) for part in range(3))
        return Episode((inputs, inner_targets, train), (inputs, targets, held_out))

    def fetch_steps(
        self, keys: jax.Array, first: int, algorithm: Algorithm, reads: Reads
    ) -> FetchedRuns:
        """Read the rows that inner steps read, and send them to the device; `first` is ignored."""
        del first
        query = self.numbers.of_query(keys) if reads.query else np.zeros((len(keys), 0), np.int32)
        return _fetched(self.table, self.numbers, keys, algorithm, reads, query, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostHeldOut(_HostRuns):
    """The final run on a training set on the host, evaluated on a test set on the device.

    Create it with `HostHeldOut.create`. A pytree whose leaves are the test set. Its run is that of
    `HeldOut` of the same data, bit for bit.

    Args:
      test_inputs: [m, ...].
      test_targets: [m].
      table: the rows of the training set.
      numbers: which rows the run reads.
      labels: the least and the largest target, where they were read; None: unknown.
    """

    test_inputs: jax.Array = dataclasses.field(repr=False)
    test_targets: jax.Array = dataclasses.field(repr=False)
    table: RunTable = dataclasses.field(metadata={"static": True}, repr=False)
    numbers: RowNumbers = dataclasses.field(metadata={"static": True}, repr=False)
    labels: tuple[int, int] | None = dataclasses.field(metadata={"static": True}, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        source: Any,
        targets: Any = None,
        *,
        test_source: Any,
        test_targets: Any = None,
        inputs: Part = None,
        target: Part = None,
        threads: int = 1,
    ) -> HostHeldOut:
        """Make the final run of a training set on the host and a test set.

        The outer loss reads the whole test set in one piece, so it is read now and put on the
        device: take a part of one that does not fit there.

        Args:
          source: the training set, as of `HostTrainingRuns.create`.
          targets: [n]; None: they are read from the items.
          test_source: the test set, likewise.
          test_targets: [m], likewise.
          inputs: as of `HostTrainingRuns.create`; of both sets.
          target: likewise.
          threads: likewise.

        Raises:
          ValueError: if lengths differ, or the inputs of the two sets differ in shape or type; or
            for uint8 inputs that are not images.
          TypeError: if a source has no rows, or items without the parts that are asked for.
        """
        what = "HostHeldOut"
        data = pairs_of(what, source, targets, inputs, target, threads)
        test = pairs_of(what, test_source, test_targets, inputs, target, threads)
        _check_inputs(what, data)
        kinds = [_kind(each.example[0]) for each in (data, test)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"`{what}` got training inputs of {kinds[0]} and test inputs of {kinds[1]}, but "
                "one network reads both. Give both the same preparation."
            )
        test_columns = test.read(np.arange(test.count))
        n = data.count
        numbers = RowNumbers(lambda key: (jnp.arange(n, dtype=jnp.int32),) * 2)
        labels = None if targets is None else _label_range(targets, test_columns[1])
        test_inputs, test_targets = map(jnp.asarray, test_columns[:2])
        return cls(test_inputs, test_targets, RunTable(data), numbers, labels)

    def sample(self, key: jax.Array) -> Episode:
        """Return the only task; the training set is read by callbacks."""
        del key
        inputs, _, inner_targets = (HostColumn(self.table, part) for part in range(3))
        rows, test_rows = (
            jnp.arange(n, dtype=jnp.int32) for n in (self.table.count, len(self.test_targets))
        )
        query = self.test_inputs, self.test_targets, test_rows
        return Episode((inputs, inner_targets, rows), query)

    def fetch_steps(
        self, keys: jax.Array, first: int, algorithm: Algorithm, reads: Reads
    ) -> FetchedRuns:
        """Read the rows that inner steps read, and send them to the device; `first` is ignored."""
        del first
        query = np.tile(np.arange(len(self.test_targets), dtype=np.int32), (len(keys), 1))
        test = self.test_inputs, self.test_targets
        return _fetched(self.table, self.numbers, keys, algorithm, reads, query, test)


def _fetched(
    table: RunTable,
    numbers: RowNumbers,
    keys: jax.Array,
    algorithm: Algorithm,
    reads: Reads,
    query: Any,
    query_data: Any,
) -> FetchedRuns:
    """Return the runs of some keys, with the rows of those steps, each of them read once.

    Args:
      query: [n, v], the rows of the queries: of the table, or of `query_data`.
      query_data: None: the table.
    """
    starts = np.broadcast_to(np.asarray(reads.start, np.int32), keys.shape)
    steps = numbers.of_steps(keys, algorithm, starts, reads.steps)
    own_query = query[:, :0] if query_data is not None else query
    every = np.concatenate([steps.reshape(-1), own_query.reshape(-1)])
    rows, places = np.unique(every, return_inverse=True)
    # As many rows as there may be, so that the shapes, and so the programs, are always the same.
    most = max(1, min(table.count, every.size))
    if rows.size:
        columns = table.read(rows.astype(np.int64))
    else:
        columns = jax.tree.map(lambda s: np.zeros((0, *s.shape), s.dtype), table.example)
    columns = jax.tree.map(lambda leaf: _padded(leaf, most), columns)
    positions: Any = places[: steps.size].reshape(steps.shape).astype(np.int32)
    if query_data is None:
        query = places[steps.size :].reshape(query.shape).astype(np.int32)
    row_numbers = np.full(most, ABSENT, np.int32)
    row_numbers[: rows.size] = rows
    arrays: Any = jax.tree.map(jnp.asarray, (starts, positions, query, columns, row_numbers))
    begin, positions, query, data, read = arrays
    of_keys = episode_keys(keys), begin, positions, query, data, query_data
    return FetchedRuns(*of_keys, read, table.count)


def _padded(leaf: np.ndarray, most: int) -> np.ndarray:
    """Return rows [k, ...] followed by zeros: [most, ...]."""
    if len(leaf) == most:
        return leaf
    padded = np.zeros((most, *leaf.shape[1:]), leaf.dtype)
    padded[: len(leaf)] = leaf
    return padded


def _check_inputs(what: str, data: Rows) -> None:
    """Raise unless the inputs of an example are one array, of images where they are uint8."""
    inputs = data.example[0]
    if isinstance(inputs, jax.ShapeDtypeStruct):
        are_pixels(f"`{what}`", inputs.dtype, inputs.shape)
        return
    raise TypeError(
        f"`{what}` got inputs of several arrays, {_kind(inputs)}, but a training run reads one "
        "array of inputs. Say which part of an item it is with `inputs=`, such as "
        'inputs="image", or pass one array.'
    )


def _inner_targets(what: str, targets: Any, n: int) -> ArrayRows | None:
    if targets is None:
        return None
    rows = ArrayRows(one_array(what, "training_targets", targets, "[n]"), what)
    if rows.count != n:
        raise ValueError(
            f"`{what}` got {n:,} inputs and {rows.count:,} training targets, but every example is "
            "one of each. Pass training_targets [n]."
        )
    return rows


def _label_range(*targets: Any) -> tuple[int, int] | None:
    """Return the least and the largest integer target of some arrays; None if there is none."""
    return least_and_largest(*(np.asarray(each) for each in targets if each is not None))


def _kind(example: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(example)
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{['...', *leaf.shape]}".strip().replace("'", "")
        for path, leaf in leaves
    )
