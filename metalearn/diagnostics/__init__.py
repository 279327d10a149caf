"""Diagnostics of a meta-gradient."""

from metalearn.diagnostics.comparison import Compared, Comparison, compare

__all__ = ["Compared", "Comparison", "compare"]
