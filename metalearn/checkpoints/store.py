"""Storage of checkpoints: Orbax, digests of its files, and damaged or unwritable disks.

A save begins now and is written in the background. When its files are complete, their digests
are written (`metalearn.checkpoints.digests`). A step whose files differ from their digests, or
whose record has another number, counts as damaged: it is not offered any more, and moved aside
when a new save may need its place.

Another process may read while a run trains: a listed step may be deleted before it is read, and
newer ones may appear. So the directory is listed again before a step that cannot be read counts
as damaged.

Checkpoints inside an outer step that is cut into segments have a directory of their own, since
the numbers of the others are outer steps: they are numbered in the order of saving, and the
newest counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line
from metalearn.checkpoints import digests
from metalearn.checkpoints.record import Record, problem_within

LISTINGS = 20  # how often a directory is listed again before a missing step counts as damaged

# (record, step) -> what is wrong with the record of a step; None: it is valid.
Problem = Callable[[Any, int], str | None]


class DiskError(OSError):
    """A checkpoint could not be written: the disk is full, or gone."""


class UnreadableError(ValueError):
    """A checkpoint is there and cannot be read."""


class Store:
    """The checkpoints in one directory, by outer step.

    Attributes:
      directory: of the checkpoints.
      damaged: what is wrong with each damaged step.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int,
        best: tuple[str, str] | None,
        problem: Problem,
    ):
        """Open or make a directory; `best`: ("max" or "min", the metric's name)."""
        # Imported with the first store: `import metalearn` does without Orbax.
        from metalearn.checkpoints import orbax_manager

        self._orbax = orbax_manager
        self.directory = directory
        self._problem = problem
        self.damaged: dict[int, str] = {}
        self._keep, self._best = keep, best
        self._manager = self._orbax.Manager(directory, keep, best)
        self._intact: set[int] = set()  # intact steps that were checked
        self._writing: threading.Thread | None = None
        self._failed = False  # whether a save of this process has failed
        self._listings = 0  # since a step was read

    def newest(self) -> int | None:
        """Return the newest intact step; None if there is none."""
        while True:
            for step in self.steps():
                if self.is_intact(step):
                    return step
                if self._lists_others():
                    break
            else:
                return None

    def steps(self) -> list[int]:
        """Return all steps, intact or damaged, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _lists_others(self) -> bool:
        """List the directory again; return whether another process has written new steps there.

        If it has not, the steps that were found to be damaged remain so.
        """
        if self._listings == LISTINGS or self._manager.is_saving_in_progress():
            return False
        before = set(self._manager.all_steps())
        self._manager.reload()
        now = set(self._manager.all_steps())
        if not now - before:
            return False
        self._listings += 1
        for step in before - now:
            self.damaged.pop(step, None)
            self._intact.discard(step)
        return True

    def mark_damaged(self, step: int, why: object) -> None:
        """Note that a step is damaged, unless another process has deleted it."""
        self._note(step, why)
        self._intact.discard(step)
        self._lists_others()

    def last(self) -> int | None:
        """Return the newest step, intact or damaged; None if there is none."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Return the intact step with the best metric, the newest of equals; None: no metrics."""
        while not all([self.is_intact(step) for step in self.steps()]):
            if not self._lists_others():
                break
        mode, name = self._best or ("max", "")
        intact = [step for step in self.steps() if self.is_intact(step)]
        judged = {step: (self._manager.metrics(step) or {}).get(name) for step in intact}
        sign = 1 if mode == "max" else -1
        scores = [(sign * value, step) for step, value in judged.items() if value is not None]
        return max(scores)[1] if scores else None

    def save(self, step: int, state: Any, record: Any, metrics: Mapping[str, float]) -> None:
        """Start to save, after the save before has ended (`wait`). DiskError: the disk refused."""
        plain = strict_json.plain(record)
        with _Disk(self):
            self._make_way(step)
            self._sweep()
            begun = self._manager.save_items(step, state, plain, self._judged(metrics))
        if not begun:
            raise ValueError(
                f"A checkpoint of outer step {step} cannot be written to {self.directory}, which "
                f"has one of step {self._manager.latest_step()}: another run's, by the number."
            )
        self._intact.add(step)
        if jax.process_index() == 0:
            self._writing = threading.Thread(target=self._write_digests, args=(step,), daemon=True)
            self._writing.start()

    def _judged(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
        """Return the metric for `best`; None if it was not evaluated or is not finite."""
        name = self._best[1] if self._best else ""
        return {name: metrics[name]} if math.isfinite(metrics.get(name, math.nan)) else None

    def read_record(self, step: int) -> Any:
        """Return the JSON record of a step; UnreadableError if it is not valid."""
        try:
            record = strict_json.restored(_read(lambda: self._manager.read_record(step)))
        except RecursionError as error:
            raise UnreadableError("its record is nested too deeply") from error
        if wrong := self._problem(record, step):
            raise UnreadableError(wrong)
        return record

    def read_state(self, step: int, shapes: Any) -> Any:
        """Return the arrays of a step, as a tree like `shapes`."""
        state = _read(lambda: self._manager.read_state(step, shapes))
        self._listings = 0
        return state

    def read_part(self, step: int, shapes: Any) -> Any:
        """Return the arrays of some fields of a step, as a tree like `shapes`."""
        state = _read(lambda: self._manager.read_part(step, shapes))
        self._listings = 0
        return state

    def read_nodes(self, step: int) -> dict[str, str]:
        """Return what `nodes` says of the state of a step, without reading its arrays."""
        return _read(lambda: self._manager.read_nodes(step))

    def nodes(self, state: Any) -> dict[str, str]:
        """Return the type and shape of each array as Orbax stores it, and each empty node."""
        return self._orbax.nodes(state)

    def clear(self) -> None:
        """Delete every checkpoint."""
        for step in self._manager.all_steps():
            self._manager.delete(step)
        self._intact.clear()

    def wait(self) -> None:
        """Wait until the last save is complete; DiskError if the disk refused it."""
        with _Disk(self):
            self._finish()

    def close(self) -> None:
        """Close, whether or not the last save has succeeded."""
        self._manager.close()
        self._sweep()

    def reopen(self) -> None:
        """Open the directory again after a save that failed."""
        with contextlib.suppress(Exception):  # closing may raise the same error again
            self._manager.close()
        self._manager = self._orbax.Manager(self.directory, self._keep, self._best)
        self._failed = True

    def _sweep(self) -> None:
        """Delete temporary files of failed saves: no other process saves here."""
        if self._failed and jax.process_index() == 0:
            for left in self.directory.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write_digests(self, step: int) -> None:
        """Wait until a step's files are complete, then write their digests; none if it failed."""
        while self._manager.is_saving_in_progress():
            time.sleep(0.02)
        if (self.directory / str(step)).is_dir():
            digests.write(self.directory / str(step))

    def is_intact(self, step: int) -> bool:
        """Return whether a step's files and record are as they were written."""
        if step in self.damaged:
            return False
        if step not in self._intact:
            if (wrong := self._wrong(step)) is not None:
                self._note(step, wrong)
                return False
            self._intact.add(step)
        return True

    def _wrong(self, step: int) -> str | None:
        place = self.directory / str(step)
        if wrong := digests.problem(place):
            return wrong
        if (place / "metrics").exists() and self._manager.metrics(step) is None:
            return "its metrics cannot be read"
        try:
            self.read_record(step)
        except UnreadableError as error:
            return str(error)
        return None

    def _note(self, step: int, why: object) -> None:
        there = (self.directory / str(step)).is_dir()
        self.damaged[step] = str(why) if there else "it is gone"

    def _make_way(self, step: int) -> None:
        """Rename damaged steps, and whatever occupies the path of a new one."""
        listed = set(self._manager.all_steps())
        aside = {*self.damaged, *({step} - listed)}
        aside = {each for each in aside if os.path.lexists(self.directory / str(each))}
        linked = {each for each in listed - aside if (self.directory / str(each)).is_symlink()}
        if not (self.damaged or aside or linked):
            return
        if jax.process_index() == 0:
            for each in aside:
                place = self.directory / str(each)
                place.rename(self.directory / f"damaged-{each}-{time.time_ns()}")
            for each in linked:
                _copy_in_place(self.directory / str(each))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        self.damaged.clear()


class _Disk:
    """Turns the errors of a failing disk into a DiskError, and reopens the store."""

    def __init__(self, store: Store):
        self.store = store

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if jax.process_count() > 1:  # other processes may have no error: let this one end the run
            return
        if error is not None and disk.at_fault(error):
            self.store.reopen()
            raise DiskError(first_line(error)) from error


def _read(read: Callable[[], Any]) -> Any:
    """Return what `read` reads; UnreadableError if Orbax or tensorstore fail on damaged files."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableError(first_line(error)) from error


def _copy_in_place(place: pathlib.Path) -> None:
    """Replace a link by a copy of its target, which Orbax may then delete."""
    aside = place.with_name(f"linked-{place.name}-{time.time_ns()}")
    try:
        shutil.copytree(place, aside)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    place.unlink()
    aside.rename(place)


class SegmentCheckpoints:
    """Checkpoints inside an outer step, in a directory that is made when it is needed."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._store = self._open() if directory.is_dir() else None

    def _open(self) -> Store:
        return Store(self._directory, keep=2, best=None, problem=problem_within)

    def save(self, state: Any, record: Record) -> None:
        """Start to save, after the save before has ended (`wait`). DiskError: the disk refused."""
        self._store = self._store or self._open()
        self._store.save((self._store.last() or 0) + 1, state, record, {})

    def record(self) -> Record | None:
        """Return the record of the newest readable checkpoint; None if there is none."""
        while self._store is not None and (newest := self._store.newest()) is not None:
            try:
                return self._store.read_record(newest)
            except UnreadableError as error:
                self.mark_damaged(error)
        return None

    def mark_damaged(self, error: Exception) -> None:
        """Note that the newest checkpoint, whose record `record` returned, cannot be read."""
        store, newest = self.newest()
        store.mark_damaged(newest, error)

    @property
    def damage(self) -> str:
        """Return what is wrong with unreadable checkpoints; "" if all can be read."""
        damaged = self._store.damaged if self._store else {}
        return "; ".join(damaged.values())

    def newest(self) -> tuple[Store, int]:
        """Return (store, number) of the newest checkpoint, whose record `record` returned."""
        newest = self._store.newest() if self._store else None
        assert self._store is not None and newest is not None
        return self._store, newest

    def clear(self) -> None:
        """Delete all checkpoints."""
        if self._store is not None:
            self._store.clear()

    def wait(self) -> None:
        """Wait until the last save is complete; DiskError if the disk refused it."""
        if self._store is not None:
            self._store.wait()

    def close(self) -> None:
        """Close, whether or not the last save has succeeded."""
        if self._store is not None:
            self._store.close()
