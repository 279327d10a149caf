"""Which rows of a dataset training runs read, and those rows, read on the host.

`RowNumbers` computes the numbers of the rows that inner steps read, by the functions of the key
that the programs on a device compute them by (a random split of all rows, then shuffled epochs of
one part): `Algorithm.rows_at`. A permutation takes time and memory in proportion to the dataset, so
the numbers of about an epoch are computed at once, and the last few such blocks are cached.

`RunTable` reads the rows, and remembers a digest of some of them. A row that is read again, when a
run is replayed, has the same bytes, or is refused: a gradient through other data than those of the
forward pass would be silently wrong.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.algorithm import Algorithm
from metalearn.datasets.sources import ArrayRows, Rows
from metalearn.rows import StepRows
from metalearn.unroll import Episode, horizon, task_keys

SAMPLED = 8  # rows of a read whose digests are compared
MOST_DIGESTS = 2**16  # rows whose digests are remembered
MOST_CACHED = 2**29  # bytes of row numbers
ALGORITHMS = 4  # whose programs are cached

Split = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class RunTable:
    """Inputs, targets and training targets, read by row. It compares by identity.

    Args:
      data: reads pairs (inputs, targets).
      training_targets: reads the targets of the inner loop; None: they are the targets.
    """

    def __init__(self, data: Rows, training_targets: ArrayRows | None = None):
        """Take what reads the columns, of equal length."""
        self._data, self._training, self.count = data, training_targets, data.count
        inputs, targets = data.example
        inner_targets = targets if training_targets is None else training_targets.example
        self.example = inputs, targets, inner_targets
        self._digests: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of all columns."""
        leaves = jax.tree.leaves(self.example)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def read(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        """Return (inputs, targets, training targets) of some rows [k] int64, leaves [k, ...].

        Raises:
          ValueError: if the source has become shorter, or has other data in a row than before.
        """
        inputs, targets = self._data.read(rows)
        inner_targets = targets if self._training is None else self._training.read(rows)
        columns = inputs, targets, inner_targets
        self._compare(rows, columns)
        return columns

    def _compare(self, rows: np.ndarray, columns: Any) -> None:
        """Compare some rows with those read before under the same numbers."""
        places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int))
        leaves = jax.tree.leaves(columns)
        for place in places.tolist():
            digest = hashlib.blake2b(digest_size=8)
            for leaf in leaves:
                digest.update(np.ascontiguousarray(leaf[place]).tobytes())
            row, value = int(rows[place]), digest.digest()
            with self._lock:
                before = self._digests.setdefault(row, value)
                while len(self._digests) > MOST_DIGESTS:
                    self._digests.popitem(last=False)
            if before != value:
                name = self._data.name
                raise ValueError(
                    f"Row {row} of {name[0].lower()}{name[1:]} has other data than when it was "
                    "read before, but an inner loop that reads it twice, as a replay does, needs "
                    "the same: the meta-gradient would be silently wrong. Leave the data as they "
                    "are while training, and make random augmentation part of the inner step "
                    "(`FDS(augment=)`), where it depends on the step's key."
                )


