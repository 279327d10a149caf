"""Tasks of unequal size in one batch: padded to one shape, with a mask.

The targets of a padded set are `metalearn.Masked`, and the objectives of `metalearn.algorithms`
take the mean over the examples that count. The padding repeats examples of the same set, so that a
network sees no foreign input. What ties the examples of a batch together sees them twice: the batch
statistics of batch normalisation are those of the padded set. Networks without it give each task
the loss and the meta-gradient that it has by itself.

In a batch of 3-way and 7-way tasks the network has 7 outputs; a 3-way task uses the labels 0, 1, 2,
and learns in its inner loop that the others do not occur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import integers
from metalearn._utils.fields import check_fields
from metalearn.datasets.few_shot import FewShot
from metalearn.datasets.host_few_shot import HostFewShot
from metalearn.tasks import Tasks
from metalearn.unroll import Episode, Masked

SIZES = 2**31 - 2  # folded into a task's key: it draws the sizes of the task


def padded(episodes: Sequence[Episode]) -> list[Episode]:
    """Return episodes whose sets are padded to the largest, by repeating their examples.

    Args:
      episodes: support and query are pairs (inputs [n, ...], targets [n, ...]), n of any size.

    Returns:
      The same with leaves [most, ...] and `Masked` targets.

    Raises:
      ValueError: if a set is no such pair, or has no example.
    """
    sizes = [(_size(e.support), _size(e.query)) for e in episodes]
    most = [max(column) for column in zip(*sizes, strict=True)]
    return [Episode(*(_padded(part, n) for part, n in zip(e, most, strict=True))) for e in episodes]


def _size(part: Any) -> int:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(part)}
    pair = isinstance(part, tuple) and len(part) == 2 and not isinstance(part[1], Masked)
    if not (pair and len(sizes) == 1 and (size := next(iter(sizes)))) or not size[0]:
        raise ValueError(
            "Episodes are padded whose support and query are pairs (inputs [n, ...], targets "
            "[n, ...]) of the same n, one or more. Others are made equal, or masked, by hand: "
            "`metalearn.Masked(targets, mask)`."
        )
    return int(size[0])


def _padded(part: Any, most: int) -> Any:
    size = _size(part)
    rows = np.arange(most)
    inputs, targets = jax.tree.map(lambda leaf: np.asarray(leaf)[rows % size], part)
    return inputs, Masked(targets, rows < size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class UnequalFewShot(Tasks):
    """Few-shot tasks of varying sizes in one shape. Create it with `UnequalFewShot.create`.

    Args:
      tasks: those of the largest sizes.
      fewest_ways: the fewest classes of a task.
      fewest_shots: the fewest support examples per class.
    """

    tasks: Any
    fewest_ways: int = dataclasses.field(metadata={"static": True})
    fewest_shots: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls, tasks: FewShot | HostFewShot, *, fewest_ways: int, fewest_shots: int
    ) -> UnequalFewShot:
        """Make tasks whose ways and shots are drawn uniformly, anew for every task.

        Args:
          tasks: of the most ways and shots; every task has `tasks.queries` queries per class.
          fewest_ways: the fewest classes of a task.
          fewest_shots: the fewest support examples per class.

        Raises:
          ValueError: if a size is not an integer, below 1, or above that of `tasks`.
          TypeError: if `tasks` are not `FewShot` or `HostFewShot`.
        """
        if not isinstance(tasks, FewShot | HostFewShot):
            raise TypeError(
                f"`UnequalFewShot` takes tasks of `FewShot` or `HostFewShot`, of the largest "
                f"sizes, not a {type(tasks).__name__}. Episodes of your own are padded by "
                "`GivenTasks.create(episodes, pad=True)`."
            )
        integers("UnequalFewShot", fewest_ways=fewest_ways, fewest_shots=fewest_shots)
        for name, least, most in (
            ("ways", fewest_ways, tasks.ways),
            ("shots", fewest_shots, tasks.shots),
        ):
            if not 1 <= least <= most:
                raise ValueError(
                    f"`UnequalFewShot(fewest_{name}={least})`: it is from 1 to {most}, the {name} "
                    "of the tasks, which are the largest."
                )
        return cls(tasks, int(fewest_ways), int(fewest_shots))

    @property
    def needs_fetch(self) -> bool:
        """Whether the largest tasks are on the host."""
        return self.tasks.needs_fetch

    def fetch(self, keys: jax.Array, first: int) -> Tasks:
        """Return the same of the largest tasks of `keys`, read on the host."""
        sizes = self.tasks.ways, self.tasks.shots, self.tasks.queries
        return _Smaller(self.tasks.fetch(keys, first), (self.fewest_ways, self.fewest_shots), sizes)

    def label_range(self) -> tuple[int, int]:
        """Return (0, the most ways - 1)."""
        return self.tasks.label_range()

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task: the shapes of `tasks.sample(key)`, and `Masked` targets."""
        sizes = self.tasks.ways, self.tasks.shots, self.tasks.queries
        return _Smaller(self.tasks, (self.fewest_ways, self.fewest_shots), sizes).sample(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Smaller(Tasks):
    """Tasks of drawn sizes; `sizes` are (ways, shots, queries) of `tasks`."""

    tasks: Any
    fewest: tuple[int, int] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def sample(self, key: jax.Array) -> Episode:
        most_ways, most_shots, queries = self.sizes
        ways_key, shots_key = jax.random.split(jax.random.fold_in(key, SIZES))
        ways = jax.random.randint(ways_key, (), self.fewest[0], most_ways + 1)
        shots = jax.random.randint(shots_key, (), self.fewest[1], most_shots + 1)

        def kept(per_class: int, most: jax.Array | int) -> jax.Array:
            classes = jnp.repeat(jnp.arange(most_ways), per_class)
            return (classes < ways) & (jnp.tile(jnp.arange(per_class), most_ways) < most)

        def masked(part: Any, mask: jax.Array) -> Any:
            # What is left out is replaced by examples of the task, one after the other.
            order = jnp.argsort(~mask, stable=True)
            rows = jnp.where(mask, jnp.arange(mask.size), order[jnp.arange(mask.size) % mask.sum()])
            inputs, labels = jax.tree.map(lambda leaf: leaf[rows], part)
            return inputs, Masked(labels, mask)

        episode = self.tasks.sample(key)
        return Episode(
            masked(episode.support, kept(most_shots, shots)),
            masked(episode.query, kept(queries, queries)),
        )
