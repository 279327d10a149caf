"""Checks of the fields of a dataclass against their annotations.

Without them a wrong value fails where it is used, inside a compiled step and a library, with an
error that names neither the class nor the field. `check_fields(self)` at the head of a
`__post_init__` refuses it where the instance is made:

    `MAML(optimizer='adam')`: it is a GradientTransformation, not a str.
    `FDS(batch=0)`: it is an integer, 1 or more.

The second is of a field annotated `Count` (`metalearn._utils.checks`). `Any`, arrays and types
that are not known pass. Arguments of functions are checked by the functions of `checks`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
import optax

from metalearn._utils.checks import AtLeast, counts
from metalearn.model import Model, no_model

T = TypeVar("T")


class FieldError(TypeError, ValueError):
    """A field of the wrong type: a TypeError, and also a ValueError, for fields from a file."""


def check_fields(part: Any, *others: str, absent: Sequence[str] = ()) -> None:
    """Raise FieldError for the first field of a dataclass whose value is not of its type.

    Args:
      part: an instance. If some of its fields are static, the others are arrays, not checked.
      *others: fields that the class checks itself, except for None.
      absent: fields that may be None, even if their annotation excludes it.
    """
    for name, hint in _hints(part.__class__).items():
        value = vars(part)[name]
        if value is not None and (bound := _bound(hint)) is not None:
            counts(type(part).__name__, bound.least, **{name: value})
            continue
        if name in (absent if value is None else others) or _fits(hint, value):
            continue
        what = f"{type(part).__name__}({name}={_shown(value)})"
        if hint is Model:
            raise FieldError(no_model(what, value))
        raise FieldError(f"`{what}`: it is {_said(hint)}, not {_kind(value)}.")


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass: its constructor refuses old names of its fields, old="new".

    >>> @renamed_fields(rate="learning_rate")
    ... @dataclasses.dataclass
    ... class Descent:
    ...     learning_rate: float
    >>> Descent(rate=0.1)
    Traceback (most recent call last):
    TypeError: `Descent(rate=)` is called `learning_rate` now: `Descent(learning_rate=0.1)`.
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **fields: Any) -> None:
            for old in names.keys() & fields.keys():
                what, new = cls.__name__, names[old]
                raise TypeError(
                    f"`{what}({old}=)` is called `{new}` now: "
                    f"`{what}({new}={_shown(fields[old])})`."
                )
            init(self, *args, **fields)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of the fields that are not arrays, by name."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if any(field.metadata.get("static") for field in fields):  # the others are arrays
        fields = [field for field in fields if field.metadata.get("static")]
    hints = {}
    for field in fields:
        owner = next(c for c in cls.__mro__ if field.name in c.__dict__.get("__annotations__", {}))
        scope = vars(inspect.getmodule(owner))
        try:
            hints[field.name] = (
                eval(field.type, dict(scope)) if isinstance(field.type, str) else field.type
            )
        except NameError:  # a name that is imported for type checkers only
            continue
    return hints


def _bound(hint: Any) -> AtLeast | None:
    """Return the bound in the annotation of a count, or of one that may be None."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    bounds = [m for option in options for m in getattr(option, "__metadata__", ())]
    return next((bound for bound in bounds if isinstance(bound, AtLeast)), None)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(hint: Any, value: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(inside[0], value)
    if _is_union(hint):
        return any(_fits(option, value) for option in inside)
    if origin is tuple:
        if not isinstance(value, tuple | list):  # a list does, where it need not be hashed
            return False
        if inside[-1:] == (...,):
            return all(_fits(inside[0], one) for one in value)
        return len(inside) == len(value) and all(map(_fits, inside, value))
    if hint is Callable or origin is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(inside[1], x) for x in value.values())
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        scalar = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
        return scalar or isinstance(value, numbers.Real)
    if hint is int:
        return isinstance(value, numbers.Integral)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is optax.GradientTransformation:  # as a tuple of two, or an object like `MultiSteps`
        return isinstance(value, hint) or _transforms(value)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _transforms(value: Any) -> bool:
    both = (getattr(value, name, None) for name in ("init", "update"))
    return not isinstance(value, type) and all(map(callable, both))


def _said(hint: Any) -> str:
    """Return a type in words, for a message."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _said(inside[0])
    if _is_union(hint):
        return " or ".join(_said(option) for option in inside)
    if origin is tuple:
        each = [_said(one) for one in inside if one is not ...]
        same = inside[-1:] == (...,)
        return f"a tuple, each {each[0]}" if same else f"a tuple ({', '.join(each)})"
    if hint is Callable or origin is collections.abc.Callable:
        return "a function"
    if origin is collections.abc.Mapping:
        return f"a dictionary of {_said(inside[1])} by name"
    if hint is None or hint is type(None):
        return "None"
    known = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}
    return known.get(hint, _article(getattr(hint, "__name__", str(hint))))


def _kind(value: Any) -> str:
    """Return the type of a value in words, for a message."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if isinstance(value, tuple | list) and value:
        return f"a {name} ({', '.join(dict.fromkeys(type(x).__name__ for x in value))})"
    return _article(name)


def _article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def _shown(value: Any, longest: int = 60) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
