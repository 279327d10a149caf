"""Engines: ways of differentiating through an inner loop. See `engine.py`."""

from metalearn.engines.approximate.implicit import Implicit
from metalearn.engines.approximate.sama import SAMA
from metalearn.engines.approximate.truncated import Truncated
from metalearn.engines.base import ApproximationWarning, Aux, MetaGradient
from metalearn.engines.estimators.es import ES
from metalearn.engines.estimators.inverse_variance import InverseVariance
from metalearn.engines.estimators.pes import PES
from metalearn.engines.forward.engine import Forward
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.mixed_flow.engine import MixedFlow
from metalearn.engines.reverse import Reverse

__all__ = [
    "ES",
    "PES",
    "SAMA",
    "ApproximationWarning",
    "Aux",
    "Forward",
    "Implicit",
    "Inner",
    "InverseVariance",
    "MetaGradient",
    "MixedFlow",
    "Reverse",
    "Truncated",
]
