"""What others' errors say, made short enough to be a part of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
