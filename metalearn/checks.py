"""Checks that many constructors make of their numbers, each refusal in the same words.

`what` is what got the value, as its user writes it: "MAML", "Text". None is a value that is
not set, and passes.
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
    for name, value in values.items():
        if value is not None and not (isinstance(value, numbers.Integral) and int(value) >= least):
            raise ValueError(f"`{what}({name}={value})`: it is an integer, {least} or more.")


def integers(what: str, **values: Any) -> None:
    """Raise ValueError for the first value that is no integer, None included.

    >>> integers("FewShot", ways=5, shots=1.0)
    Traceback (most recent call last):
    ValueError: `FewShot(shots=1.0)`: it is an integer, such as 1.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"`{what}({name}={value!r})`: it is an integer, such as 1.")


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
