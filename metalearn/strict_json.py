"""Reading JSON that somebody else wrote: what it holds, or one sentence about what is wrong.

`json.loads` answers text that is no JSON with the place alone, thousands of brackets with a
RecursionError, and takes NaN, keys that are set twice, and files of any size. A file that came
with a result, or by mail, is read by `parse`: whatever it is, a ValueError says so.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

LONGEST = 16 * 2**20  # bytes, or characters of text; what is read here is a few thousand
DEEPEST = 64  # lists and objects inside each other


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
