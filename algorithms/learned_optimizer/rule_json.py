"""An update rule to JSON and back, by literal tables of names.

    PerParameter(base=TunedRule(functools.partial(optax.adam, b1=0.95), {...}))

    {"class": "PerParameter", "fields": {"base": {"class": "TunedRule", "fields": {
        "make": {"partial": {"optimizer": "optax.adam"}, "args": [], "keywords": {"b1": 0.95}},
        "hyperparameters": {"mapping": {...}}}}, ...}}

Lists stand for tuples. Names are looked up in the tables here and among the classes that the caller
passes, and are never imported: loading a file executes no code from it.

A short rule can describe a large network: a list of 20,000 widths is 60 kB of JSON, and a network
of 20,000 layers takes minutes to build. But every layer has its weights in the same file, and every
width is the length of one of their axes. So `check_bounds` compares a rule with the weights before
anything is built from it; size and time are then in proportion to the size of the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import optax

from metalearn._utils.checks import nearest, pick
from metalearn.algorithms.fds.hyperparameter import Hyperparameter
from metalearn.algorithms.learned_optimizer import features
from metalearn.algorithms.learned_optimizer.hypergradient_rule import HypergradientRule
from metalearn.algorithms.learned_optimizer.mirror_descent import MirrorDescent
from metalearn.algorithms.learned_optimizer.networks import PointwiseGRU, PointwiseMLP
from metalearn.algorithms.learned_optimizer.per_parameter import PerParameter
from metalearn.algorithms.learned_optimizer.tuned_rule import TunedRule
from metalearn.algorithms.sgd import sgd

CLASSES: dict[str, type] = {
    "FactoredMoments": features.FactoredMoments,
    "Gradient": features.Gradient,
    "HypergradientRule": HypergradientRule,
    "Hyperparameter": Hyperparameter,
    "MirrorDescent": MirrorDescent,
    "Momenta": features.Momenta,
    "ParameterScale": features.ParameterScale,
    "ParameterValue": features.ParameterValue,
    "PerParameter": PerParameter,
    "PointwiseGRU": PointwiseGRU,
    "PointwiseMLP": PointwiseMLP,
    "ReciprocalRoot": features.ReciprocalRoot,
    "SecondMoments": features.SecondMoments,
    "StepFeatures": features.StepFeatures,
    "TunedRule": TunedRule,
}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "metalearn.sgd": sgd,
    "optax.adabelief": optax.adabelief,
    "optax.adadelta": optax.adadelta,
    "optax.adafactor": optax.adafactor,
    "optax.adagrad": optax.adagrad,
    "optax.adam": optax.adam,
    "optax.adamax": optax.adamax,
    "optax.adamaxw": optax.adamaxw,
    "optax.adamw": optax.adamw,
    "optax.adan": optax.adan,
    "optax.amsgrad": optax.amsgrad,
    "optax.fromage": optax.fromage,
    "optax.lamb": optax.lamb,
    "optax.lars": optax.lars,
    "optax.lion": optax.lion,
    "optax.nadam": optax.nadam,
    "optax.nadamw": optax.nadamw,
    "optax.novograd": optax.novograd,
    "optax.radam": optax.radam,
    "optax.rmsprop": optax.rmsprop,
    "optax.sgd": optax.sgd,
    "optax.sign_sgd": optax.sign_sgd,
    "optax.sm3": optax.sm3,
    "optax.yogi": optax.yogi,
}

PARTS: dict[str, dict[str, Any]] = {  # the keys of each kind of JSON object, and their types
    "class": {"class": str, "fields": dict},
    "mapping": {"mapping": dict},
    "optimizer": {"optimizer": str},
    "partial": {"partial": dict, "args": list, "keywords": dict},
}
MOST_PARTS_DEEP = 32  # parts of a rule inside each other
MOST_JSON_DEEP = 64  # lists and objects inside each other; a rule over three others has 20
LONGEST_NAME = 1000  # characters
SPARE_LAYERS = 16  # layers without weights that are built, for an error that names them


def encode(part: Any) -> Any:
    """Return a rule, or a part of one, as the objects that `json` writes.

    Raises:
      ValueError: for a part that cannot be written, with the way out.
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, np.generic):
        return part.item()
    if isinstance(part, tuple):
        return [encode(x) for x in part]
    if isinstance(part, Mapping) and all(isinstance(name, str) for name in part):
        return {"mapping": {name: encode(x) for name, x in part.items()}}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return _encode_dataclass(part)
    for name, optimizer in OPTIMIZERS.items():
        if part is optimizer:
            return {"optimizer": name}
    if isinstance(part, functools.partial):
        keywords = {name: encode(x) for name, x in part.keywords.items()}
        return {"partial": encode(part.func), "args": encode(part.args), "keywords": keywords}
    raise ValueError(
        f"{part!r} cannot be written to a file: rules are saved as numbers, texts, tuples, frozen "
        f"dataclasses and optimizers by name ({', '.join(OPTIMIZERS)}). Make it a frozen "
        "dataclass, an `UpdateRule` of your own, and load with `known=(MyRule,)`."
    )


