"""The networks of the few-shot literature, and two of image classification, in Flax NNX."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from metalearn._utils import checks
from metalearn.models.convolution import flax_convolution, max_pool
from metalearn.models.layouts import DEEPEST, LENET, LENET_HIDDEN, lenet_pixels
from metalearn.models.nnx_layers import Norm
from metalearn.models.nnx_residual import WideResNet
from metalearn.models.transformer import Architecture

__all__ = ["MLP", "ConvNet", "LeNet", "Transformer", "WideResNet"]


class MLP(nnx.Module):
    """Dense layers; inputs [batch, ...] are flattened. Outputs [batch, outputs]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
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
        self.head = nnx.Linear(widths[-1], outputs, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = self.activation(layer(x))
        return self.head(x)


class ConvNet(nnx.Module):
    """The 4-block network; see `linen_networks.ConvNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int,
        filters: int = 64,
        blocks: int = 4,
        pool: bool = False,
        momentum: float = 0.9,
        convolution: str = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        checks.at_least("ConvNet", 1, filters=filters, blocks=blocks)
        checks.at_most("ConvNet", DEEPEST, blocks=blocks)
        stride = 1 if pool else 2
        sides, channels = list(image[:2]), image[2]
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
            sides = [side // 2 for side in sides]
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        features = math.prod(sides) * channels if pool else channels
        self.head = nnx.Linear(features, outputs, rngs=rngs)
        self.pool = pool

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply, with batch statistics where `train`, running ones where not."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), train))
            x = max_pool(x) if self.pool else x
        return self.head(x.reshape(x.shape[0], -1) if self.pool else x.mean((1, 2)))


class LeNet(nnx.Module):
    """LeNet-5; see `linen_networks.LeNet`. Images [batch, h, w, c], 12 x 12 at least."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int,
        convolution: str = "lax",
        *,
        rngs: nnx.Rngs,
    ):
        channels, convs = image[2], []
        for filters, padding in LENET:
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
        self.dense = MLP(lenet_pixels(*image[:2]) * channels, outputs, LENET_HIDDEN, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        for conv in self.convs:
            x = max_pool(nnx.relu(conv(x)))
        return self.dense(x, train)


class Transformer(nnx.Module):
    """A language model of some architecture: tokens [batch, S] -> logits [batch, S, vocabulary]."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        self.architecture = architecture
        for name, (shape, init) in architecture.declare().items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))

    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        params = {name: getattr(self, name)[...] for name in self.architecture.declare()}
        return self.architecture.apply(params, tokens)
