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

from metalearn._utils import strict_json
from metalearn._utils.trees import paths
from metalearn._utils.version import __version__

# The fields of a train state by schema. A new field is a new schema, and has a default: an older
# checkpoint is read without it.
FIELDS = {1: ("step", "eta", "optimizer", "key", "inner", "pace")}
SCHEMA = 1
LIBRARIES = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")

Record = dict[str, Any]


class ChangedConfigError(ValueError):
    """A run is resumed with another config than it was started with."""


class OtherArraysError(ChangedConfigError):
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


def trouble(found: Any, step: int) -> str | None:
    """Return what is wrong with the record of a whole outer step, by the number of its directory.

    A record of a newer schema is only asked what `check_schema` says of it.
    """
    wrong = _trouble(found)
    if wrong is None and _is_known(found) and found["step"] != step:
        return f"its record is of outer step {found['step']}"
    return wrong


def trouble_within(found: Any, number: int) -> str | None:
    """Return what is wrong with the record of a save inside an outer step."""
    del number  # as they come
    wrong = _trouble(found)
    if wrong is None and _is_known(found):
        return _wrong_type(found, "inner_step", int, 1)
    return wrong


def _trouble(found: Any) -> str | None:
    if not isinstance(found, dict):
        return f"its record is no object but {type(found).__name__}"
    wrong = _wrong_type(found, "schema", int, 1) or _wrong_type(found, "versions", dict)
    if wrong is None and not isinstance(found["versions"].get("metalearn"), str):
        wrong = "its record lacks the version of metalearn"
    if wrong is not None or not _is_known(found):
        return wrong
    return (
        _wrong_type(found, "step", int, 0)
        or _wrong_type(found, "config", dict)
        or _wrong_type(found, "loggers", dict)
        or _wrong_type(found, "arrays", dict)
    )


def _is_known(found: Record) -> bool:
    return found["schema"] in FIELDS


def _wrong_type(found: Record, name: str, kind: type, least: int = 0) -> str | None:
    if name not in found:
        return f"its record lacks `{name}`"
    value = found[name]
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or (kind is int and value < least):
        return f"the `{name}` of its record is {value!r:.40}"
    return None


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
    old, new = (strict_json.plain(_of_run(each)) for each in (found["config"], config))
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
    """Raise OtherArraysError if a checkpoint has other arrays than `state`, fields by name."""
    check_nodes(found, found["arrays"], arrays(state), where)


def check_nodes(
    found: Record, old: dict[str, str], new: dict[str, str], where: str | os.PathLike[str]
) -> None:
    """Raise OtherArraysError where a checkpoint is of another tree than this run's state.

    Two trees may have the same arrays and not the same nodes: those of `optax.adam` and
    `optax.adamw` differ by one that is empty. `old` and `new`: `Store.nodes`.
    """
    changes = difference(old, new, "")
    if changes:
        raise OtherArraysError(
            f"The checkpoint of outer step {found['step']} in {where} holds other arrays than "
            "this run has: it is of another configuration, such as another optimizer, model or "
            "number of tasks:\n"
            + "\n".join(f"  {line[1:]}" for line in changes[:5])
            + (f"\n  ... and {len(changes) - 5} more" if len(changes) > 5 else "")
            + "\nGive the run the configuration it had, or train the new one in another workdir. "
            "--allow-config-change cannot mend this: what the new one needs is not there."
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
    return {"metalearn": __version__, "python": platform.python_version(), **found}
