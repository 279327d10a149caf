"""Several distributions over tasks at once: a task has one of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from metalearn.tasks import Tasks
from metalearn.unroll import Episode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SideBySide(Tasks):
    """One task of each, under its name, for `metalearn.algorithms.Together`. A pytree."""

    parts: Mapping[str, Tasks]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping):
            raise TypeError(
                f"`SideBySide(parts={self.parts!r})`: it is a dictionary of distributions over "
                f"tasks by name, not a {type(self.parts).__name__}."
            )
        if not self.parts:
            raise ValueError("`SideBySide` takes at least one distribution: {name: tasks}.")

    def sample(self, key: jax.Array) -> Episode:
        """Draw one of each: support = {name: support}, query = {name: query}."""
        keys = jax.random.split(key, len(self.parts))
        drawn = {n: self.parts[n].sample(k) for n, k in zip(sorted(self.parts), keys, strict=True)}
        return Episode(
            {n: e.support for n, e in drawn.items()}, {n: e.query for n, e in drawn.items()}
        )
