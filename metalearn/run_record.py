"""What a checkpoint says of its run: the config, the versions, and where its loggers stood.

The record is JSON beside the arrays. It decides whether a run may go on: with another config
it would be two experiments under one curve, and in another schema its arrays mean another
thing. A schema that only lacks fields of the train state is read as it is.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax

import metalearn
from metalearn.leaves import paths

# The fields of a train state by schema. Those that came later have defaults.
FIELDS = {
    1: ("step", "eta", "optimizer", "key"),
    2: ("step", "eta", "optimizer", "key", "inner"),
    3: ("step", "eta", "optimizer", "key", "inner", "pace"),
}
SCHEMA = 3
LIBRARIES = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")

Record = dict[str, Any]


class ChangedConfigError(ValueError):
    """A run is resumed with another config than it was started with."""


class OtherArraysError(ValueError):
    """A checkpoint holds other arrays than the run that would go on from it."""


def record(
    step: int, config: Mapping[str, Any], loggers: Mapping[str, Any], state: Any = ()
) -> Record:
    """Return the record of a checkpoint of `state`."""
    return {
        "schema": SCHEMA,
        "step": step,
        "arrays": arrays(state),
        "config": dict(config),
        "versions": versions(),
        "loggers": dict(loggers),
    }


def check_schema(found: Record, where: str | os.PathLike[str]) -> None:
    """Raise ValueError where this version cannot read what another one wrote."""
    if found["schema"] not in FIELDS:
        raise ValueError(
            f"The checkpoint in {where} has schema {found['schema']}, and this version of "
            f"metalearn reads schemas up to {SCHEMA}. Resume it with metalearn "
            f"{found['versions']['metalearn']}, which wrote it."
        )


def check_config(found: Record, config: Any, where: str | os.PathLike[str]) -> None:
    """Raise ChangedConfigError where a run had another config."""
    changes = _changes(found, config)
    if changes:
        raise ChangedConfigError(
            f"The run in {where} was started with another config:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nGive it the config it had, or train the new one in another workdir; "
            "--allow-config-change goes on all the same."
        )


def same_config(found: Record, config: Any) -> bool:
    """Say whether a run had this config."""
    return not _changes(found, config)


def _changes(found: Record, config: Any) -> list[str]:
    old, new = _of_run(found["config"]), _of_run(config)
    return difference(old, _without_new(new, old))


def _without_new(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the keys of a later version that are not set: they change nothing."""
    kept = {key: value for key, value in new.items() if key in old or value}
    return {
        key: _without_new(value, old[key])
        if isinstance(value, dict) and isinstance(old.get(key), dict)
        else value
        for key, value in kept.items()
    }


def _of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what may change: where a run is computed, what is drawn of it."""
    return {key: value for key, value in config.items() if key not in ("mesh", "pictures")}


def check_arrays(found: Record, state: Any, where: str | os.PathLike[str]) -> None:
    """Raise OtherArraysError where a checkpoint is of a state with other arrays than this one."""
    if "arrays" not in found:  # an older schema
        return
    changes = difference(found["arrays"], arrays(state), "")
    if changes:
        raise OtherArraysError(
            f"The checkpoint of outer step {found['step']} in {where} holds other arrays than "
            "this run has, which no change of config can mend:\n"
            + "\n".join(f"  {line[1:]}" for line in changes[:5])
            + ("\n  ..." if len(changes) > 5 else "")
        )


def arrays(state: Any) -> dict[str, str]:
    """Return the type and shape of each array of a state, by its path."""
    found = zip(paths(state), jax.tree.leaves(state), strict=True)
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in found}


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


def versions() -> dict[str, str]:
    """Return the versions of everything that a result may depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"metalearn": metalearn.__version__, "python": platform.python_version(), **found}
