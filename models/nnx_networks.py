"""Networks in Flax NNX: of the few-shot literature, of image classification, a transformer.

Batch normalisation is `Norm`, not `nnx.BatchNorm`. `metalearn.models.layouts` has the sizes and
initial values that all libraries share.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from metalearn._utils import checks
from metalearn.models import layouts
from metalearn.models.convolution import batch_statistics, flax_convolution, max_pool, normalized
from metalearn.models.transformer import Architecture

__all__ = ["MLP", "ConvNet", "LeNet", "ResNet12", "Transformer", "WideResNet"]


class Norm(nnx.Module):
    """Batch normalisation whose running statistics carry their derivative.

    `nnx.BatchNorm` cuts this derivative with a `stop_gradient`; with MAML's policy "running" the
    meta-gradient would then be wrong.
    """

    def __init__(self, features: int, momentum: float):
        vector = (features,), jnp.float32
        self.scale, self.bias = nnx.Param(jnp.ones(*vector)), nnx.Param(jnp.zeros(*vector))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(*vector)), nnx.BatchStat(jnp.ones(*vector))
        self.momentum = momentum

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise over all axes but the last, by batch statistics or by running statistics."""
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = batch_statistics(x)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return normalized(x, mean, var, self.scale[...], self.bias[...])


class MLP(nnx.Module):
    """Dense layers; inputs [batch, ...] are flattened. Outputs [batch, outputs]."""

    def __init__(
        self,
        inputs: int,
        outputs: int | None,
        hidden: tuple[int, ...] = (40, 40),
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        *,
        rngs: nnx.Rngs,
    ):
        checks.widths("MLP", hidden=hidden)
        widths = (inputs, *hidden)
        self.hidden = nnx.List(
            nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.head = _head(widths[-1], outputs, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return x if self.head is None else self.head(x)


class ConvNet(nnx.Module):
    """The 4-block network; see `linen_networks.ConvNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int | None,
        filters: int = 64,
        blocks: int = 4,
        pool: bool = False,
        momentum: float = 0.9,
        convolution: str = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        checks.at_least("ConvNet", 1, filters=filters, blocks=blocks)
        checks.at_most("ConvNet", layouts.DEEPEST, blocks=blocks)
        stride, channels = 1 if pool else 2, image[2]
        convs, norms = [], []
        for _ in range(blocks):
            convs.append(
                nnx.Conv(
                    channels,
                    filters,
                    (3, 3),
                    strides=stride,
                    conv_general_dilated=flax_convolution(convolution),
                    rngs=rngs,
                )
            )
            norms.append(Norm(filters, momentum))
            channels = filters
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        sides = layouts.pooled_sides("ConvNet", blocks, *image[:2]) if pool else (1, 1)
        self.head = _head(math.prod(sides) * channels, outputs, rngs)
        self.pool = pool

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), train))
            x = max_pool(x) if self.pool else x
        x = x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2))
        return x if self.head is None else self.head(x)


class LeNet(nnx.Module):
    """LeNet-5; see `linen_networks.LeNet`. Images [batch, h, w, c], 12 x 12 at least."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int | None,
        convolution: str = "lax",
        *,
        rngs: nnx.Rngs,
    ):
        channels, convs = image[2], []
        for filters, padding in layouts.LENET:
            convs.append(
                nnx.Conv(
                    channels,
                    filters,
                    (5, 5),
                    padding=padding,
                    conv_general_dilated=flax_convolution(convolution),
                    rngs=rngs,
                )
            )
            channels = filters
        self.convs = nnx.List(convs)
        self.dense = MLP(
            layouts.lenet_pixels(*image[:2]) * channels, outputs, layouts.LENET_HIDDEN, rngs=rngs
        )

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        for conv in self.convs:
            x = max_pool(nnx.relu(conv(x)))
        return self.dense(x, train)


class WideResNet(nnx.Module):
    """WRN-depth-width; see `linen_networks.WideResNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int | None,
        depth: int = 16,
        width: int = 1,
        momentum: float = 0.9,
        convolution: str = "lax",
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(image[2], layouts.STEM, convolution, rngs)
        channels, blocks = layouts.STEM, []
        for block in layouts.wide_blocks(depth, width):
            blocks.append(ResidualBlock(channels, block, momentum, convolution, rngs=rngs))
            channels = block.features
        self.blocks, self.norm = nnx.List(blocks), Norm(channels, momentum)
        self.head = _head(channels, outputs, rngs)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, train)
        x = nnx.relu(self.norm(x, train)).mean((1, 2))
        return x if self.head is None else self.head(x)


class ResNet12(nnx.Module):
    """ResNet-12; see `linen_networks.ResNet12`. Images [batch, h, w, c], 16 x 16 at least."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int | None,
        filters: tuple[int, ...] = layouts.RESNET_12,
        momentum: float = 0.9,
        convolution: str = "lax",
        *,
        rngs: nnx.Rngs,
    ):
        checks.widths("ResNet12", filters=filters)
        layouts.pooled_sides("ResNet12", len(filters), *image[:2])
        channels, blocks = image[2], []
        for features in filters:
            blocks.append(TripleBlock(channels, features, momentum, convolution, rngs=rngs))
            channels = features
        self.blocks = nnx.List(blocks)
        self.head = _head(channels, outputs, rngs)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        for block in self.blocks:
            x = max_pool(block(x, train))
        x = x.mean((1, 2))
        return x if self.head is None else self.head(x)


