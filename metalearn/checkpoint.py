"""Checkpoints: the whole of a run, by Orbax, and a record of what it was made of.

A checkpoint holds the train state (eta, outer optimizer, key, step, inner runs between two
truncations) and a JSON record:
the config, the versions of the libraries, and what the loggers must know to go on. A
save is written aside and renamed, so a kill at any moment leaves the one before. Loading
runs no code. Resuming with another config is refused, with the difference: the curve of
such a run would be of two experiments.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

import metalearn
from metalearn.train_state import TrainState

SCHEMA = 2
LIBRARIES = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")


class ChangedConfigError(ValueError):
    """A run is resumed with another config than it was started with."""


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        every: int = 100,
        keep: int = 2,
    ):
        """Open or make a directory; `every` and `keep` are in outer steps and checkpoints."""
        self.directory = pathlib.Path(directory).absolute()
        self.config = json.loads(json.dumps(dict(config or {})))
        self.every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "record")
        )

    def save(self, state: TrainState, step: int, loggers: Mapping[str, Any]) -> None:
        """Begin to save; the write goes on beside the training."""
        record = {
            "schema": SCHEMA,
            "step": step,
            "config": self.config,
            "versions": _versions(),
            "loggers": dict(loggers),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self._manager.save(step, args=items)

    def latest(self) -> int | None:
        """Return the outer step of the newest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def record(self) -> dict[str, Any] | None:
        """Return the record of the newest checkpoint, or None where there is none."""
        step = self.latest()
        if step is None:
            return None
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=items).record
        if record["schema"] != SCHEMA:
            raise ValueError(
                f"The checkpoint in {self.directory} has schema {record['schema']}, and this "
                f"version of metalearn reads schema {SCHEMA}. Resume it with metalearn "
                f"{record['versions']['metalearn']}, which wrote it."
            )
        return record

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint as (state, record of the loggers), or (state, {}).

        Args:
          state: a state of the same structure and shapes, as `Trainer.init` returns it.

        Raises:
          ChangedConfigError: if the checkpoint was written under another config.
        """
        record = self.record()
        if record is None:
            return state, {}
        self.check_config()
        return self.restore_state(state), record["loggers"]

    def check_config(self) -> None:
        """Raise ChangedConfigError if the newest checkpoint was written under another config."""
        record = self.record()
        changes = difference(record["config"], self.config) if record else []
        if changes:
            raise ChangedConfigError(
                f"The run in {self.directory} was started with another config:\n"
                + "\n".join(f"  {line}" for line in changes)
                + "\nGive it the config it had, or train the new one in another workdir."
            )

    def restore_state(self, state: TrainState) -> TrainState:
        """Return the state of the newest checkpoint, whatever its config."""
        shapes = jax.eval_shape(lambda: state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._manager.restore(self.latest(), args=items).state

    def close(self) -> None:
        """Wait for the last save to be whole."""
        self._manager.wait_until_finished()
        self._manager.close()


def difference(old: Any, new: Any, path: str = "config") -> list[str]:
    """Say how two JSON values differ, one line a leaf: 'config.seed: 0 -> 1'."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        missing = "(absent)"
        return [
            line
            for key in keys
            for line in difference(old.get(key, missing), new.get(key, missing), f"{path}.{key}")
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"metalearn": metalearn.__version__, "python": platform.python_version(), **found}
