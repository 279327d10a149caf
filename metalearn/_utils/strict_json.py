"""JSON that every reader takes, and JSON that somebody else wrote.

RFC 8259 has no NaN and no infinities, so `dumps` writes them as text:

    nan, inf, -inf  <->  "NaN", "Infinity", "-Infinity"

Text that reads so by itself gets a backslash before it, and `loads` removes it: what comes back is
what was written. `loads` also reads the bare NaN that Python's own `json` writes.

A file that came with a result, or by mail, is read by `parse`. `json.loads` answers text that is
not JSON with the place alone, thousands of brackets with a RecursionError, and takes NaN, keys
that are set twice, and files of any size; `parse` raises a ValueError that says what is wrong.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LONGEST = 16 * 2**20  # bytes, or characters of text; what is read here is a few thousand
DEEPEST = 64  # lists and objects inside each other


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


def read(path: pathlib.Path, what: str) -> Any:
    """Return what the JSON of a file stands for; see `parse`. A file too long is not read."""
    if path.stat().st_size > LONGEST:
        raise _too_long(what)
    return parse(path.read_bytes(), what)


def parse(source: bytes | str, what: str, *, nonfinite: bool = False) -> Any:
    """Return what a JSON text stands for.

    Args:
      source: the text, or its bytes: UTF-8, with a byte order mark or without one.
      what: where it is from, for messages, such as the path of a file.
      nonfinite: whether NaN and Infinity may be in it, which are no JSON but Python's.

    Raises:
      ValueError: where it is no JSON, too long or too deep, or sets a key twice.
    """
    if len(source) > LONGEST:
        raise _too_long(what)
    try:
        text = source if isinstance(source, str) else source.decode("utf-8-sig")
        found = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_once,
            parse_constant=None if nonfinite else _refuse_constant,
        )
    except RecursionError as error:
        raise _too_deep(what) from error
    except ValueError as error:  # of the decoder, of JSON, or of an integer of 5,000 digits
        raise ValueError(f"{what} is not JSON: {error}") from error
    _check_depth(found, what)
    return found


def _too_long(what: str) -> ValueError:
    return ValueError(
        f"{what} is longer than {LONGEST:,} bytes, which nothing that we write is. It is another "
        "file, or is damaged."
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is set twice.")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON, which has finite numbers alone.")


def _check_depth(found: Any, what: str) -> None:
    """Raise ValueError where lists and objects are too many inside each other; no recursion."""
    level = [found]
    for _ in range(DEEPEST + 1):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [x for each in nested for x in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise _too_deep(what)


def _too_deep(what: str) -> ValueError:
    return ValueError(
        f"{what} is not JSON of ours: lists or objects are inside each other more than {DEEPEST} "
        "deep, and nothing that we write is."
    )
