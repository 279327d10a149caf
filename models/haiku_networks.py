"""Networks in Haiku: of the few-shot literature, of image classification, a transformer.

Convolution and batch normalisation are `Conv` and `Norm`, not Haiku's. `metalearn.models.layouts`
has the sizes and initial values that all libraries share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn._utils.checks import at_least, at_most, widths
from metalearn.models import layouts
from metalearn.models.convolution import batch_statistics, convolve, max_pool, normalized
from metalearn.models.transformer import Architecture

__all__ = ["MLP", "ConvNet", "LeNet", "ResNet12", "Transformer", "WideResNet"]


LECUN = hk.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal")


class Conv(hk.Module):
    """A square convolution by `metalearn.models.convolution`, by default 3x3 with a bias."""

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
        """Convolve images [batch, h, w, c]; the default padding gives h / stride x w / stride."""
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

    `hk.BatchNorm` has parameters of shape [1, 1, 1, channels]; MAML's second derivative takes
    twice the time on a CPU with these as with [channels].
    """

    def __init__(self, momentum: float, name: str | None = None):
        super().__init__(name)
        self.momentum = momentum

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Normalise by the batch statistics and update the running ones; or by the running ones."""
        shape = (x.shape[-1],)
        scale = hk.get_parameter("scale", shape, x.dtype, init=jnp.ones)
        offset = hk.get_parameter("offset", shape, x.dtype, init=jnp.zeros)
        mean = hk.get_state("mean", shape, x.dtype, init=jnp.zeros)
        variance = hk.get_state("variance", shape, x.dtype, init=jnp.ones)
        if is_training:
            running = {"mean": mean, "variance": variance}
            mean, variance = batch_statistics(x)
            for name, of_batch in (("mean", mean), ("variance", variance)):
                after = self.momentum * running[name] + (1 - self.momentum) * of_batch
                hk.set_state(name, after.astype(running[name].dtype))
        return normalized(x, mean, variance, scale, offset)


def seeded(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return an initialiser of JAX, which has a key as first argument, as one of Haiku."""
    return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)


class MLP(hk.Module):
    """Dense layers; inputs [batch, ...] are flattened. Outputs [batch, outputs]."""

    def __init__(
        self,
        outputs: int | None,
        hidden: tuple[int, ...] = (40, 40),
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        name: str | None = None,
    ):
        super().__init__(name)
        widths("MLP", hidden=hidden)
        self.outputs, self.hidden, self.activation = outputs, hidden, activation

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = self.activation(hk.Linear(width, name=f"hidden_{i}")(x))
        return _head(self.outputs, x)


