"""The keys that go with a name of a config, and what becomes of them when the name changes.

    metalearn train --config=maml_digits --config.model.name=mlp --config.model.hidden="(8,)"

`filters` and `blocks`, which that config has for its `conv_net`, go; `hidden` comes with its
default. A key that both names have keeps the value that the config gives it. The keys are the
arguments of what the name builds, each with the type of its default or of its annotation; an
argument without a default that the config does not have is set together with the name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from metalearn import Algorithm, MetaGradient, Tasks
from metalearn.datasets import ClassIndex
from metalearn.experiments.build.algorithms import ALGORITHMS, INNER_OPTIMIZERS, filled
from metalearn.experiments.build.datasets import DATASETS, few_shot, returns
from metalearn.experiments.build.models import FILLED, LIBRARIES
from metalearn.experiments.build.registry import (
    ENGINES,
    OBJECTIVES,
    OPTAX,
    OPTIMIZERS,
    find,
    optimizer_function,
    parameters,
)
from metalearn.experiments.cli.import_paths import is_import_path, load
from metalearn.experiments.configs import _common
from metalearn.models import Architecture

Parameters = dict[str, inspect.Parameter]

SECTIONS = (
    *("algorithm", "dataset", "model", "optimizer"),
    *(f"algorithm.{key}" for key in INNER_OPTIMIZERS),
)
# Keys that go with every name, and their defaults.
BESIDE: dict[str, dict[str, Any]] = {
    "model": {"library": "linen"},
    "optimizer": {"schedule": "constant", "clip": None, "average": None},
}
TYPES = {  # by a word of the annotation; the first that is there
    **{"tuple": tuple, "Sequence": tuple, "ScalarOrSchedule": float, "float": float},
    **{"int": int, "Count": int, "bool": bool, "str": str},
}


def renew(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Give each name that changes its own keys, in place.

    Args:
      config: of a packaged config, or of a file.
      changes: what is set on top of it, by dotted key: {"model.name": "mlp"}. The values are set
        by the caller; here they say which keys have to be there.
    """
    for section in SECTIONS:
        old, name = _at(config, section), changes.get(f"{section}.name")
        if not isinstance(old, ConfigDict) or not isinstance(name, str) or name == old.get("name"):
            continue
        takes = keys_of(section, name, _library(config, changes))
        if takes is not None:
            parent = _at(config, section.rpartition(".")[0])
            beside = BESIDE.get(section, {})
            parent[section.rpartition(".")[2]] = _renewed(
                old, takes, beside, _below(section, changes)
            )
    if changes.get("engine", config.get("engine")) != config.get("engine"):
        _renew_engine_options(config, changes)


def nullable(config: ConfigDict, key: str) -> bool:
    """Return whether None is a value of a key: it is unset now, or its argument takes None."""
    section, _, last = key.rpartition(".")
    defaults = _common.maml()
    if _at(config, key) is None or (_has(defaults, key) and _at(defaults, key) is None):
        return True
    takes = _takes(config, section)
    return last in takes and _takes_none(takes[last])


def unset(config: ConfigDict, key: str) -> Any:
    """Return None for a key, of the type that its values have: see `ConfigDict.get_type`."""
    section, _, last = key.rpartition(".")
    defaults, takes = _common.maml(), _takes(config, section)
    if _has(defaults, key):
        return placeholder(_at(defaults, section).get_type(last))
    return placeholder((last in takes and _annotated(takes[last])) or object)


def _takes(config: ConfigDict, section: str) -> Parameters:
    """Return the arguments of what a section names; {} where it names nothing that is known."""
    if section not in SECTIONS:
        return {}
    return keys_of(section, _at(config, section).get("name"), _library(config, {})) or {}


def _takes_none(parameter: inspect.Parameter) -> bool:
    return parameter.default is None or "None" in str(parameter.annotation)


def _library(config: ConfigDict, changes: Mapping[str, Any]) -> Any:
    """Return the model library of a config, once changed."""
    model = _at(config, "model")
    now = model.get("library") if isinstance(model, ConfigDict) else None
    return changes.get("model.library", now)


