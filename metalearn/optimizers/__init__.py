"""Inner optimizers made for being differentiated through."""

from metalearn.optimizers.differentiable import differentiable_at_zero

__all__ = ["differentiable_at_zero"]
