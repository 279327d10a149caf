"""Checkpoints inside an outer step that takes several programs: the newest counts.

They have a place of their own, since the numbers of the others are outer steps. Here they are
numbered as they come.
"""

from __future__ import annotations

import pathlib
from typing import Any

from metalearn.checkpoints.checkpoint_store import Store, UnreadableError
from metalearn.checkpoints.record import Record, trouble_within


class Inside:
    """The newest save inside an outer step, in one directory, which is made when it is needed."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._store = self._open() if directory.is_dir() else None

    def _open(self) -> Store:
        return Store(self._directory, keep=2, best=None, trouble=trouble_within)

    def save(self, state: Any, record: Record) -> None:
        """Begin to save, once the save before has ended (`wait`). DiskError: the disk refused."""
        self._store = self._store or self._open()
        self._store.save((self._store.last() or 0) + 1, state, record, {})

    def record(self) -> Record | None:
        """Return the record of the newest save; None where there is none that can be read."""
        while self._store is not None and (newest := self._store.newest()) is not None:
            try:
                return self._store.read_record(newest)
            except UnreadableError as error:
                self.set_aside(error)
        return None

    def set_aside(self, error: Exception) -> None:
        """Pass over the newest save, one that `record` returned, for it cannot be read."""
        store, newest = self.newest()
        store.set_aside(newest, error)

    @property
    def damage(self) -> str:
        """Say what is wrong with saves that cannot be read; "" where all can."""
        damaged = self._store.damaged if self._store else {}
        return "; ".join(damaged.values())

    def newest(self) -> tuple[Store, int]:
        """Return (where the newest save is, its number), of what `record` returned."""
        newest = self._store.newest() if self._store else None
        assert self._store is not None and newest is not None
        return self._store, newest

    def clear(self) -> None:
        """Delete what is there."""
        if self._store is not None:
            self._store.clear()

    def wait(self) -> None:
        """Wait for the last save to be whole; DiskError where the disk refused it."""
        if self._store is not None:
            self._store.wait()

    def close(self) -> None:
        """Close, whatever became of the last save."""
        if self._store is not None:
            self._store.close()
