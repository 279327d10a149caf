"""Data that stay on the host and are read by row: arrays, memory-mapped files, random access.

Read by row are

- arrays: of NumPy, `numpy.memmap`, or a dictionary or another pytree of them, [n, ...];
- a random-access source, an object with `len(source)` and `source[i]`: a `MapDataset` of grain, a
  data source of TFDS, a `Dataset` of PyTorch, or one of your own. `__getitems__(rows)`, where there
  is one, reads several rows at once.

An item of a random-access source is an example with its label: a pair (input, label), or a
dictionary with the key "label". Which parts of it are read is said by `inputs` and `label`.

A source must not shrink while it is read. A file that is cut below its mapped length would end the
process with a signal (SIGBUS), so its size is compared before rows are read.
"""

from __future__ import annotations

import abc
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from metalearn._utils.checks import counts
from metalearn._utils.counting import counted
from metalearn.datasets.arrays import arrays, one_array, rows_of

CHUNK = 256  # items read at once where all labels are

Part = Callable[[Any], Any] | str | int | None  # which part of an item: a function, or its key


class RandomAccess(Protocol):
    """What is read by row."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, row: int, /) -> Any:
        """Return a row, an item."""


class Rows(abc.ABC):
    """The inputs of all examples, read by row.

    It compares by identity, so that it may be a static field of a pytree.
    """

    name: str  # what it reads, for messages
    count: int  # the number of examples
    example: Any  # the shapes and types of the inputs of one, as stored: a pytree

    @abc.abstractmethod
    def read(self, rows: np.ndarray) -> Any:
        """Return the inputs of some rows [k] int64: leaves [k, ...].

        Raises:
          ValueError: if the source has become shorter, or a row has another shape or type.
        """

    def _shrunk(self, now: str) -> ValueError:
        return ValueError(
            f"{self.name} had {self.count:,} examples when the tasks were made, and now {now}: it "
            "has shrunk while it is read. Training reads rows of it in every step, so the data "
            "must stay as they are: write new data elsewhere, and begin again with tasks of them."
        )


class ArrayRows(Rows):
    """Rows of arrays on the host, or of memory-mapped files."""

    def __init__(self, data: Any, what: str = "HostFewShot"):
        """Take arrays, a pytree of them, leaves [n, ...]; `what` reads them, for messages."""
        data = jax.tree.map(np.asanyarray, arrays(what, "inputs", data, "[n, ...]"))
        self.data, self.count = data, rows_of(what, "inputs", data)
        self.name = f"The array that `{what}` reads"
        self.example = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data
        )
        self._files = [*_mapped_files(data)]

    def read(self, rows: np.ndarray) -> Any:
        for path, size in self._files:
            now = os.path.getsize(path) if os.path.exists(path) else 0
            if now < size:
                raise self._shrunk(f"its file {path} has {now:,} bytes of {size:,}")
        return jax.tree.map(lambda leaf: np.asarray(leaf[rows]), self.data)


def _mapped_files(data: Any) -> Iterator[tuple[str, int]]:
    """Yield the path and the size in bytes of each memory-mapped file."""
    for leaf in jax.tree.leaves(data):
        path = getattr(leaf, "filename", None) if isinstance(leaf, np.memmap) else None
        if path is not None and os.path.exists(path):
            yield str(path), os.path.getsize(path)


class ItemRows(Rows):
    """Rows of a random-access source."""

    def __init__(
        self,
        source: RandomAccess,
        inputs: Part = None,
        threads: int = 1,
        what: str = "HostFewShot",
    ):
        """Take a source; see `HostFewShot.create`. `what` reads it, for messages."""
        counts(what, 1, threads=threads)
        self._source, self._part, self._threads = source, inputs, threads
        self.name, self.count = f"The source `{type(source).__name__}`", len(source)
        if not self.count:
            raise ValueError(f"{self.name} is empty: its length is 0. Tasks need examples.")
        self.example = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._inputs(source[0])
        )

    def read(self, rows: np.ndarray) -> Any:
        shapes: Any
        treedef: Any
        shapes, treedef = jax.tree.flatten(self.example)
        columns = [np.empty((len(rows), *shape.shape), shape.dtype) for shape in shapes]

        def fill(position: int, row: int, item: Any) -> None:
            inputs = self._inputs(item)
            leaves, own = jax.tree.flatten(inputs)
            if own != treedef or any(
                leaf.shape != shape.shape or leaf.dtype != shape.dtype
                for leaf, shape in zip(leaves, shapes, strict=True)
            ):
                raise ValueError(
                    f"Item {row} of {self.name[0].lower()}{self.name[1:]} is {_shown(inputs)}, but "
                    f"item 0 is {_shown(self.example)}, and the inputs of a task become one array. "
                    "Give all items one shape and type where the source makes them."
                )
            for column, leaf in zip(columns, leaves, strict=True):
                column[position] = leaf

        for position, (row, item) in enumerate(zip(rows, self.items(rows.tolist()), strict=True)):
            fill(position, int(row), item)
        return jax.tree.unflatten(treedef, columns)

    def items(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yield the items of some rows.

        Raises:
          ValueError: if the source has become shorter.
        """
        if len(self._source) < self.count:
            raise self._shrunk(f"it has {len(self._source):,}")
        try:
            several = getattr(self._source, "__getitems__", None)
            if several is not None:
                yield from several(rows)
            elif self._threads == 1:
                yield from (self._source[row] for row in rows)
            else:
                with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                    yield from pool.map(self._source.__getitem__, rows)
        except IndexError as error:
            raise self._shrunk(f"a row of it is missing ({error})") from error

    def labels(self, label: Part, progress: bool) -> np.ndarray:
        """Read the labels [n] of all items."""
        starts = range(0, self.count, CHUNK)
        rows = (range(start, min(start + CHUNK, self.count)) for start in starts)
        items = (item for chunk in rows for item in self.items(chunk))
        labels = [
            self._label(item, label)
            for item in counted(items, self.count, "item", "reading labels", progress)
        ]
        return np.asarray(labels)

    def _label(self, item: Any, label: Part) -> Any:
        if label is None:
            label = "label" if isinstance(item, Mapping) else 1
        value = np.asarray(self._taken("label", label, item))
        if value.shape != () or value.dtype.kind not in "biuUS":
            raise TypeError(
                f"{self.name} has a label of {value.dtype}{list(value.shape)}, but a label says "
                "which class an example is of: an integer, or a name. Say where it is with "
                '`label=`, such as label="label", or pass `labels`, an array [n].'
            )
        return value.item()

    def _inputs(self, item: Any) -> Any:
        """Return the inputs of an item, a pytree of arrays."""
        if self._part is not None:
            item = self._taken("inputs", self._part, item)
        elif isinstance(item, Mapping):
            rest = {key: value for key, value in item.items() if key != "label"}
            item = next(iter(rest.values())) if len(rest) == 1 else rest
        elif isinstance(item, tuple | list) and len(item) == 2:
            item = item[0]
        leaves = jax.tree.map(np.asarray, item, is_leaf=lambda x: isinstance(x, list))
        for leaf in jax.tree.leaves(leaves):
            if leaf.dtype.kind not in "biuf" and leaf.dtype.kind != "V":  # V: bfloat16 and such
                raise TypeError(
                    f"{self.name} has items of {_shown(leaves)}, but the inputs of an example are "
                    "arrays of numbers. Say which part of an item they are with `inputs=`, such as "
                    'inputs="image", or with a function of an item.'
                )
        return leaves

    def _taken(self, name: str, part: Part, item: Any) -> Any:
        if callable(part):
            return part(item)
        try:
            return item[part]
        except (KeyError, IndexError, TypeError) as error:
            keys = f"the keys {', '.join(map(repr, item))}" if isinstance(item, Mapping) else "none"
            kind = f"{type(item).__name__} with {keys}" if keys != "none" else type(item).__name__
            raise TypeError(
                f"{self.name} has items that are a {kind}, of which {name}={part!r} is no part. "
                f"Say where it is with `{name}=`: a key, a number or a function of an item"
                f"{'' if name == 'inputs' else '; or pass `labels`, an array [n]'}."
            ) from error


