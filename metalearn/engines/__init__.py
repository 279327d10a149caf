"""Engines: ways of differentiating through an inner loop. See `engine.py`."""

from metalearn.engines.engine import Aux, MetaGradient
from metalearn.engines.forward import Forward
from metalearn.engines.mixed_flow import MixedFlow
from metalearn.engines.recorder import Inner
from metalearn.engines.reverse import Reverse

__all__ = ["Aux", "Forward", "Inner", "MetaGradient", "MixedFlow", "Reverse"]
