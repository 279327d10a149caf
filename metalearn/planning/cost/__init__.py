"""What a compiled program costs, before it runs: its memory and its FLOPs.

Memory is what XLA's buffer assignment says it will ask the device for. FLOPs are those
of matrix products and convolutions, with every loop counted as often as it runs;
elementwise work is left out. All arguments may be shapes: nothing is allocated.

>>> import jax, jax.numpy as jnp
>>> square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
>>> found = cost(jax.jit(lambda a, b: a @ b), square, square)
>>> found.flops == 2 * 64**3, found.arguments, found.output
(True, 32768, 16384)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from metalearn.planning.cost import hlo, jaxpr

# On a CPU most of a compilation is LLVM's, which comes after XLA has laid out the memory.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}


class Cost(NamedTuple):
    """What one call of a compiled program takes. Bytes are of one device."""

    flops: int  # of matrix products and convolutions
    arguments: int  # bytes
    temporaries: int  # bytes: what lives and dies within the call
    output: int  # bytes
    aliased: int  # bytes of the output that take the place of arguments (donated)
    counted_on: str  # "program", or "jaxpr" where the program's calls cannot be read

    @property
    def peak(self) -> int:
        """Return the bytes that the call holds: arguments, temporaries and output."""
        return self.arguments + self.temporaries + self.output - self.aliased


def cost(jitted: Any, *args: Any, known: dict[str, Cost] | None = None) -> Cost:
    """Compile for these arguments, or for their shapes, and return what a call costs.

    Args:
      jitted: what `jax.jit` returned.
      *args: its arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct`.
      known: costs by program, read and added to: the same program is compiled once.

    Warns:
      UserWarning: where a loop with FLOPs in it has no known number of steps.
    """
    traced = jitted.trace(*args)
    lowered = traced.lower()
    known = {} if known is None else known
    program = lowered.as_text()
    if program not in known:
        known[program] = _cost(traced, lowered)
    return known[program]


def _cost(traced: Any, lowered: Any) -> Cost:
    compiled = lowered.compile(QUICK if jax.default_backend() == "cpu" else None)
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
