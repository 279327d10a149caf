"""Strict JSON: writing it for any reader, and parsing files from others.

RFC 8259 has no NaN and no infinities, so `dumps` writes them as text:

    nan, inf, -inf  <->  "NaN", "Infinity", "-Infinity"

A string equal to one of these texts is escaped by a backslash, which `loads` removes, so that a
round trip changes nothing. `loads` also reads the bare NaN that Python's `json` writes.

`parse` reads files from others. `json.loads` reports only the position of an error, raises
RecursionError for thousands of brackets, and accepts NaN, duplicate keys and files of any size;
`parse` raises a ValueError that says what is wrong.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LONGEST = 16 * 2**20  # bytes, or characters of text; usual files have a few thousand
DEEPEST = 64  # nested lists and objects


def dumps(value: Any, **options: Any) -> str:
    """Return a value as strict JSON; `options` are those of `json.dumps`."""
    return json.dumps(plain(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return the value of a text that `dumps` wrote, or of any other JSON.

    Raises:
      ValueError: if it is not JSON or not UTF-8, or is nested too deeply.
    """
    try:
        return restored(json.loads(text.decode() if isinstance(text, bytes) else text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def plain(value: Any) -> Any:
    """Return a JSON tree with text in place of non-finite floats."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value.lstrip("\\") in NONFINITE:
        return f"\\{value}"
    return _each(plain, value)


def restored(value: Any) -> Any:
    """Return a JSON tree with the floats that `plain` replaced by text."""
    if isinstance(value, str) and value.lstrip("\\") in NONFINITE:
        return value[1:] if value.startswith("\\") else NONFINITE[value]
    return _each(restored, value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(each) for key, each in value.items()}
    return [change(each) for each in value] if isinstance(value, list | tuple) else value


def read(path: pathlib.Path, what: str) -> Any:
    """Return the value of a JSON file; see `parse`. A file that is too long is not read."""
    if path.stat().st_size > LONGEST:
        raise _too_long(what)
    return parse(path.read_bytes(), what)


def parse(source: bytes | str, what: str, *, nonfinite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
      source: the text, or its bytes: UTF-8, with or without a byte order mark.
      what: the source, for messages, such as the path of a file.
      nonfinite: accept NaN and Infinity, which Python writes and JSON lacks.

    Raises:
      ValueError: if it is not JSON, too long or nested too deeply, or has a duplicate key.
    """
    if len(source) > LONGEST:
        raise _too_long(what)
    try:
        text = source if isinstance(source, str) else source.decode("utf-8-sig")
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_once,
            parse_constant=None if nonfinite else _refuse_constant,
        )
    except RecursionError as error:
        raise _too_deep(what) from error
    except ValueError as error:  # of the decoder, of JSON, or of an integer of 5,000 digits
        raise ValueError(f"{what} is not JSON: {error}") from error
    _check_depth(value, what)
    return value


def _too_long(what: str) -> ValueError:
    return ValueError(
        f"{what} is longer than {LONGEST:,} bytes, which nothing that we write is. It is another "
        "file, or is damaged."
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} is set twice.")
        values[name] = value
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON, which has finite numbers alone.")


def _check_depth(value: Any, what: str) -> None:
    """Raise ValueError if lists and objects are nested too deeply; without recursion."""
    level = [value]
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
