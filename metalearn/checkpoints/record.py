"""The record of a checkpoint: config, versions, shapes of arrays, and records of loggers.

The record is JSON beside the arrays, and decides whether a run may be resumed. With another config
one curve would show two experiments; in another schema the arrays mean something else. An older
schema, which lacks fields of the train state, is read with their defaults.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Collection, Mapping
from typing import Any

import jax

from metalearn._utils import strict_json
from metalearn._utils.trees import paths
from metalearn._utils.version import __version__

# The fields of a train state by schema. A new field is a new schema, and has a default: an older
# checkpoint is read without it.
FIELDS = {1: ("step", "eta", "optimizer", "key", "inner", "pace")}
SCHEMA = 1
KEYS = ("threefry2x32", "rbg", "unsafe_rbg")  # implementations
LIBRARIES = ("jax", "jaxlib", "optax", "flax", "dm-haiku", "orbax-checkpoint")

Record = dict[str, Any]


class ChangedConfigError(ValueError):
    """A run is resumed with another config than that of its checkpoint."""


class OtherArraysError(ChangedConfigError):
    """A checkpoint holds other arrays than the run that is resumed."""


def record(
    step: int,
    config: Mapping[str, Any],
    loggers: Mapping[str, Any],
    state: Any = (),
    best: str | None = None,
) -> Record:
    """Return the record of a checkpoint of `state`; `best`: the rule of the run."""
    return {
        "schema": SCHEMA,
        "step": step,
        "arrays": arrays(state),
        "config": dict(config),
        "versions": versions(),
        "loggers": dict(loggers),
        "best": best,
    }


def problem(saved: Any, step: int) -> str | None:
    """Return what is wrong with the record of outer step `step`; None if it is valid.

    Of a newer schema only those keys are checked that `check_schema` reads.
    """
    wrong = _problem(saved)
    if wrong is None and _is_known(saved) and saved["step"] != step:
        return f"its record is of outer step {saved['step']}"
    return wrong


def problem_within(saved: Any, number: int) -> str | None:
    """Return what is wrong with the record of a checkpoint inside an outer step; None: nothing."""
    del number  # in the order of saving
    wrong = _problem(saved)
    if wrong is None and _is_known(saved):
        return _wrong_type(saved, "inner_step", int, 1)
    return wrong


def _problem(saved: Any) -> str | None:
    if not isinstance(saved, dict):
        return f"its record is no object but {type(saved).__name__}"
    wrong = _wrong_type(saved, "schema", int, 1) or _wrong_type(saved, "versions", dict)
    if wrong is None and not isinstance(saved["versions"].get("metalearn"), str):
        wrong = "its record lacks the version of metalearn"
    if wrong is not None or not _is_known(saved):
        return wrong
    return (
        _wrong_type(saved, "step", int, 0)
        or _wrong_type(saved, "config", dict)
        or _wrong_type(saved, "loggers", dict)
        or _wrong_type(saved, "arrays", dict)
    )


def _is_known(saved: Record) -> bool:
    return saved["schema"] in FIELDS


def _wrong_type(saved: Record, name: str, kind: type, least: int = 0) -> str | None:
    if name not in saved:
        return f"its record lacks `{name}`"
    value = saved[name]
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or (kind is int and value < least):
        return f"the `{name}` of its record is {value!r:.40}"
    return None


def check_schema(saved: Record, where: str | os.PathLike[str]) -> None:
    """Raise ValueError if this version cannot read the schema of a record."""
    if saved["schema"] not in FIELDS:
        raise ValueError(
            f"The checkpoint in {where} has schema {saved['schema']}, and this version of "
            f"metalearn reads schemas up to {SCHEMA}. Resume it with metalearn "
            f"{saved['versions']['metalearn']}, which wrote it."
        )


def check_config(saved: Record, config: Any, where: str | os.PathLike[str]) -> None:
    """Raise ChangedConfigError if a record has another config."""
    found = changes(saved["config"], config)
    if found:
        raise ChangedConfigError(
            f"The run in {where} was started with another config:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nGive it the config it had, or train the new one in another workdir; "
            "--allow-config-change goes on all the same."
        )


def same_config(saved: Record, config: Any) -> bool:
    """Return whether a record has this config."""
    return not changes(saved["config"], config)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what of a config changed that makes another run, one line per leaf."""
    before, after = (strict_json.plain(_of_run(each)) for each in (old, new))
    return difference(before, _without_new(after, before))


def _without_new(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return a config without unset keys that `old` lacks: later versions added them."""
    kept = {key: value for key, value in new.items() if key in old or value}
    return {
        key: _without_new(value, old[key])
        if isinstance(value, dict) and isinstance(old.get(key), dict)
        else value
        for key, value in kept.items()
    }


def _of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that may change: the devices and the pictures."""
    return {key: value for key, value in config.items() if key not in ("mesh", "pictures")}


def check_arrays(saved: Record, state: Any, where: str | os.PathLike[str]) -> None:
    """Raise OtherArraysError if a checkpoint has other arrays than `state`, fields by name.

    Fields that `state` lacks are not compared.
    """
    skipped = [name for name in FIELDS[saved["schema"]] if name not in state]
    unread = of_fields(saved["arrays"], skipped)
    old = {path: array for path, array in saved["arrays"].items() if path not in unread}
    check_nodes(saved, old, arrays(state), where)


def of_fields(nodes: Mapping[str, str], fields: Collection[str]) -> dict[str, str]:
    """Return the arrays or nodes of some fields of a state, by path: "eta/params/kernel"."""
    return {path: node for path, node in nodes.items() if path.partition("/")[0] in fields}


def check_nodes(
    saved: Record, old: dict[str, str], new: dict[str, str], where: str | os.PathLike[str]
) -> None:
    """Raise OtherArraysError if the tree of a checkpoint is not that of this run's state.

    Two trees may have equal arrays and different nodes: those of `optax.adam` and `optax.adamw`
    differ by an empty node. `old` and `new` are from `Store.nodes`.
    """
    changes = difference(old, new, "")
    if changes:
        raise OtherArraysError(
            f"The checkpoint of outer step {saved['step']} in {where} holds other arrays than "
            "this run has: it is of another configuration, such as another optimizer, model or "
            "number of tasks:\n"
            + "\n".join(f"  {line[1:]}" for line in changes[:5])
            + (f"\n  ... and {len(changes) - 5} more" if len(changes) > 5 else "")
            + "\nGive the run the configuration it had, or train the new one in another workdir. "
            "--allow-config-change cannot mend this: what the new one needs is not there."
        )


def arrays(state: Any) -> dict[str, str]:
    """Return the type and shape of each array of a state, by its path."""
    leaves = zip(paths(state), jax.tree.leaves(state), strict=True)
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def key_of(record: dict[str, Any]) -> Any:
    """Return the shape of the key of a run; None: of no implementation that there is."""
    made = [functools.partial(jax.random.key, 0, impl=name) for name in KEYS]
    raw = [functools.partial(jax.random.PRNGKey, 0, impl=name) for name in KEYS]
    shapes = map(jax.eval_shape, made + raw)
    saved = record["arrays"].get("key")
    return next((s for s in shapes if f"{s.dtype}{list(s.shape)}" == saved), None)


def difference(old: Any, new: Any, path: str = "config") -> list[str]:
    """Return how two JSON values differ, one line per leaf: 'config.seed: 0 -> 1'."""
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
    """Return the versions of the libraries that a result may depend on."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"metalearn": __version__, "python": platform.python_version(), **libraries}
