"""Options of XLA."""

from __future__ import annotations

import jax


def quick_compilation() -> dict[str, bool | int | str] | None:
    """Return options for a program that runs once or twice: on a CPU, LLVM optimizes nothing.

    Such a program of small operations compiles in half the time, and runs several times as long.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