def decode(parsed: Any, known: Iterable[type] = ()) -> Any:
    """Return the rule, or the part of one, that parsed JSON describes.

    Args:
      parsed: the objects that `json` read.
      known: further dataclasses that may be parts of the rule.

    Raises:
      ValueError: for a class or an optimizer that is neither in the tables nor known, for anything
        that is not a part of a rule, and for values that a part refuses.
    """
    return _decode(parsed, {**_by_name(known), **CLASSES}, MOST_PARTS_DEEP)


def _decode(parsed: Any, classes: Mapping[str, type], depth: int) -> Any:
    if not depth:
        raise ValueError(f"No update rule has parts inside each other {MOST_PARTS_DEEP} deep.")

    def inside(part: Any) -> Any:
        return _decode(part, classes, depth - 1)

    if isinstance(parsed, list):
        return tuple(inside(x) for x in parsed)
    if not isinstance(parsed, dict):
        return parsed
    kind = next((kind for kind in PARTS if kind in parsed), None)
    if kind is None or parsed.keys() != PARTS[kind].keys():
        raise ValueError(f"This is no part of an update rule: {str(parsed)[:80]}")
    for key, expected in PARTS[kind].items():
        if not isinstance(parsed[key], expected):
            raise ValueError(f"{key!r} of a part of an update rule is not {parsed[key]!r:.80}.")
    if kind == "class":
        fields = parsed["fields"]
        cls = _class(parsed["class"], fields, classes)
        return _build(parsed["class"], cls, (), {name: inside(x) for name, x in fields.items()})
    if kind == "mapping":
        return {name: inside(x) for name, x in parsed["mapping"].items()}
    if kind == "optimizer":
        return pick(OPTIMIZERS, parsed["optimizer"], "optimizer that can be loaded")
    make, args = inside(parsed["partial"]), inside(parsed["args"])
    if not callable(make):
        raise ValueError(f"Only an optimizer has arguments, not {make!r:.80}.")
    keywords = {name: inside(x) for name, x in parsed["keywords"].items()}
    return _build("optimizer with arguments", functools.partial, (make, *args), keywords)