class PairRows(ItemRows):
    """Rows of a random-access source: pairs (inputs, target) of its items."""

    def __init__(self, source: RandomAccess, inputs: Part, target: Part, threads: int, what: str):
        """Take a source; see `HostTrainingRuns.create`."""
        self._target_part = target
        super().__init__(source, inputs, threads, what)

    def _inputs(self, item: Any) -> Any:
        part = self._target_part
        if part is None:
            part = "label" if isinstance(item, Mapping) else 1
        target = np.asarray(self._taken("target", part, item))
        if target.dtype.kind not in "biuf" and target.dtype.kind != "V":
            raise TypeError(
                f"{self.name} has a target of {target.dtype}{list(target.shape)}, but targets are "
                'numbers. Say where they are with `target=`, such as target="label", or pass '
                "`targets`, an array [n]."
            )
        return super()._inputs(item), target


class BesideRows(Rows):
    """Rows of a source and of an array beside it: pairs (inputs, target)."""

    def __init__(self, inputs: Rows, targets: ArrayRows):
        """Take what reads the inputs and what reads the targets, of equal length."""
        self._parts = inputs, targets
        self.name, self.count = inputs.name, inputs.count
        self.example = inputs.example, targets.example

    def read(self, rows: np.ndarray) -> Any:
        return tuple(part.read(rows) for part in self._parts)


