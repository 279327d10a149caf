"""The networks of the few-shot literature in Haiku."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn.models.convolution import convolve, max_pool
from metalearn.models.normalization import batch_statistics, normalized
from metalearn.models.transformer import Architecture


class MLP(hk.Module):
    """Dense layers; inputs [batch, ...] are flattened. Outputs [batch, outputs]."""

    def __init__(
        self,
        outputs: int,
        hidden: tuple[int, ...] = (40, 40),
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        name: str | None = None,
    ):
        super().__init__(name)
        self.outputs, self.hidden, self.activation = outputs, hidden, activation

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = self.activation(hk.Linear(width, name=f"hidden_{i}")(x))
        return hk.Linear(self.outputs, name="head")(x)


class Conv(hk.Module):
    """A 3x3 convolution with a bias, by `metalearn.models.convolution`."""

    def __init__(self, filters: int, stride: int, convolution: str, name: str | None = None):
        super().__init__(name)
        self.filters, self.stride, self.convolution = filters, stride, convolution

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images [batch, h, w, c], padded to keep h / stride."""
        shape = (3, 3, x.shape[-1], self.filters)
        scale = hk.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal")
        kernel = hk.get_parameter("w", shape, x.dtype, init=scale)
        bias = hk.get_parameter("b", (self.filters,), x.dtype, init=jnp.zeros)
        out = convolve(x, kernel, (self.stride, self.stride), "SAME", self.convolution)
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


class ConvNet(hk.Module):
    """The 4-block network; see `linen_networks.ConvNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        outputs: int,
        filters: int = 64,
        blocks: int = 4,
        pool: bool = False,
        momentum: float = 0.9,
        convolution: str = "auto",
        name: str | None = None,
    ):
        super().__init__(name)
        self.outputs, self.filters, self.blocks = outputs, filters, blocks
        self.pool, self.momentum, self.convolution = pool, momentum, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply, with batch statistics where `train`, running ones where not."""
        for i in range(self.blocks):
            stride = 1 if self.pool else 2
            x = Conv(self.filters, stride, self.convolution, name=f"conv_{i}")(x)
            x = jax.nn.relu(Norm(self.momentum, name=f"norm_{i}")(x, train))
            x = max_pool(x) if self.pool else x
        x = x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2))
        return hk.Linear(self.outputs, name="head")(x)


class Transformer(hk.Module):
    """A language model of some architecture: tokens [batch, S] -> logits [batch, S, vocabulary]."""

    def __init__(self, architecture: Architecture, name: str | None = None):
        super().__init__(name)
        self.architecture = architecture

    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        params = {
            name: hk.get_parameter(name, shape, jnp.float32, _seeded(init))
            for name, (shape, init) in self.architecture.declare().items()
        }
        return self.architecture.apply(params, tokens)


def _seeded(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Give Haiku an initialiser that takes a key first."""
    return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)
