"""The FLOPs of a compiled program, read off its HLO text.

XLA's own `cost_analysis()` counts the body of a loop once, and a meta-gradient is all
loops. Here a `while` counts its body as often as the compiler says it runs
(`known_trip_count`, which every `lax.scan` has), a fusion or call as what it holds, a
conditional as its dearest branch. What is counted are matrix products and convolutions:

    dot           2 x outputs x length of the contraction
    convolution   2 x outputs x kernel, less what falls on padding (`convolution.py`)

On a GPU a matrix product may be a call into cuBLAS, whose configuration says what it
contracts. A call whose name says that it multiplies, and nothing else can be read of,
raises `UnreadableError`: the caller counts on the jaxpr instead (`jaxpr.py`).
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

from metalearn.planning.cost import convolution

_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_LEFT = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|\S+)")
_MULTIPLIES = re.compile(r"gemm|matmul|conv|dot|attention|fmha|triton|mosaic|tpu_custom", re.I)

Shape = tuple[int, ...]


class UnreadableError(ValueError):
    """A custom call multiplies matrices, and its text does not say which."""


class Instruction(NamedTuple):
    """One line of HLO: %name = shape opcode(operands), attributes."""

    name: str
    shape: Shape  # of the result; of its first part, where that is a tuple
    opcode: str
    operands: list[str]
    attributes: str


def flops(text: str) -> int:
    """Return the FLOPs of `compiled.as_text()`: matrix products and convolutions.

    Raises:
      UnreadableError: for a custom call that multiplies and cannot be read.
    """
    entry, computations = _parse(text)

    @functools.cache
    def of(computation: str) -> int:
        shapes = {i.name: i.shape for i in computations[computation]}
        return sum(_flops(i, shapes, of) for i in computations[computation])

    return of(entry)


def unknown_loop(count: int) -> None:
    """Warn that a loop of an unknown number of steps is counted as one step."""
    warnings.warn(
        f"A loop whose number of steps the compiler does not know holds {count:,} FLOPs a step, "
        "and they are counted once. A `lax.scan`, or a `lax.fori_loop` over constants, is counted "
        "in full.",
        stacklevel=2,
    )


def _parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    entry = ""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        header, left = _HEADER.match(line), _LEFT.match(line)
        if header:
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif left:
            current.append(_instruction(left[1], left[2]))
    return entry, computations


def _instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    assert opcode is not None, text
    shape, rest = text[: opcode.start()], text[opcode.end() :]
    operands, _, attributes = rest.partition(")")  # the types of operands are not printed
    return Instruction(
        name, _shape(shape), opcode[1], re.findall(r"%([^\s,)]+)", operands), attributes
    )


def _shape(text: str) -> Shape:
    found = re.search(r"\[([\d,]*)\]", text)
    return _integers(found[1]) if found else ()


def _integers(text: str) -> Shape:
    return tuple(map(int, re.findall(r"\d+", text)))


def _flops(i: Instruction, shapes: dict[str, Shape], of: Callable[[str], int]) -> int:
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return _dot(i.shape, shapes[i.operands[0]], contracted[1] if contracted else "")
    if i.opcode == "convolution":
        return _convolution(i, *(shapes[name] for name in i.operands))
    if i.opcode == "custom-call":
        return _custom_call(i, shapes)
    if i.opcode == "while":
        return _while(i, of)
    inside = [of(name) for name in _called(i)]
    return max(inside, default=0) if i.opcode == "conditional" else sum(inside)


def _called(i: Instruction) -> list[str]:
    names = ",".join(_CALLED.findall(i.attributes))
    return re.findall(r"[^\s,%{}]+", names)


def _while(i: Instruction, of: Callable[[str], int]) -> int:
    body = re.search(r"\bbody=%?([^\s,]+)", i.attributes)
    assert body is not None, i
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
    count = of(body[1])
    if trips is None and count:
        unknown_loop(count)
    return count * int(trips[1]) if trips else count


def _dot(result: Shape, lhs: Shape, contracted: str) -> int:
    return 2 * math.prod(result) * math.prod(lhs[axis] for axis in _integers(contracted))


def _custom_call(i: Instruction, shapes: dict[str, Shape]) -> int:
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if target is None or not _MULTIPLIES.search(target[1]):
        return 0
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    if contracted is None:
        raise UnreadableError(f"The FLOPs of a call of {target[1]!r} cannot be read off the HLO.")
    return _dot(i.shape, shapes[i.operands[0]], contracted[1])


def _convolution(i: Instruction, lhs: Shape, rhs: Shape) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None, i
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    sizes = {key: value.split("x") for key, value in fields.items()}

    def field(key: str, axis: int, default: int) -> int:
        return int(sizes[key][axis].partition("_")[0]) if key in sizes else default

    windows = [
        convolution.Window(
            lhs[labels[1].index(str(axis))],
            rhs[labels[2].index(str(axis))],
            i.shape[labels[3].index(str(axis))],
            field("stride", axis, 1),
            field("pad", axis, 0),
            field("lhs_dilate", axis, 1),
            field("rhs_dilate", axis, 1),
        )
        for axis in range(len(sizes.get("size", [])))
    ]
    batch, features = i.shape[labels[3].index("b")], i.shape[labels[3].index("f")]
    return convolution.flops(batch, features, rhs[labels[2].index("i")], windows)
