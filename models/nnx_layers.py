"""What our NNX networks do their own way: batch normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from metalearn.models.normalization import batch_statistics, normalized


class Norm(nnx.Module):
    """Batch normalisation whose running statistics carry their derivative.

    `nnx.BatchNorm` cuts it with a `stop_gradient`; under the policy "running" the
    meta-gradient would then not be that of the loss.
    """

    def __init__(self, features: int, momentum: float):
        vector = (features,), jnp.float32
        self.scale, self.bias = nnx.Param(jnp.ones(*vector)), nnx.Param(jnp.zeros(*vector))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(*vector)), nnx.BatchStat(jnp.ones(*vector))
        self.momentum = momentum

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise over all axes but the last, by the batch or by what is remembered."""
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = batch_statistics(x)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return normalized(x, mean, var, self.scale[...], self.bias[...])
