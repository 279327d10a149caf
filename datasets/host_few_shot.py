"""N-way K-shot tasks whose examples stay on the host: larger than the device, or than memory.

`HostFewShot` draws the tasks that `FewShot` draws, with the same bits for the same key: which rows
a task reads is computed by the same function of the key and of the class sizes. Only the sizes of
the classes are on the device; the rows of the tasks of an outer step are read on the host, and sent
to the device in their stored type.

`Trainer.fit` knows the keys of all steps, so a thread reads the rows of the next two steps while
the device computes (`metalearn.training.prefetch`), and evaluations read a batch of tasks at a
time. Inside a program of your own, `sample(key)` calls back to the host and waits for the rows:
correct, but slower.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn.datasets.class_index import label_array
from metalearn.datasets.few_shot import (
    Scales,
    check_scale,
    draw_indices,
    episode_of,
    support_first,
)
from metalearn.datasets.sources import Part, Rows, rows_and_labels
from metalearn.datasets.task_sizes import check_classes, check_sizes
from metalearn.tasks import Fetched, Tasks
from metalearn.unroll import Episode


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the rows of a task become its episode: a function of rows, equal by value.

    Args:
      ways: classes in a task.
      shots: support examples per class.
      queries: query examples per class.
      scale: for each array of an example; see `FewShot`.
    """

    ways: int
    shots: int
    queries: int
    scale: Scales

    def __call__(self, inputs: Any) -> Episode:
        """Return the episode of inputs with leaves [ways * (shots + queries), ...]."""
        return episode_of(inputs, self.ways, self.shots, self.queries, self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class RowsByClass:
    """The rows of a source, ordered by class. It compares by identity.

    Args:
      rows: reads the inputs of the examples.
      order: [n] int64, the rows ordered by class.
      starts: [classes] int64, where the rows of each class begin in `order`.
      sizes: [classes] int32, the number of rows of each class: `HostFewShot.counts` on the host,
        so that a fetch runs no program on the devices of a mesh.
    """

    rows: Rows
    order: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def read(self, classes: np.ndarray, picks: np.ndarray) -> Any:
        """Return the inputs of examples: leaves [..., k, ...].

        Args:
          classes: [..., k], of each example.
          picks: [..., k], its number in the class.
        """
        classes, picks = np.asarray(classes), np.asarray(picks)
        rows = self.order[self.starts[classes] + picks]
        inputs = self.rows.read(rows.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape, *leaf.shape[1:]), inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HostFewShot(Tasks):
    """N-way K-shot tasks of examples on the host. Create it with `HostFewShot.create`.

    A pytree whose only leaf is `counts`. Its episodes are those of `FewShot` with the same labels
    and the same key, bit for bit.

    Args:
      counts: [classes] int32, the number of examples of each class.
      table: the rows of the source, by class.
      arrangement: how the rows of a task become its episode.
    """

    counts: jax.Array = dataclasses.field(repr=False)
    table: RowsByClass = dataclasses.field(metadata={"static": True}, repr=False)
    arrangement: Arrangement = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls,
        source: Any,
        labels: Any = None,
        *,
        ways: int,
        shots: int,
        queries: int,
        scale: Any = None,
        inputs: Part = None,
        label: Part = None,
        threads: int = 1,
        progress: bool = True,
    ) -> HostFewShot:
        """Make tasks of a source, after checking that they can be drawn from it.

        The labels are read once, now; inputs are read when a task needs them.

        Args:
          source: arrays [n, ...] (NumPy's, a `numpy.memmap`, a pytree of them), or an object with
            `len(source)` and `source[i]`, whose items are pairs (input, label) or dictionaries;
            see `metalearn.datasets.sources`.
          labels: [n] integers or names; None: they are read from the items of the source, all of
            which are read once for it.
          ways: classes in a task.
          shots: support examples per class.
          queries: query examples per class.
          scale: as of `FewShot.from_arrays`.
          inputs: which part of an item the inputs are: a key, a number, or a function of an item.
            None: the first of a pair; all of a dictionary but its "label".
          label: likewise for the label; None: the second of a pair, "label" of a dictionary.
          threads: threads that read items, where the source takes it (decoding of images).
          progress: show a progress bar while labels are read.

        Raises:
          ValueError: if there are not as many labels as rows, or one class only; and as
            `FewShot.create`.
          TypeError: if the source has no rows, or items without the parts that are asked for.
        """
        rows, labels = rows_and_labels(source, labels, inputs, label, threads, progress)
        labels = label_array("HostFewShot", labels)
        if labels.shape != (rows.count,):
            raise ValueError(
                f"`HostFewShot` got a source of {rows.count:,} rows and labels of shape "
                f"{list(labels.shape)}, but every row has one label: pass labels [n]."
            )
        names, classes = np.unique(labels, return_inverse=True)
        sizes = np.bincount(classes)
        check_classes("HostFewShot", names, sizes, shots, queries)
        check_sizes(sizes, ways, shots, queries)
        scales = check_scale(rows.example, scale, 0)
        order = np.argsort(classes, kind="stable")
        table = RowsByClass(rows, order, np.cumsum(sizes) - sizes, sizes.astype(np.int32))
        shape = Arrangement(int(ways), int(shots), int(queries), scales)
        return cls(jnp.asarray(sizes, jnp.int32), table, shape)

    @property
    def ways(self) -> int:
        """Classes in a task."""
        return self.arrangement.ways

    @property
    def shots(self) -> int:
        """Support examples per class."""
        return self.arrangement.shots

    @property
    def queries(self) -> int:
        """Query examples per class."""
        return self.arrangement.queries

    @property
    def needs_fetch(self) -> bool:
        """True."""
        return True

    def label_range(self) -> tuple[int, int]:
        """Return (0, ways - 1)."""
        return 0, self.arrangement.ways - 1

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task: the episode of `FewShot.sample`.

        Inside jit the program calls back to the host, and waits for the rows.
        """
        positions = _positions(key, self.counts, self.arrangement)
        count = positions[0].shape[0]

        def leaf(stored: Any) -> jax.ShapeDtypeStruct:
            kind = jax.dtypes.canonicalize_dtype(stored.dtype)
            return jax.ShapeDtypeStruct((count, *stored.shape), kind)

        shapes = jax.tree.map(leaf, self.table.rows.example)

        def read(classes: np.ndarray, picks: np.ndarray) -> Any:
            inputs = self.table.read(classes, picks)
            return jax.tree.map(lambda x, s: x.astype(s.dtype, copy=False), inputs, shapes)

        inputs = jax.pure_callback(read, shapes, *positions, vmap_method="broadcast_all")
        return self.arrangement(inputs)

    def fetch(self, keys: jax.Array, first: int = 0) -> Fetched:
        """Read the rows of the tasks that `keys` [n] draw, and send them to the device.

        Which rows they are depends on the keys alone, and not on `first`.
        """
        del first
        positions = _all_positions(keys, self.table.sizes, self.arrangement)
        inputs = self.table.read(*jax.device_get(positions))
        return Fetched(keys, jax.tree.map(jnp.asarray, inputs), self.arrangement)


def _positions(
    key: jax.Array, counts: jax.Array, shape: Arrangement
) -> tuple[jax.Array, jax.Array]:
    """Return (classes, numbers in the class) of the examples of a task, [examples] int32."""
    indices = draw_indices(key, counts, shape.ways, shape.shots + shape.queries)
    return support_first(*indices, shape.shots)


@functools.partial(jax.jit, static_argnames="shape")
def _all_positions(keys: jax.Array, counts: Any, shape: Arrangement) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(lambda key: _positions(key, counts, shape))(keys)
