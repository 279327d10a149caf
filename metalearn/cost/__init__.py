"""The memory and FLOPs of a compiled program, before it runs.

Memory is that of XLA's buffer assignment. FLOPs are those of matrix products and convolutions,
with the body of a loop times its number of steps; elementwise operations are not counted. All
arguments may be shapes: nothing is allocated.

>>> import jax, jax.numpy as jnp
>>> square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
>>> product = cost(jax.jit(lambda a, b: a @ b), square, square)
>>> product.flops == 2 * 64**3, product.arguments, product.output
(True, 32768, 16384)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from metalearn._utils.compiling import quick_compilation
from metalearn.cost import hlo, jaxpr


class Cost(NamedTuple):
    """The memory and FLOPs of one call of a compiled program. Bytes are those of one device.

    Args:
      flops: of matrix products and convolutions.
      arguments: bytes.
      temporaries: bytes that are allocated and freed within the call.
      output: bytes.
      aliased: bytes of the output that reuse those of donated arguments.
      counted_on: where FLOPs were counted: "program" (HLO), or "jaxpr" if its custom calls cannot
        be read.
    """

    flops: int
    arguments: int
    temporaries: int
    output: int
    aliased: int
    counted_on: str

    @property
    def peak(self) -> int:
        """Return the peak bytes of the call: arguments, temporaries and output."""
        return self.arguments + self.temporaries + self.output - self.aliased


def cost(jitted: Any, *args: Any, known: dict[str, Cost] | None = None, **static: Any) -> Cost:
    """Compile for these arguments, or for their shapes, and return the cost of a call.

    Args:
      jitted: a function from `jax.jit`.
      *args: its arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct`.
      known: costs by program text, read and extended, so that equal programs are compiled once.
      **static: static arguments by name.

    Warns:
      UserWarning: if the number of steps of a loop that contains FLOPs is not known.
    """
    traced = jitted.trace(*args, **static)
    lowered = traced.lower()
    known = {} if known is None else known
    program = lowered.as_text()
    if program not in known:
        known[program] = _cost(traced, lowered)
    return known[program]


def _cost(traced: Any, lowered: Any) -> Cost:
    compiled = lowered.compile(quick_compilation())  # buffers are assigned before LLVM begins
    memory = compiled.memory_analysis()
    try:
        flops, counted_on = hlo.flops(compiled.as_text()), "program"
    except hlo.UnreadableError:
        flops, counted_on = jaxpr.flops(traced.jaxpr), "jaxpr"
    return Cost(
        flops,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        counted_on,
    )
