"""Checkpoints of a run: the train state, and a record of its config and versions.

A checkpoint holds the train state (eta, outer optimizer, key, step, carried inner states) and a
record (`metalearn.checkpoints.record`). It is written in the background, to a temporary directory
that is renamed: a run killed at any moment keeps the checkpoint before. Loading runs no code. The
newest few are kept, and the best by an evaluated metric.

An outer step that is cut into segments can be saved between two of them, in `within/`: the newest
of these is restored if it is later than the newest complete outer step.

A damaged checkpoint is skipped for the one before it. A full or lost disk does not end the run: the
save is skipped, with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import at_least, first_line, is_integer, nearest
from metalearn.checkpoints import record as run_record
from metalearn.checkpoints.record import ChangedConfigError, OtherArraysError, Record
from metalearn.checkpoints.store import DiskError, SegmentCheckpoints, Store, UnreadableError
from metalearn.sharding.distributed import say
from metalearn.train_state import TrainState

__all__ = ["ChangedConfigError", "Checkpoints", "DamagedError", "OtherArraysError"]


class DamagedError(ValueError):
    """No checkpoint of a run can be read."""


class Inside(Protocol):
    """What restores a state inside an outer step: `training.segment_run.SegmentRun`."""

    def restored_shapes(self, record: dict[str, Any]) -> TrainState:
        """Return the shapes of the state of a record."""

    def restored(self, state: TrainState, record: dict[str, Any] | None) -> TrainState:
        """Return the state with what was saved beside it; None: it is between two outer steps."""


class WithinStep(NamedTuple):
    """Where a checkpoint inside an outer step stands."""

    step: int  # outer steps taken
    programs: int  # that the next one has run
    where: str  # in words


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
          directory: of the checkpoints.
          config: of the run, as JSON; a run must be resumed with the config it was started with.
          every: outer steps between two checkpoints.
          keep: how many of the newest are kept.
          best: keep one more, the best by an evaluated metric: "max eval/accuracy" or "min
            eval/loss". A checkpoint is then also written at every evaluation.
          allow_change: resume with any config.
          within: segments between two checkpoints inside an outer step, if the trainer has
            segments; 0: only when the run is asked to stop.
        """
        at_least("Checkpoints", 0, every=every, within=within)
        if not is_integer(keep) or keep < 1:
            raise ValueError(f"A run keeps at least its newest checkpoint, not {keep} of them.")
        self.directory = pathlib.Path(directory).absolute()
        self.config = strict_json.loads(strict_json.dumps(dict(config or {})))
        self.every, self.best, self.allow_change = every, best or None, allow_change
        self.within = within
        self._judged = _best(best) if best else None
        self._store = Store(self.directory, keep, self._judged, run_record.problem)
        self._segments = SegmentCheckpoints(self.directory / "within")
        self._reported: set[int] = set()  # damaged steps
        self._writes = False  # whether this process has saved
        self.saved_within: dict[str, Any] | None = None  # the record of the last save inside a step

    @classmethod
    def of_run(cls, directory: str | os.PathLike[str]) -> Checkpoints:
        """Open the checkpoints of a run to read them, with its own rule for the best."""
        opened = cls(directory)
        try:
            record = opened.record() or {"config": {}}
            rule = record.get("best") or record["config"].get("checkpoint_best")
        except BaseException:
            opened.close()
            raise
        if not rule or not isinstance(rule, str):
            return opened
        opened.close()
        made = cls(directory, best=rule)
        made._reported = opened._reported  # damaged ones are told of once
        return made

    def save(
        self,
        state: TrainState,
        step: int,
        loggers: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start to save; the write continues in the background.

        Args:
          state: the train state.
          step: its outer step.
          loggers: their records, by class name.
          metrics: evaluated at this step; `best` names one of them.

        Raises:
          ValueError: if `best` names none of the metrics.
        """
        if metrics:
            self.check_best(metrics)
        record = run_record.record(step, self.config, loggers, state, self.best)
        self._save(lambda: self._store.save(step, state, record, metrics or {}))

    def check_best(self, metrics: Iterable[str]) -> None:
        """Raise ValueError if `best` names none of the metrics of an evaluation."""
        name, names = "" if self._judged is None else self._judged[1], sorted(metrics)
        if name and name not in names:
            raise ValueError(
                f"checkpoint_best={self.best!r}: an evaluation has no {name!r}."
                f"{nearest(name, names)} It has: {', '.join(names)}."
            )

    def save_within(
        self,
        state: TrainState,
        step: int,
        inner_step: int,
        loggers: Mapping[str, Any],
        where: str = "",
        run: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Start to save a state inside the outer step after `step`.

        Args:
          state: the arrays.
          step: outer steps taken.
          inner_step: at which the next one stands.
          loggers: their records, by class name.
          where: the same in words.
          run: () -> the record (JSON) that `Inside.restored` gets. It may write files first.
        """

        def begin() -> None:
            try:
                saved = run()
            except OSError as error:
                if not disk.at_fault(error):
                    raise
                raise DiskError(first_line(error)) from error
            record = run_record.record(step, self.config, loggers, state)
            inside = {"inner_step": inner_step, "where": where, "run": saved}
            self._segments.save(state, record | inside)
            self.saved_within = saved

        self._save(begin)

    def _save(self, begin: Callable[[], None]) -> None:
        self._writes = True
        self.wait()
        self._drop_outdated()
        try:
            begin()
        except DiskError as error:
            self._refused(error)

    def within_at(self) -> WithinStep | None:
        """Return where the newest checkpoint inside an outer step stands; None if there is none."""
        record = self._record_within()
        if record is None:
            return None
        where = record.get("where") or f"inner step {record['inner_step']}"
        return WithinStep(record["step"], record.get("run", {}).get("programs", 0), where)

    def drop_within(self) -> None:
        """Delete all checkpoints inside outer steps."""
        self.wait()
        self._segments.clear()

    def _drop_outdated(self) -> None:
        """Delete checkpoints inside outer steps that are complete and saved."""
        record = self._segments.record()
        if record is not None and record["step"] < (self._store.newest() or 0):
            self._segments.clear()

    def latest(self) -> int | None:
        """Return the outer step of the newest intact checkpoint; None if there is no checkpoint.

        Raises:
          DamagedError: if there are checkpoints and all are damaged.
        """
        newest, damaged = self._store.newest(), self._store.damaged
        self._report("falling back to the one before")
        if damaged and newest is None:
            reasons = "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items()))
            raise DamagedError(
                f"No checkpoint in {self.directory} can be read ({reasons}). Restore them from a "
                "copy, or train in another workdir."
            )
        return newest

    def _report(self, way_out: str) -> None:
        """Print a message for each damaged checkpoint that was not reported before."""
        damaged = self._store.damaged
        for step in sorted(damaged.keys() - self._reported):
            say(
                f"The checkpoint of outer step {step} in {self.directory} is damaged "
                f"({damaged[step]}): {way_out}."
            )
        self._reported = set(damaged)

    def best_step(self) -> int:
        """Return the outer step of the best checkpoint; ValueError if none was evaluated."""
        step = self._store.best() if self.best else None
        self._report("going on without it")
        if step is None:
            raise ValueError(
                f"The run in {self.directory} has no best checkpoint: its config sets no "
                "`checkpoint_best`, such as 'max eval/accuracy', it was not evaluated yet, or the "
                "checkpoint is damaged."
            )
        return step

    def record(self, step: int | None = None) -> Record | None:
        """Return the record of a checkpoint, by default the newest; None if there is none."""
        while (at := self.latest() if step is None else step) is not None:
            try:
                record = self._store.read_record(at)
            except UnreadableError as error:
                if step is not None:
                    raise
                self._store.mark_damaged(at, error)
                continue
            run_record.check_schema(record, self.directory)
            return record
        return None

    def restore(
        self, state: TrainState, within: Inside | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint as (state, record of the loggers), or (state, {}).

        Args:
          state: a state of the same structure and shapes, as `Trainer.init` returns it.
          within: of an outer step that is cut into segments, `Trainer.segments(tasks)`; None: do
            not restore checkpoints inside outer steps.

        Raises:
          ChangedConfigError: if the checkpoint was written under another config; as an
            OtherArraysError if its arrays are not those of `state`, with any `allow_change`.
          DamagedError: if no checkpoint can be read.
        """
        self.wait()
        if within is not None and (inside := self._restore_within(within)) is not None:
            return inside
        restored = self._newest(state, self._check_config)
        state, record = (state, {}) if restored is None else (restored[0], restored[1]["loggers"])
        return (state if within is None else within.restored(state, None)), record

    def read(
        self, state: TrainState, best: bool = False, carried: bool = True
    ) -> tuple[TrainState, Record]:
        """Return (state, its record) of the newest checkpoint, or the best, of any config.

        Another process may train meanwhile: if it deletes this checkpoint, the next one is read.

        Args:
          state: a state of the same structure and shapes, or its shapes alone.
          best: read the checkpoint of `best_step`.
          carried: read the inner states that truncated unrolls carry. False: `inner` of the state
            that is returned is `()`, whatever was saved, and so it is in `state`.

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
                return self._state(record, state, carried=carried), record
            except UnreadableError as error:
                self._store.mark_damaged(step, error)
        restored = self._newest(state, carried=carried)
        if restored is None:
            raise ValueError(f"There is no checkpoint in {self.directory}.")
        return restored

    def _newest(
        self,
        state: TrainState,
        check: Callable[[Record], None] = lambda record: None,
        carried: bool = True,
    ) -> tuple[TrainState, Record] | None:
        """Return (state, its record) of the newest readable checkpoint; None if there is none.

        A checkpoint whose arrays differ from those of the ones before it counts as damaged.
        """
        while (record := self.record()) is not None:
            check(record)
            try:
                return self._state(record, state, carried=carried), record
            except UnreadableError as error:
                self._store.mark_damaged(record["step"], error)
            except OtherArraysError:
                if not self._fits_before(record["step"], state, carried):
                    raise
                self._store.mark_damaged(record["step"], "its arrays differ from those before it")
        return None

    def _fits_before(self, step: int, state: TrainState, carried: bool = True) -> bool:
        """Return whether a checkpoint before `step` has the arrays of `state`."""
        shapes = jax.tree.map(_wanted, state)
        for before in self._store.steps():
            if before < step and self._store.is_intact(before):
                with contextlib.suppress(UnreadableError, OtherArraysError):
                    record = self._store.read_record(before)
                    fields = _fields(record, shapes, carried)
                    run_record.check_arrays(record, fields, self.directory)
                    self._check_nodes(record, fields, self._store, before)
                    return True
        return False

    def _restore_within(self, within: Inside) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the checkpoint inside an outer step, if it is the newest and can be resumed."""
        record = self._record_within()
        if record is not None:
            self._check_config(record)
            run_record.check_schema(record, self.directory)
            try:
                if not isinstance(record.get("run"), dict):
                    why = "is of an earlier version"
                elif run_record.same_config(record, self.config):
                    shapes = within.restored_shapes(record["run"])
                    state = self._state(record, shapes, *self._segments.newest())
                    if int(state.step) != record["step"]:
                        raise UnreadableError(
                            f"its record is of outer step {record['step']}, its arrays of "
                            f"{int(state.step)}"
                        )
                    return within.restored(state, record["run"]), record["loggers"]
                else:
                    why = "is of another config"
            except UnreadableError as error:
                self._segments.mark_damaged(error)
                return self._restore_within(within)
            except OtherArraysError as error:
                why = f"is of other arrays ({error})"
            say(f"What was saved inside outer step {record['step'] + 1} {why}: it begins anew.")
        elif self._segments.damage:
            say(
                f"A checkpoint inside an outer step, in {self.directory}, is damaged "
                f"({self._segments.damage}): going on from another one."
            )
        return None

    def _record_within(self) -> Record | None:
        """Return the record of the newest checkpoint inside a step, if no complete one is newer."""
        record = self._segments.record()
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
        """Return the state of a checkpoint, by default the newest, of any config."""
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
        carried: bool = True,
    ) -> TrainState:
        """Return the state of a record; fields that its schema lacks have defaults.

        Args:
          record: of the checkpoint.
          state: shapes to restore to.
          store: of the checkpoint; None: that of complete outer steps.
          number: of the checkpoint in its store; None: the outer step.
          carried: read `inner` too.
        """
        fields = _fields(record, jax.tree.map(_wanted, state), carried)
        run_record.check_arrays(record, fields, self.directory)
        store = store or self._store
        number = record["step"] if number is None else number
        try:
            read = store.read_state if "inner" in fields else store.read_part
            restored = TrainState(**read(number, fields))
        except UnreadableError:
            self._check_nodes(record, fields, store, number)
            raise
        return dataclasses.replace(
            restored,
            **{
                name: jax.tree.map(_uncommitted_as, part, getattr(restored, name))
                for name, part in _fields(record, state, carried).items()
            },
        )

    def _check_nodes(
        self, record: Record, fields: dict[str, Any], store: Store, number: int
    ) -> None:
        """Raise OtherArraysError if the stored tree is not that of the fields of a state."""
        stored = run_record.of_fields(store.read_nodes(number), fields)
        run_record.check_nodes(record, stored, store.nodes(fields), self.directory)

    def wait(self) -> None:
        """Wait until the last save is complete; print a message if the disk refused it."""
        for store in (self._store, self._segments):
            try:
                store.wait()
            except DiskError as error:
                self._refused(error)

    def close(self) -> None:
        """Wait until the last save is complete, and close."""
        self.wait()
        if self._writes:  # otherwise another process may be training here
            with disk.forgiven(f"What is outdated in {self.directory}"):
                self._drop_outdated()
        self._store.close()
        self._segments.close()

    def _refused(self, error: DiskError) -> None:
        kept, inside = self._store.newest(), self._record_within()
        left = f"the newest one is of outer step {kept}" if kept else "there is none yet"
        if inside is not None:
            where = inside.get("where") or f"inner step {inside['inner_step']}"
            left = f"the newest one is of outer step {inside['step']} and {where} of the next"
        say(
            f"A checkpoint could not be written to {self.directory} ({error}): {left}. Training "
            "goes on; make room before the next."
        )


def _fields(record: Record, state: TrainState, carried: bool = True) -> dict[str, Any]:
    """Return the fields of a state in the schema of a record, with or without `inner`.

    An `inner` without arrays, of full unrolls, is always among them.
    """
    names: tuple[str, ...] = run_record.FIELDS[record["schema"]]
    if not carried and run_record.of_fields(record["arrays"], ("inner",)):
        names = tuple(name for name in names if name != "inner")
    return {name: state.__dict__[name] for name in names}


def _wanted(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf with its sharding now, not the sharding it was saved with."""
    where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _uncommitted_as(leaf: Any, restored: jax.Array) -> jax.Array:
    """Return a restored array, uncommitted to its device if `leaf` is.

    Orbax commits arrays to devices. `jax.jit` compiles a program once more for a committed
    argument, and so would a resumed run, for each mixture with arrays that it computes anew.
    """
    committed = leaf.committed if isinstance(leaf, jax.Array) else leaf.sharding is not None
    if committed or not isinstance(restored, jax.Array):
        return restored
    if jax.dtypes.issubdtype(restored.dtype, jax.dtypes.prng_key):
        data = jnp.array(np.asarray(jax.random.key_data(restored)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(restored))
    return jnp.array(np.asarray(restored))


def _best(text: str) -> tuple[str, str]:
    """Return ("max" or "min", the metric's name)."""
    mode, _, name = text.partition(" ")
    if mode not in ("max", "min") or not name.startswith("eval/"):
        raise ValueError(
            f"checkpoint_best={text!r} says which evaluated metric is best, such as 'max "
            "eval/accuracy' or 'min eval/loss'."
        )
    return mode, name
