"""Tasks that exist already: a list of episodes, or a stream of them.

A distribution draws a task by a key. Where the tasks are there already, a run visits them in an
order: outer step n of B tasks takes the tasks n B .. n B + B - 1, pass after pass. A `Trainer`
says how many tasks come before a step (`Tasks.fetch`), so which tasks a step reads depends on its
number alone.

`GivenTasks` are a list, on the device: visited once in every pass, in their order or shuffled anew
for each pass, repeatable and resumable. A `TaskStream` reads episodes as they come, from a
generator or a loader. It cannot go back, so it serves neither checkpoints nor repeated evaluations,
unless it has a method `seek(number)`, after which its next episode is that of this number.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.fields import check_fields
from metalearn.datasets.arrays import least_and_largest
from metalearn.datasets.unequal import padded
from metalearn.tasks import Fetched, Tasks, number_of, only_if
from metalearn.unroll import Episode

BATCHES = 8  # of a stream, whose episodes are held for those who ask again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GivenTasks(Tasks):
    """A finite list of episodes, on the device. Create it with `GivenTasks.create(episodes)`.

    `Trainer.fit` and `Trainer.evaluate` visit each once per pass; an evaluation of as many tasks as
    there are visits each once. `sample(key)` by itself, and truncated unrolls, draw one at random.

    Args:
      episodes: leaves [tasks, ...].
      count: the number of tasks.
      seed: of the order of each pass; None: as they are.
    """

    episodes: Episode = dataclasses.field(repr=False)
    count: int = dataclasses.field(metadata={"static": True})
    seed: int | None = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def create(
        cls, episodes: Iterable[Any], *, pad: bool = False, shuffle: int | None = None
    ) -> GivenTasks:
        """Put episodes on the device, stacked.

        Args:
          episodes: each a `metalearn.Episode`, or a pair (support, query); support and query are
            (inputs [n, ...], targets [n, ...]) or any other pytree that the algorithm reads.
          pad: pad support and query sets of unequal size to the largest, with `metalearn.Masked`
            targets; they are then pairs (inputs, targets).
          shuffle: a seed, by which each pass has an order of its own; None: the order of the list.

        Raises:
          ValueError: if there are none, or they differ in structure, type or shape.
          TypeError: if one is no episode.
        """
        listed = [as_episode("GivenTasks", i, item) for i, item in enumerate(episodes)]
        if not listed:
            raise ValueError("`GivenTasks` got no episodes. Pass a list of at least one.")
        if pad:
            listed = padded(listed)
        for i, episode in enumerate(listed):
            if _kind(episode) != _kind(listed[0]):
                raise ValueError(
                    "`GivenTasks` got episodes of unequal shapes: episode 0 is "
                    f"{_shown(listed[0])} and episode {i} is {_shown(episode)}, but they become "
                    "one array. Pass pad=True for sets of unequal size; give all one type and "
                    "structure."
                )
        stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *listed)
        return cls(stacked, len(listed), None if shuffle is None else int(shuffle))

    @property
    def needs_fetch(self) -> bool:
        """True: a trainer visits the tasks in passes."""
        return True

    @property
    def fetches_keys(self) -> bool:
        """False: `fetch` goes by how many tasks were visited."""
        return False

    def label_range(self) -> tuple[int, int] | None:
        """Return the least and the largest target; None for a regression."""
        parts = [part for part in self.episodes if isinstance(part, tuple) and len(part) > 1]
        return least_and_largest(*(part[1] for part in parts))

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task, uniformly."""
        number = jax.random.randint(key, (), 0, self.count)
        return jax.tree.map(lambda leaf: leaf[number], self.episodes)

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Return the numbers [count] of the tasks that come after `first` others, int32."""
        visits = [divmod(visit, self.count) for visit in range(first, first + count)]
        orders = {number: self._order(number) for number, _ in visits}
        return np.asarray([orders[number][place] for number, place in visits], np.int32)

    def _order(self, number: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.count)
        return np.random.default_rng([abs(self.seed), number]).permutation(self.count)

    def fetch(self, keys: jax.Array, first: int) -> Tasks:
        """Return the tasks that come after `first` others, one for each key [n]."""
        return _Visited(self.episodes, keys, jnp.asarray(self.numbers(first, keys.shape[0])))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Visited(Tasks):
    """The tasks of some keys: leaves of `episodes` [tasks, ...], keys [n], their numbers [n]."""

    episodes: Episode = dataclasses.field(repr=False)
    keys: jax.Array = dataclasses.field(repr=False)
    numbers: jax.Array = dataclasses.field(repr=False)

    def sample(self, key: jax.Array) -> Episode:
        position, present = number_of(self.keys, key)
        number = self.numbers[position]
        return jax.tree.map(lambda leaf: only_if(present, leaf[number]), self.episodes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TaskStream(Tasks):
    """Episodes as they come, from a generator, a loader or any other iterable.

    A pytree without leaves. `Trainer.fit` reads ahead in a thread. Episodes cannot be read a second
    time, so `checkpoints=` is refused and so is a second evaluation on the same stream, unless the
    iterable has a method `seek(number)`. An iterable that can be iterated over again (a loader, a
    list) begins anew at its end; the end of an iterator is an error.

    Args:
      episodes: an iterable of episodes, each as `GivenTasks.create` takes them, all of one shape.
    """

    episodes: Iterable[Any] = dataclasses.field(metadata={"static": True}, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.episodes, _Stream):  # jit makes an instance of the same stream
            object.__setattr__(self, "episodes", _Stream(self.episodes))

    @property
    def _stream(self) -> _Stream:
        assert isinstance(self.episodes, _Stream)
        return self.episodes

    @property
    def needs_fetch(self) -> bool:
        """True."""
        return True

    @property
    def fetches_keys(self) -> bool:
        """False: `fetch` reads what comes next."""
        return False

    @property
    def resumable(self) -> bool:
        """Whether the iterable can seek."""
        return self._stream.seek is not None

    def sample(self, key: jax.Array) -> Episode:
        """Raise an error when it runs: a stream has no task for a key."""

        def refuse(_: Any) -> Any:
            raise TypeError(
                "A `TaskStream` has its tasks in one order, and draws none by a key inside a "
                "program. `Trainer.fit` and `Trainer.evaluate` read it before their programs run, "
                "with full unrolls; for truncated unrolls, `task_gradient` and programs of your "
                "own pass the episodes to `GivenTasks.create`."
            )

        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)
            ),
            self._stream.example,
        )
        data = jax.random.key_data(key)
        return jax.pure_callback(refuse, shapes, data, vmap_method="broadcast_all")

    def fetch(self, keys: jax.Array, first: int) -> Fetched:
        """Read the episodes that come after `first` others, one for each key [n]."""
        listed = self._stream.read(first, keys.shape[0])
        rows = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *listed)
        return Fetched(keys, rows, unchanged)


def unchanged(episode: Any) -> Any:
    """Return an episode unchanged."""
    return episode


class _Stream(Iterable[Any]):
    """An iterable of episodes, read in order; it compares by identity."""

    def __init__(self, episodes: Any):
        if not isinstance(episodes, Iterable):
            raise TypeError(
                f"`TaskStream` reads an iterable of episodes, such as a generator or a loader, not "
                f"a {type(episodes).__name__}."
            )
        self._source, self._iterator = episodes, iter(episodes)
        self.seek: Callable[[int], Any] | None = getattr(episodes, "seek", None)
        self._again = not isinstance(episodes, Iterator)
        self._lock = threading.Lock()
        self._held: collections.OrderedDict[int, Episode] = collections.OrderedDict()
        self._position = 0
        self.example: Episode = self._at(0)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._source)

    def read(self, first: int, count: int) -> list[Episode]:
        """Return `count` episodes from the number `first` on."""
        with self._lock:
            listed = [self._at(number) for number in range(first, first + count)]
            while len(self._held) > BATCHES * count:
                self._held.popitem(last=False)
        return listed

    def _at(self, number: int) -> Episode:
        if number in self._held:
            return self._held[number]
        if number != self._position:
            if self.seek is None:
                raise ValueError(
                    f"A `TaskStream` stands at task {self._position}, and task {number} is asked "
                    "for: a stream cannot go back. An evaluation reads the same tasks every time, "
                    "and a run that goes on, or backs off, those of its step: give the iterable a "
                    "method `seek(number)`, or pass the episodes to `GivenTasks.create`."
                )
            self.seek(number)
            self._iterator, self._position = iter(self._source), number
        episode = as_episode("TaskStream", number, self._next())
        self._position += 1
        if number and _kind(episode) != _kind(self.example):
            raise ValueError(
                f"A `TaskStream` got episodes of unequal shapes: episode 0 is "
                f"{_shown(self.example)} and episode {number} is {_shown(episode)}, but the tasks "
                "of a step become one array. Pad them, with `metalearn.Masked` targets."
            )
        self._held[number] = episode
        return episode

    def _next(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            if self._again and self._position:
                self._iterator = iter(self._source)
                for item in self._iterator:
                    return item
        raise ValueError(
            f"A `TaskStream` ended after {self._position} tasks, and more are asked for: outer "
            "steps times tasks_per_step, and those of evaluations. Take fewer steps, let the "
            "generator go on, or pass the episodes to `GivenTasks.create`, which visits them again."
        )


def as_episode(what: str, number: int, item: Any) -> Episode:
    """Return an episode of arrays of NumPy; TypeError if the item is none.

    Args:
      what: reads it, for the message.
      number: of the episode.
      item: an `Episode`, or a pair (support, query).
    """
    if not (isinstance(item, tuple | list) and len(item) == 2):
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise TypeError(
            f"`{what}` takes episodes, but number {number} is a {type(item).__name__}{size}. An "
            "episode is `metalearn.Episode(support, query)`, or a pair: what the inner loop learns "
            "from, and what its result is judged on, each such as (inputs, targets)."
        )
    parts = (tuple(part) if isinstance(part, list) else part for part in item)
    episode = jax.tree.map(np.asarray, Episode(*parts), is_leaf=lambda x: isinstance(x, list))
    for leaf in jax.tree.leaves(episode):
        if leaf.dtype.kind in "OSUMm":
            raise TypeError(
                f"`{what}` got episode {number} with {leaf.dtype} in it, but episodes hold "
                "arrays of numbers. Number classes that have names from 0 on."
            )
    return episode


def _kind(episode: Episode) -> Any:
    leaves, treedef = jax.tree.flatten(episode)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _shown(episode: Episode) -> str:
    return ", ".join(
        f"{jax.tree_util.keystr(path)[1:]} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(episode)
    )
