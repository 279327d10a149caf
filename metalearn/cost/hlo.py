"""The FLOPs and the collectives of a compiled program, read from its HLO text.

XLA's own `cost_analysis()` counts the body of a loop once, and a meta-gradient consists of loops.
Here the body of a `while` is multiplied with its number of steps (`known_trip_count`, which every
`lax.scan` has), a fusion or call counts as the computation it calls, and a conditional as its most
expensive branch. Only matrix products and convolutions are counted:

    dot           2 x outputs x length of the contraction
    convolution   2 x outputs x kernel, without padding (`metalearn.cost.convolution`)

On a GPU a matrix product may be a call of cuBLAS, whose configuration names the contracted axes.
For a custom call whose name says that it multiplies matrices, but whose text does not say which,
`UnreadableError` is raised, and FLOPs are counted on the jaxpr (`metalearn.cost.jaxpr`).

Collectives are the instructions by which devices exchange data, such as an all-reduce.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

from metalearn.cost import convolution

_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|\S+)")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_TYPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_MULTIPLIES = re.compile(r"gemm|matmul|conv|dot|attention|fmha|triton|mosaic|tpu_custom", re.I)

Shape = tuple[int, ...]


class UnreadableError(ValueError):
    """A custom call multiplies matrices, but its text does not say which."""


class Instruction(NamedTuple):
    """One line of HLO: %name = shape opcode(operands), attributes.

    Args:
      name: of the result.
      shape: of the result; if that is a tuple, of its first element.
      opcode: such as "dot".
      operands: their names.
      attributes: the rest of the line.
    """

    name: str
    shape: Shape
    opcode: str
    operands: list[str]
    attributes: str


class Collective(NamedTuple):
    """One instruction by which a group of devices exchanges data.

    Args:
      kind: such as "all-reduce".
      size: bytes of the result, on one device.
    """

    kind: str
    size: int


def collectives(text: str) -> list[Collective]:
    """Return the collectives of `compiled.as_text()`; one inside a loop counts once.

    >>> collectives("  %sum = (f32[3,4]{1,0}, s32[]) all-reduce(%a, %b), channel_id=1")
    [Collective(kind='all-reduce', size=52)]
    """
    return [Collective(kind, _bytes(types)) for types, kind in _COLLECTIVE.findall(text)]


def _bytes(types: str) -> int:
    """Return the bytes of the HLO types in a text, such as "(f32[3,4]{1,0}, s32[])"."""
    return sum(
        # pred[] has no number of bits, and takes a byte.
        max(int(bits or 8) // 8, 1) * math.prod(_integers(dimensions))
        for _, bits, dimensions in _TYPE.findall(types)
    )


def flops(text: str) -> int:
    """Return the FLOPs of `compiled.as_text()`: matrix products and convolutions.

    Raises:
      UnreadableError: for a custom call that multiplies matrices and cannot be read.
    """
    entry, computations = _parse(text)

    @functools.cache
    def flops_of(computation: str) -> int:
        shapes = {instruction.name: instruction.shape for instruction in computations[computation]}
        return sum(
            _flops(instruction, shapes, flops_of) for instruction in computations[computation]
        )

    return flops_of(entry)


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
        header, assignment = _HEADER.match(line), _ASSIGNMENT.match(line)
        if header:
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif assignment:
            current.append(_instruction(assignment[1], assignment[2]))
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
    dimensions = re.search(r"\[([\d,]*)\]", text)
    return _integers(dimensions[1]) if dimensions else ()


def _integers(text: str) -> Shape:
    return tuple(map(int, re.findall(r"\d+", text)))


def _flops(
    instruction: Instruction, shapes: dict[str, Shape], flops_of: Callable[[str], int]
) -> int:
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return _dot(
            instruction.shape, shapes[instruction.operands[0]], contracted[1] if contracted else ""
        )
    if instruction.opcode == "convolution":
        return _convolution(instruction, *(shapes[name] for name in instruction.operands))
    if instruction.opcode == "custom-call":
        return _custom_call(instruction, shapes)
    if instruction.opcode == "while":
        return _while(instruction, flops_of)
    names = ",".join(_CALLED.findall(instruction.attributes))
    called = [flops_of(name) for name in re.findall(r"[^\s,%{}]+", names)]
    return max(called, default=0) if instruction.opcode == "conditional" else sum(called)


def _while(instruction: Instruction, flops_of: Callable[[str], int]) -> int:
    body = re.search(r"\bbody=%?([^\s,]+)", instruction.attributes)
    assert body is not None, instruction
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    count = flops_of(body[1])
    if trips is None and count:
        unknown_loop(count)
    return count * int(trips[1]) if trips else count


def _dot(result: Shape, lhs: Shape, contracted: str) -> int:
    return 2 * math.prod(result) * math.prod(lhs[axis] for axis in _integers(contracted))


def _custom_call(instruction: Instruction, shapes: dict[str, Shape]) -> int:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if target is None or not _MULTIPLIES.search(target[1]):
        return 0
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if contracted is None:
        raise UnreadableError(f"The FLOPs of a call of {target[1]!r} cannot be read off the HLO.")
    return _dot(instruction.shape, shapes[instruction.operands[0]], contracted[1])


def _convolution(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    sizes = {key: value.split("x") for key, value in fields.items()}

    def field(key: str, axis: int, default: int) -> int:
        return int(sizes[key][axis].partition("_")[0]) if key in sizes else default

    windows = [
        convolution.Window(
            lhs[labels[1].index(str(axis))],
            rhs[labels[2].index(str(axis))],
            instruction.shape[labels[3].index(str(axis))],
            field("stride", axis, 1),
            field("pad", axis, 0),
            field("lhs_dilate", axis, 1),
            field("rhs_dilate", axis, 1),
        )
        for axis in range(len(sizes.get("size", [])))
    ]
    batch, features = (
        instruction.shape[labels[3].index("b")],
        instruction.shape[labels[3].index("f")],
    )
    return convolution.flops(batch, features, rhs[labels[2].index("i")], windows)
