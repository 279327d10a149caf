"""Networks in Flax linen: of the few-shot literature, of image classification, a transformer.

`metalearn.models.layouts` has the sizes and initial values that all libraries share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalearn._utils.checks import at_least, at_most, widths
from metalearn.models import layouts
from metalearn.models.convolution import flax_convolution, max_pool
from metalearn.models.transformer import Architecture

__all__ = ["MLP", "ConvNet", "LeNet", "ResNet12", "Transformer", "WideResNet"]


class MLP(nn.Module):
    """Dense layers; inputs [batch, ...] are flattened. Outputs [batch, outputs].

    Args:
      outputs: the width of the last layer; None: no such layer, the output is an embedding.
      hidden: the widths of the hidden layers; by default those of MAML's sinusoid network.
      activation: between the layers.
    """

    outputs: int | None
    hidden: tuple[int, ...] = (40, 40)
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        widths("MLP", hidden=self.hidden)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = self.activation(nn.Dense(width, name=f"hidden_{i}")(x))
        return _head(self.outputs, x)


class ConvNet(nn.Module):
    """Four blocks of 3x3 convolution, batch normalisation, ReLU and a halving, then a head.

    Vinyals et al. 2016 (arXiv:1606.04080) halve by max-pooling and flatten before the head;
    Finn et al. 2017 (arXiv:1703.03400) do so on larger images, and on Omniglot halve by
    strides and average over positions. Images [batch, h, w, c], outputs [batch, outputs].

    Args:
      outputs: the width of the head; None: no head, the output is an embedding.
      filters: of each convolution.
      blocks: each of which halves the image.
      pool: max-pooling and a flattened head, instead of strides and an average over positions.
      momentum: of the running statistics of batch normalisation.
      convolution: "auto", "patches" or "lax": see `metalearn.models.convolution`.
    """

    outputs: int | None
    filters: int = 64
    blocks: int = 4
    pool: bool = False
    momentum: float = 0.9
    convolution: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        at_least("ConvNet", 1, filters=self.filters, blocks=self.blocks)
        at_most("ConvNet", layouts.DEEPEST, blocks=self.blocks)
        if self.pool:
            layouts.pooled_sides("ConvNet", self.blocks, *x.shape[1:3])
        stride = 1 if self.pool else 2
        for i in range(self.blocks):
            x = nn.Conv(
                self.filters,
                (3, 3),
                strides=(stride, stride),
                conv_general_dilated=flax_convolution(self.convolution),
                name=f"conv_{i}",
            )(x)
            norm = nn.BatchNorm(not train, momentum=self.momentum, name=f"norm_{i}")
            x = nn.relu(norm(x))
            x = max_pool(x) if self.pool else x
        x = x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2))
        return _head(self.outputs, x)


class LeNet(nn.Module):
    """LeNet-5 in its modern form, with ReLU and max-pooling. Images [batch, h, w, c].

    Two 5x5 convolutions and three dense layers (LeCun et al. 1998). Outputs [batch,
    outputs]. Images are 12 x 12 at least.

    Args:
      outputs: the width of the last layer; None: no such layer, the output is an embedding.
      convolution: "auto", "patches" or "lax": see `metalearn.models.layouts`.
    """

    outputs: int | None
    convolution: str = "lax"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        layouts.lenet_pixels(*x.shape[1:3])
        for i, (filters, padding) in enumerate(layouts.LENET):
            x = nn.Conv(
                filters,
                (5, 5),
                padding=padding,
                conv_general_dilated=flax_convolution(self.convolution),
                name=f"conv_{i}",
            )(x)
            x = max_pool(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(layouts.LENET_HIDDEN):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
        return _head(self.outputs, x)


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko & Komodakis 2016 (arXiv:1605.07146). Images [batch, h, w, c].

    Outputs [batch, outputs].

    Args:
      outputs: the width of the head; None: no head, the output is an embedding.
      depth: number of layers, 6n + 4.
      width: factor of the number of features.
      momentum: of the running statistics of batch normalisation.
      convolution: "auto", "patches" or "lax": see `metalearn.models.layouts`.
    """

    outputs: int | None
    depth: int = 16
    width: int = 1
    momentum: float = 0.9
    convolution: str = "lax"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        options = (self.momentum, self.convolution)
        x = _conv(layouts.STEM, self.convolution, "stem")(x)
        for i, block in enumerate(layouts.wide_blocks(self.depth, self.width)):
            x = ResidualBlock(block, *options, name=f"block_{i}")(x, train)
        x = nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x))
        return _head(self.outputs, x.mean((1, 2)))


