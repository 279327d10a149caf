"""Checks that many constructors make of their numbers, each refusal in the same words.

`what` is what got the value, as its user writes it: "MAML", "Text". None is a value that is
not set, and passes, but where a count is needed.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from typing import Any


def at_least(what: str, least: int, **values: Any) -> None:
    """Raise ValueError for the first value that is no integer, or below `least`.

    >>> at_least("FDS", 1, batch=32, horizon=1e4)
    Traceback (most recent call last):
    ValueError: `FDS(horizon=10000.0)`: it is an integer, 1 or more.
    """
    counts(what, least, **{name: value for name, value in values.items() if value is not None})


def counts(what: str, least: int, **values: Any) -> None:
    """Do the same for values that have to be set. A boolean is no integer here."""
    for name, value in values.items():
        if not (is_integer(value) and int(value) >= least):
            raise ValueError(f"`{what}({name}={value!s:.80})`: it is an integer, {least} or more.")


def is_integer(value: Any) -> bool:
    """Say whether a value is an integer, of Python's or of NumPy's; a boolean is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def above(what: str, bound: float, **values: float | None) -> None:
    """Raise ValueError for the first value that is not a finite number above `bound`."""
    for name, value in values.items():
        if value is not None and not bound < value < math.inf:
            raise ValueError(f"`{what}({name}={value})`: it is a number above {bound}.")


def widths(what: str, **values: Iterable[Any]) -> None:
    """Raise ValueError unless each value holds the widths of layers, positive integers.

    >>> widths("MLP", hidden=(32, 0))
    Traceback (most recent call last):
    ValueError: `MLP(hidden=(32, 0))`: a width is an integer, 1 or more, as in hidden=(32, 32).
    """
    for name, found in values.items():
        found = tuple(found)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in found):
            raise ValueError(
                f"`{what}({name}={found})`: a width is an integer, 1 or more, as in "
                f"{name}=(32, 32)."
            )


def pattern(what: str, **values: str) -> None:
    """Raise ValueError unless each value is a regular expression."""
    for name, value in values.items():
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"`{what}({name}={value!r})`: it is no regular expression: {error}."
            ) from error