class TripleBlock(nnx.Module):
    """Three convolutions with normalisation, added to a projection of their input."""

    def __init__(
        self, channels: int, filters: int, momentum: float, convolution: str, *, rngs: nnx.Rngs
    ):
        self.project = _conv(channels, filters, convolution, rngs, window=1)
        self.norm_project = Norm(filters, momentum)
        inputs = (channels, filters, filters)
        self.convs = nnx.List(_conv(size, filters, convolution, rngs) for size in inputs)
        self.norms = nnx.List(Norm(filters, momentum) for _ in inputs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        skip = self.norm_project(self.project(x), train)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x), train)
            x = layouts.leaky(x) if i < 2 else x
        return layouts.leaky(x + skip)


class ResidualBlock(nnx.Module):
    """Two convolutions, each after a normalisation, added to their input."""

    def __init__(
        self,
        channels: int,
        block: layouts.Block,
        momentum: float,
        convolution: str,
        *,
        rngs: nnx.Rngs,
    ):
        features, stride, projects = block
        self.norm_0, self.norm_1 = Norm(channels, momentum), Norm(features, momentum)
        self.conv_0 = _conv(channels, features, convolution, rngs, stride)
        self.conv_1 = _conv(features, features, convolution, rngs)
        self.project = (
            _conv(channels, features, convolution, rngs, stride, window=1) if projects else None
        )

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        active = nnx.relu(self.norm_0(x, train))
        if self.project is not None:
            x = self.project(active)
        out = nnx.relu(self.norm_1(self.conv_0(active), train))
        return x + self.conv_1(out)


def _head(features: int, outputs: int | None, rngs: nnx.Rngs) -> nnx.Linear | None:
    """Return a dense layer for an embedding; None where the network ends in the embedding."""
    return None if outputs is None else nnx.Linear(features, outputs, rngs=rngs)


def _conv(
    channels: int, features: int, method: str, rngs: nnx.Rngs, stride: int = 1, window: int = 3
) -> nnx.Conv:
    options = layouts.flax_residual_conv(method, window)
    return nnx.Conv(channels, features, strides=stride, rngs=rngs, **options)


class Transformer(nnx.Module):
    """A decoder-only language model: tokens [batch, S] -> logits [batch, S, vocabulary]."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        self.architecture = architecture
        for name, (shape, init) in architecture.declare().items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))

    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        params = {name: getattr(self, name)[...] for name in self.architecture.declare()}
        return self.architecture.apply(params, tokens)
