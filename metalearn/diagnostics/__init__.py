"""Diagnostics of a meta-gradient."""

from metalearn.diagnostics.comparison import Compared, Comparison, compare
from metalearn.diagnostics.smoothness import Prediction, Smoothness, smoothness

__all__ = ["Compared", "Comparison", "Prediction", "Smoothness", "compare", "smoothness"]
