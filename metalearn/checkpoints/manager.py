"""Checkpoints: the whole of a run, and a record of what it was made of.

A checkpoint holds the train state (eta, outer optimizer, key, step, inner runs between two
truncations) and a record (`metalearn.checkpoints.record`). A save is written aside and renamed,
so a kill at any moment leaves the one before, and it is written beside the training. Loading
runs no code. The newest few are kept, and the best if there is a metric to tell.

An outer step that is taken in segments can be saved between two of them, in `within/`: the
newest of these counts where it is of a later moment than the newest whole step.

A checkpoint that is damaged is passed over for the one before it. A disk that is full, or
gone, does not end the run: the save is left out, and said so.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import at_least, is_integer
from metalearn.checkpoints import record as run_record
from metalearn.checkpoints.record import ChangedConfigError, OtherArraysError, Record
from metalearn.checkpoints.store import DiskError, Inside, Store, UnreadableError
from metalearn.sharding.distributed import say
from metalearn.train_state import TrainState

__all__ = ["ChangedConfigError", "Checkpoints", "DamagedError", "OtherArraysError"]


class DamagedError(ValueError):
    """None of the checkpoints that a run has kept can be read."""


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        every: int = 100,
        keep: int = 2,
        best: str | None = None,
        allow_change: bool = False,
        within: int = 0,
    ):
        """Open or make a directory.

        Args:
          directory: where they are.
          config: of the run, as JSON; a run is resumed with the one it was started with.
          every: outer steps from one to the next.
          keep: how many of the newest are kept.
          best: keep one more, the best by an evaluated metric: "max eval/accuracy" or "min
            eval/loss". A checkpoint is then written at every evaluation, too.
          allow_change: resume whatever the config.
          within: segments from one to the next inside an outer step, where the trainer has
            segments; 0: none, but where the run is asked to stop.
        """
        at_least("Checkpoints", 0, every=every, within=within)
        if not is_integer(keep) or keep < 1:
            raise ValueError(f"A run keeps at least its newest checkpoint, not {keep} of them.")
        self.directory = pathlib.Path(directory).absolute()
        self.config = strict_json.loads(strict_json.dumps(dict(config or {})))
        self.every, self.best, self.allow_change = every, best or None, allow_change
        self.within = within
        judged = _best(best) if best else None
        self._store = Store(self.directory, keep, judged, run_record.trouble)
        self._inside = Inside(self.directory / "within")
        self._told: set[int] = set()  # damaged steps that were spoken of
        self._writes = False

    def save(
        self,
        state: TrainState,
        step: int,
        loggers: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save; the write goes on beside the training.

        `metrics` are those evaluated at this step; `best` is one of them.
        """
        record = run_record.record(step, self.config, loggers, state)
        self._save(lambda: self._store.save(step, state, record, metrics or {}))

    def save_within(
        self, state: TrainState, step: int, inner_step: int, loggers: Mapping[str, Any]
    ) -> None:
        """Begin to save a run that stands inside the outer step after `step`."""
        record = run_record.record(step, self.config, loggers, state) | {"inner_step": inner_step}
        self._save(lambda: self._inside.save(state, record))

    def _save(self, begin: Callable[[], None]) -> None:
        self._writes = True
        self.wait()
        self._drop_outdated()
        try:
            begin()
        except DiskError as error:
            self._refused(error)

    def within_at(self) -> tuple[int, int] | None:
        """Return (outer steps, inner steps) of the newest save inside a step, or None."""
        record = self._record_within()
        return None if record is None else (record["step"], record["inner_step"])

    def drop_within(self) -> None:
        """Forget what was saved inside outer steps."""
        self.wait()
        self._inside.clear()

    def _drop_outdated(self) -> None:
        """Forget what was saved inside outer steps that have ended, and are saved whole."""
        record = self._inside.record()
        if record is not None and record["step"] < (self._store.newest() or 0):
            self._inside.clear()

    def latest(self) -> int | None:
        """Return the outer step of the newest checkpoint that is whole; None where none was made.

        Raises:
          DamagedError: where there are some, and all are damaged.
        """
        newest, damaged = self._store.newest(), self._store.damaged
        self._tell("falling back to the one before")
        if damaged and newest is None:
            found = "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items()))
            raise DamagedError(
                f"No checkpoint in {self.directory} can be read ({found}). Restore them from a "
                "copy, or train in another workdir."
            )
        return newest

    def _tell(self, way_out: str) -> None:
        """Speak of the damaged checkpoints, once of each."""
        damaged = self._store.damaged
        for step in sorted(damaged.keys() - self._told):
            say(
                f"The checkpoint of outer step {step} in {self.directory} is damaged "
                f"({damaged[step]}): {way_out}."
            )
        self._told = set(damaged)

    def best_step(self) -> int:
        """Return the outer step of the best checkpoint; ValueError where none was evaluated."""
        step = self._store.best() if self.best else None
        self._tell("going on without it")
        if step is None:
            raise ValueError(
                f"The run in {self.directory} has no best checkpoint: its config sets no "
                "`checkpoint_best`, such as 'max eval/accuracy', it was not evaluated yet, or the "
                "checkpoint is damaged."
            )
        return step

    def record(self, step: int | None = None) -> Record | None:
        """Return the record of a checkpoint, by default the newest; None where there is none."""
        while (at := self.latest() if step is None else step) is not None:
            try:
                found = self._store.read_record(at)
            except UnreadableError as error:
                if step is not None:
                    raise
                self._store.set_aside(at, error)
                continue
            run_record.check_schema(found, self.directory)
            return found
        return None

    def restore(
        self, state: TrainState, within: TrainState | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint as (state, record of the loggers), or (state, {}).

        Args:
          state: a state of the same structure and shapes, as `Trainer.init` returns it.
          within: the shapes of one inside an outer step, `Trainer.partway(tasks)`; None: what was
            saved there does not count.

        Raises:
          ChangedConfigError: if the checkpoint was written under another config; as an
            OtherArraysError where its arrays are not those of `state`, whatever is allowed.
          DamagedError: if no checkpoint can be read.
        """
        self.wait()
        if within is not None and (inside := self._restore_within(within)) is not None:
            return inside
        found = self._newest(state, self._check_config)
        return (state, {}) if found is None else (found[0], found[1]["loggers"])

    def read(self, state: TrainState, best: bool = False) -> tuple[TrainState, Record]:
        """Return (state, its record) of the newest checkpoint, or the best, whatever its config.

        A run may go on beside us: where it removes what we are reading, the next is read.

        Args:
          state: a state of the same structure and shapes, or its shapes alone.
          best: that of `best_step`.

        Raises:
          ValueError: if there is none.
          OtherArraysError: if it is of a state of another structure.
          DamagedError: if no checkpoint can be read.
        """
        while best:
            step = self.best_step()
            try:
                record = self.record(step)
                assert record is not None
                return self._state(record, state), record
            except UnreadableError as error:
                self._store.set_aside(step, error)
        found = self._newest(state)
        if found is None:
            raise ValueError(f"There is no checkpoint in {self.directory}.")
        return found

    def _newest(
        self, state: TrainState, check: Callable[[Record], None] = lambda record: None
    ) -> tuple[TrainState, Record] | None:
        """Return (state, its record) of the newest checkpoint that can be read; None: none is.

        One alone that is of another state than those before it is damaged.
        """
        while (record := self.record()) is not None:
            check(record)
            try:
                return self._state(record, state), record
            except UnreadableError as error:
                self._store.set_aside(record["step"], error)
            except OtherArraysError:
                if not self._fits_before(record["step"], state):
                    raise
                self._store.set_aside(record["step"], "it holds other arrays than those before it")
        return None

    def _fits_before(self, step: int, state: TrainState) -> bool:
        """Say whether a checkpoint before this one is of a state like this."""
        shapes = jax.tree.map(_wanted, state)
        for before in self._store.steps():
            if before < step and self._store.is_whole(before):
                with contextlib.suppress(UnreadableError, OtherArraysError):
                    record = self._store.read_record(before)
                    run_record.check_arrays(record, _fields(record, shapes), self.directory)
                    self._check_nodes(record, shapes, self._store, before)
                    return True
        return False

    def _restore_within(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return what was saved inside an outer step, where that is the newest and can go on."""
        record = self._record_within()
        if record is not None:
            self._check_config(record)
            run_record.check_schema(record, self.directory)
            try:
                if run_record.same_config(record, self.config):
                    state = self._state(record, shapes, *self._inside.newest())
                    if int(state.step) != record["step"]:
                        raise UnreadableError(
                            f"its record is of outer step {record['step']}, its arrays of "
                            f"{int(state.step)}"
                        )
                    return state, record["loggers"]
                why = "is of another config"
            except UnreadableError as error:
                self._inside.set_aside(error)
                return self._restore_within(shapes)
            except OtherArraysError as error:
                why = f"is of other arrays ({error})"
            say(f"What was saved inside outer step {record['step'] + 1} {why}: it begins anew.")
        elif self._inside.damage:
            say(
                f"A checkpoint inside an outer step, in {self.directory}, is damaged "
                f"({self._inside.damage}): going on from another one."
            )
        return None

    def _record_within(self) -> Record | None:
        """Return the record of the newest save inside a step, where no whole one is newer."""
        record = self._inside.record()
        newer = record is not None and record["step"] >= (self._store.newest() or 0)
        return record if newer else None

    def check_config(self) -> None:
        """Raise ChangedConfigError if the newest checkpoint was written under another config."""
        record = self._record_within() or self.record()
        if record is not None:
            self._check_config(record)

    def _check_config(self, record: Record) -> None:
        if not self.allow_change:
            run_record.check_config(record, self.config, self.directory)

    def restore_state(self, state: TrainState, step: int | None = None) -> TrainState:
        """Return the state of a checkpoint, by default the newest, whatever its config."""
        if step is None:
            return self.read(state)[0]
        record = self.record(step)
        assert record is not None
        return self._state(record, state)

    def _state(
        self,
        record: Record,
        state: TrainState,
        store: Store | None = None,
        number: int | None = None,
    ) -> TrainState:
        """Return the state that a record is of; fields that its schema lacks have defaults.

        `store` and `number` say where it is; by default with the whole outer steps.
        """
        shapes = jax.tree.map(_wanted, state)
        run_record.check_arrays(record, _fields(record, shapes), self.directory)
        store = store or self._store
        number = record["step"] if number is None else number
        try:
            return TrainState(**store.read_state(number, _fields(record, shapes)))
        except UnreadableError:
            self._check_nodes(record, shapes, store, number)
            raise

    def _check_nodes(self, record: Record, shapes: TrainState, store: Store, number: int) -> None:
        """Raise OtherArraysError where the tree that is stored is not that of a state."""
        stored, wanted = store.read_nodes(number), store.nodes(_fields(record, shapes))
        run_record.check_nodes(record, stored, wanted, self.directory)

    def wait(self) -> None:
        """Wait for the last save to be whole; say so where the disk refused it."""
        for store in (self._store, self._inside):
            try:
                store.wait()
            except DiskError as error:
                self._refused(error)

    def close(self) -> None:
        """Wait for the last save to be whole, and close."""
        self.wait()
        if self._writes:  # else a run may be training beside us
            with disk.forgiven(f"What is outdated in {self.directory}"):
                self._drop_outdated()
        self._store.close()
        self._inside.close()

    def _refused(self, error: DiskError) -> None:
        kept, inside = self._store.newest(), self._record_within()
        left = f"the newest one is of outer step {kept}" if kept else "there is none yet"
        if inside is not None:
            step, inner = inside["step"], inside["inner_step"]
            left = f"the newest one is of outer step {step} and inner step {inner} of the next"
        say(
            f"A checkpoint could not be written to {self.directory} ({error}): {left}. Training "
            "goes on; make room before the next."
        )


def _fields(record: Record, state: TrainState) -> dict[str, Any]:
    """Return the fields of a state that a checkpoint of this schema holds."""
    return {name: state.__dict__[name] for name in run_record.FIELDS[record["schema"]]}


def _wanted(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf, and where it is to lie: not where it lay when it was saved."""
    where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _best(text: str) -> tuple[str, str]:
    """Return ("max" or "min", the metric's name)."""
    mode, _, name = text.partition(" ")
    if mode not in ("max", "min") or not name.startswith("eval/"):
        raise ValueError(
            f"checkpoint_best={text!r} says which evaluated metric is best, such as 'max "
            "eval/accuracy' or 'min eval/loss'."
        )
    return mode, name
