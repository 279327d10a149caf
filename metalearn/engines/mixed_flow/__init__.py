"""Mixed flow: reverse over the loop, forward over reverse inside. See `engine.py`."""

from metalearn.engines.mixed_flow.engine import MixedFlow

__all__ = ["MixedFlow"]
