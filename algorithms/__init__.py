"""Algorithms: what is learned, and what one inner step is."""

from metalearn.algorithms.maml import MAML
from metalearn.algorithms.objectives import cross_entropy, squared_error

__all__ = ["MAML", "cross_entropy", "squared_error"]
