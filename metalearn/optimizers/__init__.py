"""Inner optimizers made for being differentiated through, and for parameters in bfloat16.

Among them one that learns its rate within the run: `meta_regularized`. `averaged` is mostly for the
outer loop: what is learned is the average of its iterates.
"""

from metalearn.optimizers.averaged import averaged
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.optimizers.master_weights import master_weights
from metalearn.optimizers.meta_regularized import meta_regularized

__all__ = ["averaged", "differentiable_at_zero", "master_weights", "meta_regularized"]
