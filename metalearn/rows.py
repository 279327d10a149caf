"""Datasets whose rows are read by number, wherever they are: on the device, or on the host.

A long training run reads rows of a whole dataset: an inner step has the numbers of its rows, and
reads them (`read_rows`). The support of an episode is then (inputs, targets, rows [m]): the data,
and the numbers of those rows that belong to the split. Where the data are on the host, the parts
are

- `HostColumn` in place of an array: a step calls back to the host for its rows, and waits. Right
  everywhere, but slow.
- `ReadColumn` in place of an array, and `StepRows` in place of row numbers: the rows that some
  inner steps read, which the host has read before the program runs. The numbers are then positions
  among those that were read. A program neither waits, nor draws a permutation of all rows.
  `row_numbers` returns the numbers in the dataset, for what is stored by row beside it.

A row that was not read comes back as NaN, or as the largest integer, so that it cannot pass for
data.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = int(np.iinfo(np.int32).max)  # the position of a row that was not read


class Table(Protocol):
    """Data on the host, read by row."""

    example: Any  # the shapes and types of one row, as stored: a pytree
    count: int  # rows

    def read(self, rows: np.ndarray) -> Any:
        """Return some rows [k] int64: leaves [k, ...]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ReadColumn:
    """Rows of a column that were read on the host, in place of the array [n, ...] of all.

    Args:
      values: leaves [k, ...].
      count: n, the rows of the whole column; None: unknown.
    """

    values: Any
    count: int | None = dataclasses.field(default=None, metadata={"static": True})

    def take(self, positions: jax.Array) -> Any:
        """Return the values at positions [...]: leaves [..., *]; NaN or the largest elsewhere."""
        return jax.tree.map(lambda leaf: _at_or_absent(leaf, positions), self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostColumn:
    """A column of data on the host, in place of an array [n, ...]: a program calls back for rows.

    Args:
      table: that is read; it compares by identity.
      part: the number of the column among the columns of the table.
    """

    table: Table = dataclasses.field(metadata={"static": True})
    part: int = dataclasses.field(metadata={"static": True})

    def take(self, rows: jax.Array) -> Any:
        """Return the values of rows [...], leaves [..., *], read by a callback."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            return jax.ShapeDtypeStruct((*rows.shape, *leaf.shape), dtype)

        def read(rows: np.ndarray) -> Any:
            rows = np.asarray(rows)
            columns = self.table.read(rows.reshape(-1).astype(np.int64))[self.part]
            return jax.tree.map(
                lambda leaf, s: leaf.reshape(*rows.shape, *leaf.shape[1:]).astype(s.dtype),
                columns,
                shapes,
            )

        shapes = jax.tree.map(shape, self.table.example[self.part])
        return jax.pure_callback(read, shapes, rows, vmap_method="broadcast_all")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepRows:
    """Where the rows of some inner steps are among those read, in place of row numbers [m].

    Args:
      positions: [t, batch] int32, of the rows of consecutive steps.
      start: (), int32, the number of the first of these steps.
      numbers: [k] int32, the number in the dataset of each row that was read; `ABSENT` of padding.
        None: unknown.
    """

    positions: jax.Array
    start: jax.Array
    numbers: jax.Array | None = None

    def at(self, steps: jax.Array, batch: int) -> jax.Array:
        """Return the positions of the rows of steps [k]: [k, batch], `ABSENT` of other steps.

        Raises:
          ValueError: if the rows were read for another batch size.
        """
        count, size = self.positions.shape
        if size != batch:
            raise ValueError(
                f"The rows of these tasks were read for inner steps of {size} examples, and the "
                f"algorithm takes {batch}. Fetch them for this algorithm: "
                "`Trainer.fetch(tasks, state)` of its trainer."
            )
        steps = steps - self.start
        inside = (steps >= 0) & (steps < count)
        if not count:
            return jnp.full((len(steps), batch), ABSENT, jnp.int32)
        positions = self.positions[jnp.clip(steps, 0, count - 1)]
        return jnp.where(inside[:, None], positions, ABSENT)


def take(column: Any, rows: jax.Array) -> Any:
    """Return rows [...] of a column, leaves [..., *].

    Args:
      column: leaves [n, ...] on the device; or a `ReadColumn`, or a `HostColumn`.
      rows: integers.
    """
    if isinstance(column, ReadColumn | HostColumn):
        return column.take(rows)
    return jax.tree.map(lambda leaf: leaf[rows], column)


def row_numbers(split: Any, rows: jax.Array) -> jax.Array:
    """Return the numbers in the dataset of rows [...], as an inner step gets them: [...] int32.

    Args:
      split: the rows of a training run: [m], or `StepRows`.
      rows: of `epochs(split, ...)`: numbers already, or of `StepRows` positions.
    """
    if not isinstance(split, StepRows) or split.numbers is None:
        return rows
    return split.numbers.at[rows].get(mode="fill", fill_value=ABSENT)


def row_count(column: Any) -> int | None:
    """Return n, the rows of a whole column, wherever it is; None: unknown."""
    if isinstance(column, ReadColumn):
        return column.count
    if isinstance(column, HostColumn):
        return column.table.count
    leaves = jax.tree.leaves(column)
    return leaves[0].shape[0] if leaves and jnp.ndim(leaves[0]) else None


def absent_value(dtype: Any) -> Any:
    """Return what stands for a value that was not read: NaN, the largest integer, or True."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).max
    return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else True


def _at_or_absent(leaf: jax.Array, positions: jax.Array) -> jax.Array:
    return leaf.at[positions].get(mode="fill", fill_value=absent_value(leaf.dtype))
