"""A config as JSON, for when it is not your own: it is read, and nothing of it is run.

    {"config": "maml_digits", "seed": 1, "model": {"filters": 32}}

A config file is Python and is executed, so one from a stranger can do whatever you can do.
This form names one of the packaged configs and sets keys of it, each held against the type
that the key has there; a list stands for a tuple, and null unsets what may be unset. A name that
it sets brings its own keys. It cannot name a file, add a key or call anything.
`--config=mine.json` reads it, and `--config.seed=2` on the command line is set on top. A name in it
that is an import path ("my_package.my_file:MyAlgorithm") would execute code, and is refused
without `--allow-imports`.

The `config.json` in the workdir of a run is a whole config, and trains it again.

This module is a config file of ml-collections itself, with the path of the JSON as its option.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from metalearn._utils import strict_json
from metalearn._utils.checks import nearest, pick
from metalearn.experiments.build import sections
from metalearn.experiments.cli import values
from metalearn.experiments.cli.arguments import keys, meant, packaged, renamed
from metalearn.experiments.cli.import_paths import check_json

WHOLE = {"algorithm", "dataset", "engine", "steps"}  # keys of a whole config, of a run's workdir


def get_config(path: str, allow_imports: bool = False) -> ml_collections.ConfigDict:
    """Return the packaged config that a JSON file names, with the keys that it sets; or a whole."""
    overrides = read(pathlib.Path(path))
    if "config" not in overrides and WHOLE <= overrides.keys():
        check_json(path, overrides, allow_imports)
        overrides.pop("auto", None)  # what engine="auto" chose for that run
        config = _whole(overrides)
        _unset(config, config)
        return config
    if not isinstance(overrides.get("config"), str):
        raise ValueError(
            f'{path} names no packaged config. Begin it with {{"config": "NAME", where NAME is one '
            f"of: {', '.join(packaged())}."
        )
    name = overrides.pop("config")
    name = pick({known: known for known in packaged()}, name, "packaged config")
    config = importlib.import_module(f"metalearn.experiments.configs.{name}").get_config()
    check_json(path, overrides, allow_imports)
    sections.renew(config, flat(overrides))
    update(config, overrides)
    return config


def _whole(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Return a whole config; a list in it is a tuple."""
    config = ml_collections.ConfigDict()
    for key, value in values.items():
        config[key] = _whole(value) if isinstance(value, dict) else _tuples(value)
    return config


def _unset(
    config: ml_collections.ConfigDict, whole: ml_collections.ConfigDict, prefix: str = ""
) -> None:
    """Give each key that is null the type of its values, in place."""
    for key, value in list(config.items()):
        if isinstance(value, ml_collections.ConfigDict):
            _unset(value, whole, f"{prefix}{key}.")
        elif value is None:
            del config[key]
            config[key] = sections.unset(whole, f"{prefix}{key}")


def _tuples(value: Any) -> Any:
    """Return lists, in lists too, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"There is no config file {path}.")
    try:
        config = strict_json.read(path, "this file")
    except ValueError as error:
        raise ValueError(f"{path} is not JSON of a config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds {type(config).__name__}, but a config is an object: "
            '{"config": "NAME"}.'
        )
    return config


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one, by dotted keys; an object without keys is a value.

    >>> flat({"seed": 1, "model": {"name": "mlp"}})
    {'seed': 1, 'model.name': 'mlp'}
    """
    pairs: dict[str, Any] = {}
    for key, value in nested.items():
        here = f"{prefix}{key}"
        has_keys = isinstance(value, Mapping) and value
        pairs |= flat(value, f"{here}.") if has_keys else {here: value}
    return pairs


def update(
    config: ml_collections.ConfigDict,
    changes: dict[str, Any],
    prefix: str = "",
    whole: ml_collections.ConfigDict | None = None,
) -> None:
    """Set keys of a config, in place, each to a value of the type it has.

    Args:
      config: a part of a config.
      changes: the keys to set in it.
      prefix: of the keys of the part, such as "model.".
      whole: the config that it is a part of; None: itself.
    """
    whole = config if whole is None else whole
    for key, value in changes.items():
        here = f"{prefix}{key}"
        if key not in config:
            elsewhere = [known for known in keys(whole) if known.endswith(f".{key}")]
            hint = renamed(key, config) or meant(here, elsewhere) or nearest(key, config)
            raise ValueError(
                f"The config has no key {here!r}.{hint} "
                f"There are: {', '.join(f'{prefix}{known}' for known in config)}."
            )
        old = config[key]
        if not isinstance(old, ml_collections.ConfigDict):
            unset = value is None and sections.nullable(whole, here)
            config[key] = values.from_json(here, value, config.get_type(key), unset)
        elif isinstance(value, dict):
            update(old, value, f"{here}.", whole)
        else:
            raise ValueError(
                f"config.{here} holds keys of its own, so it takes an object, not {value!r}. They "
                f"are: {', '.join(old)}."
            )
