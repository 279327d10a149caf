"""Approximate hypergradients: of a fixed point, and through the last steps of a loop alone."""

from metalearn.engines.approximate.implicit import Implicit
from metalearn.engines.approximate.sama import SAMA
from metalearn.engines.approximate.truncated import Truncated

__all__ = ["SAMA", "Implicit", "Truncated"]