class ConvNet(hk.Module):
    """The 4-block network; see `linen_networks.ConvNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        outputs: int | None,
        filters: int = 64,
        blocks: int = 4,
        pool: bool = False,
        momentum: float = 0.9,
        convolution: str = "auto",
        name: str | None = None,
    ):
        super().__init__(name)
        at_least("ConvNet", 1, filters=filters, blocks=blocks)
        at_most("ConvNet", layouts.DEEPEST, blocks=blocks)
        self.outputs, self.filters, self.blocks = outputs, filters, blocks
        self.pool, self.momentum, self.convolution = pool, momentum, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        if self.pool:
            layouts.pooled_sides("ConvNet", self.blocks, *x.shape[1:3])
        for i in range(self.blocks):
            stride = 1 if self.pool else 2
            x = Conv(self.filters, stride, self.convolution, name=f"conv_{i}")(x)
            x = jax.nn.relu(Norm(self.momentum, name=f"norm_{i}")(x, train))
            x = max_pool(x) if self.pool else x
        x = x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2))
        return _head(self.outputs, x)


class LeNet(hk.Module):
    """LeNet-5; see `linen_networks.LeNet`. Images [batch, h, w, c], 12 x 12 at least."""

    def __init__(self, outputs: int | None, convolution: str = "lax", name: str | None = None):
        super().__init__(name)
        self.outputs, self.convolution = outputs, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        layouts.lenet_pixels(*x.shape[1:3])
        for i, (filters, padding) in enumerate(layouts.LENET):
            conv = Conv(filters, 1, self.convolution, 5, padding, name=f"conv_{i}")
            x = max_pool(jax.nn.relu(conv(x)))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(layouts.LENET_HIDDEN):
            x = jax.nn.relu(hk.Linear(width, name=f"hidden_{i}")(x))
        return _head(self.outputs, x)


class WideResNet(hk.Module):
    """WRN-depth-width; see `linen_networks.WideResNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        outputs: int | None,
        depth: int = 16,
        width: int = 1,
        momentum: float = 0.9,
        convolution: str = "lax",
        name: str | None = None,
    ):
        super().__init__(name)
        self.outputs, self.blocks = outputs, layouts.wide_blocks(depth, width)
        self.momentum, self.convolution = momentum, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        options = (self.momentum, self.convolution)
        x = _conv(layouts.STEM, self.convolution, "stem")(x)
        for i, block in enumerate(self.blocks):
            x = ResidualBlock(block, *options, name=f"block_{i}")(x, train)
        x = jax.nn.relu(Norm(self.momentum, name="norm")(x, train))
        return _head(self.outputs, x.mean((1, 2)))


class ResNet12(hk.Module):
    """ResNet-12; see `linen_networks.ResNet12`. Images [batch, h, w, c], 16 x 16 at least."""

    def __init__(
        self,
        outputs: int | None,
        filters: tuple[int, ...] = layouts.RESNET_12,
        momentum: float = 0.9,
        convolution: str = "lax",
        name: str | None = None,
    ):
        super().__init__(name)
        widths("ResNet12", filters=filters)
        self.outputs, self.filters = outputs, filters
        self.momentum, self.convolution = momentum, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        layouts.pooled_sides("ResNet12", len(self.filters), *x.shape[1:3])
        for i, filters in enumerate(self.filters):
            options = (filters, self.momentum, self.convolution)
            x = max_pool(TripleBlock(*options, name=f"block_{i}")(x, train))
        return _head(self.outputs, x.mean((1, 2)))


class TripleBlock(hk.Module):
    """Three convolutions with normalisation, added to a projection of their input."""

    def __init__(self, filters: int, momentum: float, convolution: str, name: str | None = None):
        super().__init__(name)
        self.filters, self.momentum, self.convolution = filters, momentum, convolution

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        project = _conv(self.filters, self.convolution, "project", window=1)
        skip = Norm(self.momentum, name="norm_project")(project(x), train)
        for i in range(3):
            x = _conv(self.filters, self.convolution, f"conv_{i}")(x)
            x = Norm(self.momentum, name=f"norm_{i}")(x, train)
            x = layouts.leaky(x) if i < 2 else x
        return layouts.leaky(x + skip)


class ResidualBlock(hk.Module):
    """Two convolutions, each after a normalisation, added to their input."""

    def __init__(
        self, block: layouts.Block, momentum: float, convolution: str, name: str | None = None
    ):
        super().__init__(name)
        self.block, self.momentum, self.convolution = block, momentum, convolution

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        features, stride, projects = self.block
        active = jax.nn.relu(Norm(self.momentum, name="norm_0")(x, train))
        if projects:
            x = _conv(features, self.convolution, "project", stride, window=1)(active)
        out = _conv(features, self.convolution, "conv_0", stride)(active)
        out = jax.nn.relu(Norm(self.momentum, name="norm_1")(out, train))
        return x + _conv(features, self.convolution, "conv_1")(out)


def _head(outputs: int | None, x: jax.Array) -> jax.Array:
    """Return a dense layer of an embedding [batch, d]; without outputs the embedding."""
    return x if outputs is None else hk.Linear(outputs, name="head")(x)


def _conv(features: int, method: str, name: str, stride: int = 1, window: int = 3) -> Conv:
    padding, init = layouts.PADDING if window == 3 else "VALID", seeded(layouts.HE)
    return Conv(features, stride, method, window, padding, with_bias=False, init=init, name=name)


class Transformer(hk.Module):
    """A decoder-only language model: tokens [batch, S] -> logits [batch, S, vocabulary]."""

    def __init__(self, architecture: Architecture, name: str | None = None):
        super().__init__(name)
        self.architecture = architecture

    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        params = {
            name: hk.get_parameter(name, shape, jnp.float32, seeded(init))
            for name, (shape, init) in self.architecture.declare().items()
        }
        return self.architecture.apply(params, tokens)
