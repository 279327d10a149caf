"""Inner optimizers made for being differentiated through, and for parameters in bfloat16."""

from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.optimizers.master_weights import master_weights

__all__ = ["differentiable_at_zero", "master_weights"]