def _build(what: str, make: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Return `make(*args, **keywords)`; ValueError, with the reason, if it refuses the values."""
    try:
        return make(*args, **keywords)
    except Exception as error:  # of a class or NumPy: the file may hold any value
        raise ValueError(f"No {what} can be made of what the file holds: {error}") from error


def _encode_dataclass(part: Any) -> dict[str, Any]:
    cls: Any = type(part)
    name = cls.__name__
    if CLASSES.get(name, cls) is not cls:
        raise ValueError(
            f"A class of yours is called {name!r}, as one of metalearn's is, which would be loaded "
            "in its place. Rename it."
        )
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    return {"class": name, "fields": {field: encode(vars(part)[field]) for field in fields}}


def _class(name: str, fields: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    """Return the class with this name; ValueError unless its fields are those of the file."""
    if name not in classes:
        raise ValueError(
            f"The file holds a {name!r}, which is no class of metalearn's.{nearest(name, classes)} "
            f"Pass your own: `known=({name},)`."
        )
    cls: Any = classes[name]
    own = [field for field in dataclasses.fields(cls) if field.init]
    none = dataclasses.MISSING  # a field that a later version adds has the default of before
    required = {f.name for f in own if f.default is none and f.default_factory is none}
    names = [field.name for field in own]
    if not required <= set(fields) <= set(names):
        raise ValueError(
            f"The file's {name} has the fields {', '.join(fields)}, and the one here "
            f"{', '.join(names)}. Load it with the version it was saved by."
        )
    return cls


def _by_name(known: Iterable[type]) -> dict[str, type]:
    """Return the caller's own classes by name; an error for those that cannot be parts."""
    known = tuple(known)
    for cls in known:
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise TypeError(f"`known` holds dataclasses, not {cls!r}. Write `known=(MyRule,)`.")
        if CLASSES.get(cls.__name__, cls) is not cls:
            raise ValueError(f"metalearn has a class {cls.__name__!r} too. Rename yours.")
    return {cls.__name__: cls for cls in known}


def check_bounds(what: str, rule: str, weights: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if a rule describes larger networks than the weights beside it.

    Args:
      what: the source of the rule, for the message.
      rule: as JSON. Other errors in it are left to `decode`.
      weights: the arrays of the same file, by path.
    """
    try:
        parsed = json.loads(rule)
    except RecursionError as error:
        raise _too_deep(what) from error
    except ValueError:
        return
    largest = max((array.size for array in weights.values()), default=0)
    layers, width = 0, 0
    pending = [(parsed, 1)]
    while pending:
        part, depth = pending.pop()
        if depth > MOST_JSON_DEEP:
            raise _too_deep(what)
        if isinstance(part, str) and len(part) > LONGEST_NAME:
            raise _too_long(what, len(part))
        inside = part if isinstance(part, list) else []
        if isinstance(part, dict):
            if (longest := max(map(len, part), default=0)) > LONGEST_NAME:
                raise _too_long(what, longest)
            inside = list(part.values())
            part_layers, part_width = _network(part)
            layers, width = layers + part_layers, max(width, part_width)
        pending += [(value, depth + 1) for value in inside]
    if layers > len(weights) + SPARE_LAYERS:
        raise ValueError(
            f"{what} holds {len(weights)} arrays, and a rule whose networks have {layers} layers, "
            "each with a matrix and a bias. It was not written by `save_optimizer`."
        )
    if width > largest:
        raise ValueError(
            f"{what} holds arrays of {largest} numbers at most, and a rule with a network that is "
            f"{width} wide. It was not written by `save_optimizer`."
        )


def _network(part: Mapping[str, Any]) -> tuple[int, int]:
    """Return (layers, the largest width) of a part that is one of the built-in networks, else 0."""
    fields = part.get("fields")
    if part.get("class") not in ("PointwiseMLP", "PointwiseGRU") or not isinstance(fields, dict):
        return 0, 0
    hidden = fields.get("hidden", [])
    widths = hidden if isinstance(hidden, list) else [hidden]
    return len(widths) + 1, max((n for n in widths if isinstance(n, int)), default=0)


def _too_deep(what: str) -> ValueError:
    return ValueError(
        f"{what} holds a rule of parts in parts, more than {MOST_JSON_DEEP} deep, as no rule is. "
        "It was not written by `save_optimizer`."
    )


def _too_long(what: str, length: int) -> ValueError:
    return ValueError(
        f"{what} holds a rule with a name of {length} characters, and the longest have "
        f"{LONGEST_NAME}. It was not written by `save_optimizer`."
    )
