"""Checks of arguments, with uniform messages; lookups of names in tables.

`what` is the class or function that received the value, as its user writes it: "MAML", "Text".
None is an unset value, and passes except in `counts` and `integers`. `pick` looks up a name in a
table; `first_line` shortens the message of another library's error.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple, TypeGuard, TypeVar

MOST_TASKS = 10_000_000  # of an outer step, or of an evaluation: each has a key
LONGEST_PATTERN = 300
MOST_REPEATS = 3


class AtLeast(NamedTuple):
    """The bound of an integer, in an annotation."""

    least: int


Count = Annotated[int, AtLeast(1)]  # a field that `metalearn._utils.fields.check_fields` checks
CountOrZero = Annotated[int, AtLeast(0)]


def at_least(what: str, least: int, **values: Any) -> None:
    """Raise ValueError for the first value that is not an integer, or below `least`.

    >>> at_least("FDS", 1, batch=32, inner_steps=1e4)
    Traceback (most recent call last):
    ValueError: `FDS(inner_steps=10000.0)`: it is an integer, 1 or more.
    """
    counts(what, least, **{name: value for name, value in values.items() if value is not None})


def counts(what: str, least: int, **values: Any) -> None:
    """Like `at_least`, for values that must be set. A boolean does not count as an integer."""
    for name, value in values.items():
        if not (is_integer(value) and int(value) >= least):
            raise ValueError(f"`{what}({name}={value!s:.80})`: it is an integer, {least} or more.")


def at_most(what: str, most: int, **values: Any) -> None:
    """Raise ValueError for the first value above `most`.

    >>> at_most("ConvNet", 1000, blocks=10**9)
    Traceback (most recent call last):
    ValueError: `ConvNet(blocks=1000000000)`: it is 1000 at most.
    """
    for name, value in values.items():
        if value is not None and value > most:
            raise ValueError(f"`{what}({name}={value})`: it is {most} at most.")


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer of Python or NumPy; a boolean is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integers(what: str, **values: Any) -> None:
    """Raise ValueError for the first value that is not an integer, None included.

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
    """Raise ValueError unless each value is a sequence of layer widths, positive integers.

    >>> widths("MLP", hidden=(32, 0))
    Traceback (most recent call last):
    ValueError: `MLP(hidden=(32, 0))`: a width is an integer, 1 or more, as in hidden=(32, 32).
    """
    for name, value in values.items():
        sizes = tuple(value)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
            raise ValueError(
                f"`{what}({name}={sizes})`: a width is an integer, 1 or more, as in "
                f"{name}=(32, 32)."
            )


def pattern(what: str, **values: str) -> None:
    """Raise ValueError unless each value is a usable regular expression; see `unusable`."""
    for name, value in values.items():
        if reason := unusable(value):
            raise ValueError(f"`{what}({name}={value!r:.80})`: {reason}")


def unusable(pattern: Any) -> str:
    """Return why a value is not a usable pattern for the paths of parameters; "" if it is.

    A pattern is a regular expression, such as "head" or "kernel$|bias$". It may come from another
    user's config, and a short one, "(a+)+$", can take exponential time. So a pattern may have at
    most three repeats and groups, and no repeated group: matching then takes at most the fourth
    power of the length of a path, fractions of a second.

    >>> unusable("head"), unusable("(a+)+$")[:38]
    ('', 'it repeats a group, which can take lon')
    """
    if not isinstance(pattern, str):
        return f"it is a text, a regular expression, not {type(pattern).__name__}."
    if len(pattern) > LONGEST_PATTERN:
        return f"it has {len(pattern):,} characters, and {LONGEST_PATTERN} at most."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # future changes of the syntax
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"it is no regular expression: {error}."
    way_out = 'Write parts of paths, such as "head" or "body/.*/kernel$|head".'
    if re.search(r"\)[*+?{]", pattern):
        return f"it repeats a group, which can take longer than the run. {way_out}"
    if sum(map(pattern.count, "*+?{(")) > MOST_REPEATS:
        return f"it has more than {MOST_REPEATS} repeats and groups, which can take long. {way_out}"
    return ""


T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`, or raise a ValueError that lists all names.

    >>> pick({"maml": 1, "fds": 2}, "mamml", "algorithm")
    Traceback (most recent call last):
    ValueError: No algorithm is called 'mamml'. Did you mean 'maml'? There are: fds, maml.
    """
    if not isinstance(name, str) or name not in table:
        known = ", ".join(sorted(table))
        hint = nearest(name, table)
        raise ValueError(f"No {what} is called {name!r}.{hint} There are: {known}.")
    return table[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a close match, and "" if there is none."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