def keys_of(section: str, name: Any, library: Any = "linen") -> Parameters | None:
    """Return the arguments that are keys of a name in a section; None for an unknown name.

    Args:
      section: one of `SECTIONS`, such as "algorithm".
      name: in that section, such as "maml", or an import path.
      library: of a model.
    """
    own = is_import_path(name)
    if section == "algorithm" and (own or name in ALGORITHMS):
        build = find(ALGORITHMS, name, "algorithm", (Algorithm,))
        return _without(parameters(build), filled(build))
    if section == "dataset" and (own or name in DATASETS):
        read = find(DATASETS, name, "dataset", (Tasks,))
        shape = parameters(few_shot) if returns(read, ClassIndex) else {}
        return _without({**shape, **parameters(read)}, ("read", "split"))
    if section == "model":
        known = isinstance(library, str) and library in LIBRARIES
        networks = LIBRARIES[library].networks if known else {}
        if not own and name not in networks:
            return None
        takes = parameters(load(name, "network") if own else networks[name])
        if not own and "architecture" in takes:
            return _without(parameters(Architecture), ("vocabulary",))
        return _without(takes, FILLED)
    of_optax = isinstance(name, str) and name.rpartition(".")[0] in OPTAX
    if section.endswith("optimizer") and (own or of_optax or name in OPTIMIZERS):
        return parameters(optimizer_function(name))
    return None


def _without(takes: Parameters, filled: Iterable[str]) -> Parameters:
    return {name: parameter for name, parameter in takes.items() if name not in {*filled}}


def _renewed(
    old: ConfigDict, takes: Parameters, beside: Mapping[str, Any], values: Mapping[str, Any]
) -> ConfigDict:
    """Return a section with the keys of another name."""
    new = ConfigDict({"name": old.name})
    for key in [*beside, *(key for key in takes if key not in beside)]:
        if key in old and key != "name":
            new[key] = placeholder(old.get_type(key)) if old[key] is None else old[key]
        elif key in beside:
            new[key] = placeholder(float) if beside[key] is None else beside[key]
        elif takes[key].default is not inspect.Parameter.empty or key in values:
            _set_default(new, takes[key], values.get(key))
    return new


def _set_default(section: ConfigDict, parameter: inspect.Parameter, value: Any = None) -> None:
    """Add a key with the default of an argument, where a config can hold it."""
    default, kind = parameter.default, type_of(parameter, value)
    if default is None or default is inspect.Parameter.empty:
        section[parameter.name] = placeholder(kind)
    elif type(default) in (bool, str) or (type(default) is tuple and all(map(_plain, default))):
        section[parameter.name] = default
    elif type(default) in (int, float):
        section[parameter.name] = float(default) if kind is float else default
    elif isinstance(default, tuple):  # a function, as a signature shows it
        names = [name for name, function in OBJECTIVES.items() if default == (function,)]
        if names:
            section[parameter.name] = names[0]


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str)


def type_of(parameter: inspect.Parameter, value: Any = None) -> type:
    """Return the type of an argument's values, by its annotation, its default or a value."""
    if (kind := _annotated(parameter)) is not None:
        return kind
    for candidate in (parameter.default, value, _literal(value)):
        if type(candidate) in (tuple, float, int, bool):
            return type(candidate)
    return str


def _annotated(parameter: inspect.Parameter) -> type | None:
    """Return the type of an argument's values by its annotation; None: it does not say."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = (kind for word, kind in TYPES.items() if re.search(rf"\b{word}\b", text))
    return next(kinds, None)


def _literal(text: Any) -> Any:
    """Return what a word of the command line stands for; text that is no literal as it is."""
    try:
        return ast.literal_eval(text)
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _renew_engine_options(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Unset the options that another engine does not take, and add those of one's own engine."""
    name, changed = changes["engine"], _below("engine_options", changes)
    own = is_import_path(name)
    if not own and name not in (*ENGINES, "auto"):
        return
    takes = {} if name == "auto" else parameters(find(ENGINES, name, "engine", (MetaGradient,)))
    for key in config.engine_options:
        if key not in {*takes, *changed}:
            config.engine_options[key] = None
    for key in takes if own else ():
        if key not in config.engine_options:
            _set_default(config.engine_options, takes[key], changed.get(key))


def _below(section: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section that are set, and their values."""
    start = f"{section}."
    return {
        key.removeprefix(start).split(".")[0]: value
        for key, value in changes.items()
        if key.startswith(start)
    }


def _at(config: ConfigDict, key: str) -> Any:
    """Return what is at a dotted key; None where there is nothing, the config for an empty key."""
    for part in key.split(".") if key else ():
        if not isinstance(config, ConfigDict) or part not in config:
            return None
        config = config[part]
    return config


def _has(config: ConfigDict, key: str) -> bool:
    section, _, last = key.rpartition(".")
    inside = _at(config, section)
    return isinstance(inside, ConfigDict) and last in inside
