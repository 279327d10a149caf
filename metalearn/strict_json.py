"""JSON that every reader takes: RFC 8259 has no NaN and no infinities, so they are text.

    nan, inf, -inf  <->  "NaN", "Infinity", "-Infinity"

Text that reads so by itself has a backslash before it, and `loads` takes it away: what comes
back is what was written. `loads` also reads the bare NaN that Python's own `json` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any, **options: Any) -> str:
    """Return a value as strict JSON; `options` as those of `json.dumps`."""
    return json.dumps(plain(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return what `dumps` wrote, or any other JSON.

    Raises:
      ValueError: if that is no JSON, no UTF-8, or is nested too deeply.
    """
    try:
        return restored(json.loads(text.decode() if isinstance(text, bytes) else text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def plain(value: Any) -> Any:
    """Return a tree of JSON with text for each float that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value.lstrip("\\") in NONFINITE:
        return f"\\{value}"
    return _each(plain, value)


def restored(value: Any) -> Any:
    """Return a tree with the floats that `plain` made text of."""
    if isinstance(value, str) and value.lstrip("\\") in NONFINITE:
        return value[1:] if value.startswith("\\") else NONFINITE[value]
    return _each(restored, value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(each) for key, each in value.items()}
    return [change(each) for each in value] if isinstance(value, list | tuple) else value
