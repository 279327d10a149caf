"""Forward mode through the inner loop; see `metalearn.engines.forward.engine`."""

from metalearn.engines.forward.engine import Forward

__all__ = ["Forward"]
