"""Looking a name up in a table, and saying which names there are where it is not one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`, or raise a ValueError that lists the names there are.

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
    """Return " Did you mean ...?" for a close match, and "" where nothing is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