class ResNet12(nn.Module):
    """ResNet-12 of the few-shot literature. Images [batch, h, w, c], outputs [batch, outputs].

    Oreshkin et al. 2018 (arXiv:1805.10123) and, with these widths, Lee et al. 2019
    (arXiv:1904.03758), whose DropBlock is left out. Four blocks of three 3x3 convolutions with
    batch normalisation and a leaky ReLU of slope 0.1, added to a 1x1 convolution of their input
    and max-pooled; then an average over positions. Images are 16 x 16 at least.

    Args:
      outputs: the width of the head; None: no head, the output is an embedding.
      filters: of the convolutions of each block.
      momentum: of the running statistics of batch normalisation.
      convolution: "auto", "patches" or "lax": see `metalearn.models.convolution`.
    """

    outputs: int | None
    filters: tuple[int, ...] = layouts.RESNET_12
    momentum: float = 0.9
    convolution: str = "lax"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network, with batch statistics if `train`, else with running statistics."""
        widths("ResNet12", filters=self.filters)
        layouts.pooled_sides("ResNet12", len(self.filters), *x.shape[1:3])
        for i, filters in enumerate(self.filters):
            options = (filters, self.momentum, self.convolution)
            x = max_pool(TripleBlock(*options, name=f"block_{i}")(x, train))
        return _head(self.outputs, x.mean((1, 2)))


class TripleBlock(nn.Module):
    """Three convolutions with normalisation, added to a projection of their input.

    Args:
      filters: of the convolutions.
      momentum: of the running statistics.
      convolution: "auto", "patches" or "lax".
    """

    filters: int
    momentum: float
    convolution: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum)
        project = _conv(self.filters, self.convolution, "project", window=1)
        skip = norm(name="norm_project")(project(x))
        for i in range(3):
            x = norm(name=f"norm_{i}")(_conv(self.filters, self.convolution, f"conv_{i}")(x))
            x = layouts.leaky(x) if i < 2 else x
        return layouts.leaky(x + skip)


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalisation, added to their input.

    Args:
      block: its sizes.
      momentum: of the running statistics.
      convolution: "auto", "patches" or "lax".
    """

    block: layouts.Block
    momentum: float
    convolution: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Apply to [batch, h, w, c]."""
        features, stride, projects = self.block
        norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum)
        active = nn.relu(norm(name="norm_0")(x))
        if projects:
            x = _conv(features, self.convolution, "project", stride, window=1)(active)
        out = _conv(features, self.convolution, "conv_0", stride)(active)
        out = nn.relu(norm(name="norm_1")(out))
        return x + _conv(features, self.convolution, "conv_1")(out)


def _head(outputs: int | None, x: jax.Array) -> jax.Array:
    """Return a dense layer of an embedding [batch, d]; without outputs the embedding."""
    return x if outputs is None else nn.Dense(outputs, name="head")(x)


def _conv(features: int, method: str, name: str, stride: int = 1, window: int = 3) -> nn.Conv:
    options = layouts.flax_residual_conv(method, window)
    return nn.Conv(features, strides=(stride, stride), name=name, **options)


class Transformer(nn.Module):
    """A decoder-only language model: tokens [batch, S] -> logits [batch, S, vocabulary].

    Args:
      architecture: its sizes and options.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        """Apply the network; `train` makes no difference."""
        del train
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in self.architecture.declare().items()
        }
        return self.architecture.apply(params, tokens)
