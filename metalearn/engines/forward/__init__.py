"""Forward mode: tangents travel with the inner state. See `engine.py`."""

from metalearn.engines.forward.engine import Forward

__all__ = ["Forward"]
