"""What our Haiku networks do their own way: convolution, normalisation, initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn.models.convolution import convolve
from metalearn.models.normalization import batch_statistics, normalized

LECUN = hk.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal")


class Conv(hk.Module):
    """A square convolution, by default 3x3 with a bias, by `metalearn.models.convolution`."""

    def __init__(
        self,
        filters: int,
        stride: int,
        convolution: str,
        window: int = 3,
        padding: Any = "SAME",
        with_bias: bool = True,
        init: hk.initializers.Initializer = LECUN,
        name: str | None = None,
    ):
        super().__init__(name)
        self.filters, self.stride, self.convolution = filters, stride, convolution
        self.window, self.padding, self.with_bias, self.init = window, padding, with_bias, init

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images [batch, h, w, c], by default padded to keep h / stride."""
        shape = (self.window, self.window, x.shape[-1], self.filters)
        kernel = hk.get_parameter("w", shape, x.dtype, init=self.init)
        strides = (self.stride, self.stride)
        out = convolve(x, kernel, strides, self.padding, self.convolution)
        if not self.with_bias:
            return out
        bias = hk.get_parameter("b", (self.filters,), x.dtype, init=jnp.zeros)
        return out + bias[None, None, None]


class Norm(hk.Module):
    """Batch normalisation over all axes but the last, with Flax's initial statistics.

    `hk.BatchNorm` keeps its parameters as [1, 1, 1, channels], which under MAML's second
    derivative takes twice the time of [channels] on a CPU.
    """

    def __init__(self, momentum: float, name: str | None = None):
        super().__init__(name)
        self.momentum = momentum

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Normalise by the batch, and remember it; or by what is remembered."""
        shape = (x.shape[-1],)
        scale = hk.get_parameter("scale", shape, x.dtype, init=jnp.ones)
        offset = hk.get_parameter("offset", shape, x.dtype, init=jnp.zeros)
        mean = hk.get_state("mean", shape, x.dtype, init=jnp.zeros)
        variance = hk.get_state("variance", shape, x.dtype, init=jnp.ones)
        if is_training:
            old, keep = (mean, variance), self.momentum
            mean, variance = batch_statistics(x)
            hk.set_state("mean", keep * old[0] + (1 - keep) * mean)
            hk.set_state("variance", keep * old[1] + (1 - keep) * variance)
        return normalized(x, mean, variance, scale, offset)


def seeded(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Give Haiku an initialiser that takes a key first."""
    return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)
