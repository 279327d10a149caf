"""A progress bar over something of known length, such as files that are read."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def counted(
    values: Iterable[T], total: int, unit: str, what: str, shown: bool = True
) -> Iterable[T]:
    """Return the values, with a progress bar while they are iterated over.

    Args:
      values: `total` of them.
      total: their number.
      unit: what one of them is: "image".
      what: is done, for the bar: "reading data/train".
      shown: whether the bar is shown at all.
    """
    return tqdm(
        values,
        total=total,
        unit=unit,
        desc=what,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
    )
