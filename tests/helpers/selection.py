"""Which cases of a parametrized test `make test` runs; `make test-all` runs the others too."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], where: Callable[..., bool]) -> list[Any]:
    """Mark those values slow, tuples of arguments or single ones, that are not `where`."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[] if where(*row) else pytest.mark.slow) for row in rows]
