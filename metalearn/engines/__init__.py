"""Engines: ways of differentiating through an inner loop. See `engine.py`."""

from metalearn.engines.base import Aux, MetaGradient
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
    "Aux",
    "Forward",
    "Inner",
    "InverseVariance",
    "MetaGradient",
    "MixedFlow",
    "Reverse",
]
