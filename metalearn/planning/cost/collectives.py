"""What a compiled program sends between devices, read off its HLO text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_CALL = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction that all devices of a group take part in."""

    kind: str  # such as "all-reduce"
    size: int  # bytes of the result, on one device


def collectives(text: str) -> list[Collective]:
    """Return those of `compiled.as_text()`; one inside a loop counts once.

    >>> collectives("  %sum = (f32[3,4]{1,0}, s32[]) all-reduce(%a, %b), channel_id=1")
    [Collective(kind='all-reduce', size=52)]
    """
    return [Collective(kind, _bytes(shape)) for shape, kind in _CALL.findall(text)]


def _bytes(shape: str) -> int:
    parts = _SHAPE.findall(shape)
    return sum(
        _width(bits) * math.prod(map(int, filter(None, d.split(",")))) for _, bits, d in parts
    )


def _width(bits: str) -> int:
    return max(int(bits or 8) // 8, 1)  # pred[] has no number, and takes a byte
