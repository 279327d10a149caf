"""An update rule as JSON, and back, by literal tables of names.

    PerParameter(base=TunedRule(functools.partial(optax.adam, b1=0.95), {...}))

    {"class": "PerParameter", "fields": {"base": {"class": "TunedRule", "fields": {
        "make": {"partial": {"optimizer": "optax.adam"}, "args": [], "keywords": {"b1": 0.95}},
        "hyperparameters": {"mapping": {...}}}}, ...}}

Lists stand for tuples. What is read is looked up in the tables and in what the reader passes,
never imported by its name: a file names classes of this library, and runs nothing of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import optax

from metalearn._utils.checks import nearest, pick
from metalearn.algorithms.fds.hyperparameter import Hyperparameter
from metalearn.algorithms.learned_optimizer.features import (
    FactoredMoments,
    Gradient,
    Momenta,
    ParameterScale,
    ParameterValue,
    ReciprocalRoot,
    SecondMoments,
    StepFeatures,
)
from metalearn.algorithms.learned_optimizer.hypergradient_rule import HypergradientRule
from metalearn.algorithms.learned_optimizer.networks import PointwiseGRU, PointwiseMLP
from metalearn.algorithms.learned_optimizer.per_parameter import PerParameter
from metalearn.algorithms.learned_optimizer.tuned_rule import TunedRule
from metalearn.algorithms.sgd import sgd

CLASSES: dict[str, type] = {
    "FactoredMoments": FactoredMoments,
    "Gradient": Gradient,
    "HypergradientRule": HypergradientRule,
    "Hyperparameter": Hyperparameter,
    "Momenta": Momenta,
    "ParameterScale": ParameterScale,
    "ParameterValue": ParameterValue,
    "PerParameter": PerParameter,
    "PointwiseGRU": PointwiseGRU,
    "PointwiseMLP": PointwiseMLP,
    "ReciprocalRoot": ReciprocalRoot,
    "SecondMoments": SecondMoments,
    "StepFeatures": StepFeatures,
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

PARTS: dict[str, dict[str, Any]] = {  # what stands for more than a value, and what is in it
    "class": {"class": str, "fields": dict},
    "mapping": {"mapping": dict},
    "optimizer": {"optimizer": str},
    "partial": {"partial": dict, "args": list, "keywords": dict},
}
DEEPEST = 32  # parts inside each other


def encode(part: Any) -> Any:
    """Return a rule, or a part of one, as what `json` writes.

    Raises:
      ValueError: for a part that could not be read back, with the way out.
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


def decode(found: Any, known: Iterable[type] = ()) -> Any:
    """Return the rule, or part of one, that JSON stands for.

    Args:
      found: what `json` read.
      known: dataclasses beside those of this library.

    Raises:
      ValueError: for a class or an optimizer that is neither in the tables nor known, and for
        anything that is no part of a rule, or of which none can be made.
    """
    return _decode(found, {**_by_name(known), **CLASSES}, DEEPEST)


def _decode(found: Any, classes: Mapping[str, type], deepest: int) -> Any:
    if not deepest:
        raise ValueError(f"No update rule has parts inside each other {DEEPEST} deep.")

    def inside(part: Any) -> Any:
        return _decode(part, classes, deepest - 1)

    if isinstance(found, list):
        return tuple(inside(x) for x in found)
    if not isinstance(found, dict):
        return found
    kind = next((kind for kind in PARTS if kind in found), None)
    if kind is None or found.keys() != PARTS[kind].keys():
        raise ValueError(f"This is no part of an update rule: {str(found)[:80]}")
    for key, takes in PARTS[kind].items():
        if not isinstance(found[key], takes):
            raise ValueError(f"{key!r} of a part of an update rule is not {found[key]!r:.80}.")
    if kind == "class":
        fields = found["fields"]
        cls = _class(found["class"], fields, classes)
        return _made(found["class"], cls, (), {name: inside(x) for name, x in fields.items()})
    if kind == "mapping":
        return {name: inside(x) for name, x in found["mapping"].items()}
    if kind == "optimizer":
        return pick(OPTIMIZERS, found["optimizer"], "optimizer that can be loaded")
    make, args = inside(found["partial"]), inside(found["args"])
    if not callable(make):
        raise ValueError(f"Only an optimizer has arguments, not {make!r:.80}.")
    keywords = {name: inside(x) for name, x in found["keywords"].items()}
    return _made("optimizer with arguments", functools.partial, (make, *args), keywords)


def _made(what: str, make: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Call what makes a part; ValueError, with the reason, for values that it cannot be made of."""
    try:
        return make(*args, **keywords)
    except Exception as error:  # of a class or of NumPy: a file may hold anything
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
    """Return the class of a name, once its fields are those that the file has."""
    if name not in classes:
        raise ValueError(
            f"The file holds a {name!r}, which is no class of metalearn's.{nearest(name, classes)} "
            f"Pass your own: `known=({name},)`."
        )
    cls: Any = classes[name]
    taken = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if not _required(taken.values()) <= set(fields) <= set(taken):
        raise ValueError(
            f"The file's {name} has the fields {', '.join(fields)}, and the one here "
            f"{', '.join(taken)}. Load it with the version it was saved by."
        )
    return cls


def _required(fields: Iterable[dataclasses.Field[Any]]) -> set[str]:
    """Return those without a default: one that has been added since has that of then."""
    none = dataclasses.MISSING
    return {f.name for f in fields if f.default is none and f.default_factory is none}


def _by_name(known: Iterable[type]) -> dict[str, type]:
    known = tuple(known)
    for cls in known:
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise TypeError(f"`known` holds dataclasses, not {cls!r}. Write `known=(MyRule,)`.")
        if CLASSES.get(cls.__name__, cls) is not cls:
            raise ValueError(f"metalearn has a class {cls.__name__!r} too. Rename yours.")
    return {cls.__name__: cls for cls in known}