def pairs_of(
    what: str, source: Any, targets: Any, inputs: Part, target: Part, threads: int
) -> Rows:
    """Return what reads pairs (inputs, target) by row; see `HostTrainingRuns.create`.

    Raises:
      TypeError: if it is neither arrays nor a random-access source, or its parts are not found.
      ValueError: if arrays come without targets, or there are not as many targets as rows.
    """
    own = None if targets is None else ArrayRows(one_array(what, "targets", targets, "[n]"), what)
    if _are_arrays(source):
        if own is None:
            raise ValueError(
                f"`{what}` got arrays and no targets. Pass `targets`, an array [n] with the target "
                "of each row."
            )
        rows: Rows = ArrayRows(source, what)
    else:
        _check_rows(what, source)
        if own is None:
            return PairRows(source, inputs, target, threads, what)
        rows = ItemRows(source, inputs, threads, what)
    if rows.count != own.count:
        raise ValueError(
            f"`{what}` got {rows.count:,} inputs and {own.count:,} targets, but every example is "
            "one of each. Pass inputs [n, ...] and targets [n]."
        )
    return BesideRows(rows, own)


def rows_and_labels(
    source: Any,
    labels: Any,
    inputs: Part = None,
    label: Part = None,
    threads: int = 1,
    progress: bool = True,
) -> tuple[Rows, Any]:
    """Return (the inputs by row, the labels [n]) of a source; see `HostFewShot.create`.

    Raises:
      TypeError: if it is neither arrays nor a random-access source, or its parts are not found.
      ValueError: if arrays come without labels.
    """
    if _are_arrays(source):
        if labels is None:
            raise ValueError(
                "`HostFewShot` got arrays and no labels. Pass `labels`, an array [n] of the class "
                "of each row."
            )
        return ArrayRows(source), labels
    _check_rows("HostFewShot", source)
    rows = ItemRows(source, inputs, threads)
    return rows, rows.labels(label, progress) if labels is None else labels


def _check_rows(what: str, source: Any) -> None:
    """Raise TypeError unless a source can be read by row."""
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"`{what}` reads its examples by row, from arrays or from a source with "
            f"`len(source)` and `source[i]`, but got a {type(source).__name__}, which has no rows. "
            "A task reads rows from anywhere, in an order that its key decides, so a stream (a "
            "generator, a loader) is read once, into an array or a `numpy.memmap`; of a loader, "
            "pass its dataset."
        )


def _are_arrays(source: Any) -> bool:
    return isinstance(source, np.ndarray | jax.Array) or (
        isinstance(source, Mapping | tuple) and all(map(_is_array, jax.tree.leaves(source)))
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim >= 1


def _shown(inputs: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        for path, leaf in leaves
    )