class RowNumbers:
    """The numbers of the rows that training runs read. It compares by identity.

    Args:
      split: key of an episode -> (rows to train on [m], rows of the query [v]), int32.
    """

    def __init__(self, split: Split):
        """Take the function that splits the rows."""
        self._split = split
        self._lock = threading.RLock()
        self._programs: collections.OrderedDict[int, _Programs] = collections.OrderedDict()
        self._blocks: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()

    def of_steps(
        self, keys: jax.Array, algorithm: Algorithm, starts: np.ndarray, count: int | None
    ) -> np.ndarray:
        """Return the rows that `count` inner steps from `starts` [n] on read: [n, count, batch].

        Args:
          keys: [n], of the tasks.
          algorithm: whose inner steps.
          starts: the first step of each task.
          count: None: all T.
        """
        with self._lock, _on_host():
            programs = self._of(algorithm)
            count = programs.steps if count is None else min(count, programs.steps)
            # About an epoch at once: a permutation costs the same for one step as for all of it.
            length = min(max(count, -(-programs.rows // programs.batch)), programs.steps)
            data = np.asarray(jax.random.key_data(keys))
            impl = jax.random.key_impl(keys)
            outputs = np.empty((len(data), count, programs.batch), np.int32)
            for task, start in enumerate(starts.tolist()):
                for block in range(start // length, -(-(start + count) // length)):
                    rows = self._block(programs, data[task], impl, block, length)
                    begin, end = block * length, (block + 1) * length
                    first, last = max(start, begin), min(start + count, end)
                    outputs[task, first - start : last - start] = rows[first - begin : last - begin]
        return outputs

    def batch_of(self, algorithm: Algorithm) -> int:
        """Return how many rows an inner step reads."""
        with self._lock, _on_host():
            return self._of(algorithm).batch

    def of_query(self, keys: jax.Array) -> np.ndarray:
        """Return the rows of the queries of tasks: [n, v]."""
        with _on_host():
            data = np.asarray(jax.random.key_data(keys))
            impl = jax.random.key_impl(keys)
            return np.stack([np.asarray(self._query(key, impl=impl)) for key in data])

    @functools.cached_property
    def _query(self) -> Callable[..., jax.Array]:
        def query(data: jax.Array, impl: Any) -> jax.Array:
            return self._split(task_keys(jax.random.wrap_key_data(data, impl=impl)).episode)[1]

        return jax.jit(query, static_argnames="impl")

    def _block(
        self, programs: _Programs, key: np.ndarray, impl: Any, block: int, length: int
    ) -> np.ndarray:
        """Return the rows of the steps of a block, [length, batch], from the cache or computed."""
        name = programs, key.tobytes(), length, block  # programs compare by identity
        if name not in self._blocks:
            first = np.int32(block * length)
            rows = programs.rows_of(key, first, length=length, impl=impl)
            self._blocks[name] = np.asarray(rows)
        self._blocks.move_to_end(name)
        rows = self._blocks[name]
        while len(self._blocks) > 1 and sum(x.nbytes for x in self._blocks.values()) > MOST_CACHED:
            self._blocks.popitem(last=False)
        return rows

    def _of(self, algorithm: Algorithm) -> _Programs:
        if id(algorithm) not in self._programs:
            self._programs[id(algorithm)] = _Programs(algorithm, self._split)
        self._programs.move_to_end(id(algorithm))
        while len(self._programs) > ALGORITHMS:
            self._programs.popitem(last=False)
        return self._programs[id(algorithm)]


class _Programs:
    """The compiled functions of an algorithm's row numbers; it keeps the algorithm alive."""

    def __init__(self, algorithm: Algorithm, split: Split):
        def rows_of(data: jax.Array, start: jax.Array, length: int, impl: Any) -> jax.Array:
            keys = task_keys(jax.random.wrap_key_data(data, impl=impl))
            episode = Episode((None, None, split(keys.episode)[0]), None)
            steps = start + jnp.arange(length, dtype=jnp.int32)
            return algorithm.rows_at(episode, keys.batches, steps)

        def shapes(key: jax.Array) -> Any:
            rows = split(key)[0]
            episode = Episode((None, None, rows), None)
            one = algorithm.rows_at(episode, key, jnp.zeros(1, jnp.int32))
            # T, from positions of no rows: `batches` may read nothing but the rows.
            ahead = StepRows(jnp.zeros((1, one.shape[-1]), jnp.int32), jnp.zeros((), jnp.int32))
            batches = algorithm.batches(Episode((None, None, ahead), None), key)
            return rows, one, batches

        self.rows_of = jax.jit(rows_of, static_argnames=("length", "impl"))
        self.algorithm = algorithm
        rows, one, batches = jax.eval_shape(shapes, jax.eval_shape(lambda: jax.random.key(0)))
        self.rows, self.batch, self.steps = rows.shape[0], one.shape[-1], horizon(batches)


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Compute on the processor, where there is one for JAX: the accelerator is busy with a step."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        yield
        return
    with jax.default_device(device):
        yield
