"""The networks of the few-shot literature, and two of image classification, in Haiku."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn._utils.checks import at_least, at_most, widths
from metalearn.models.convolution import max_pool
from metalearn.models.haiku_layers import Conv, Norm, seeded
from metalearn.models.haiku_residual import WideResNet
from metalearn.models.layouts import DEEPEST, LENET, LENET_HIDDEN, lenet_pixels
from metalearn.models.transformer import Architecture

__all__ = ["MLP", "ConvNet", "LeNet", "Transformer", "WideResNet"]


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
        widths("MLP", hidden=hidden)
        self.outputs, self.hidden, self.activation = outputs, hidden, activation

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = self.activation(hk.Linear(width, name=f"hidden_{i}")(x))
        return hk.Linear(self.outputs, name="head")(x)


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
        at_least("ConvNet", 1, filters=filters, blocks=blocks)
        at_most("ConvNet", DEEPEST, blocks=blocks)
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


class LeNet(hk.Module):
    """LeNet-5; see `linen_networks.LeNet`. Images [batch, h, w, c], 12 x 12 at least."""

    def __init__(self, outputs: int, convolution: str = "lax", name: str | None = None):
        super().__init__(name)
        self.outputs, self.convolution = outputs, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply; the same in training and out of it."""
        del train
        lenet_pixels(*x.shape[1:3])
        for i, (filters, padding) in enumerate(LENET):
            conv = Conv(filters, 1, self.convolution, 5, padding, name=f"conv_{i}")
            x = max_pool(jax.nn.relu(conv(x)))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(LENET_HIDDEN):
            x = jax.nn.relu(hk.Linear(width, name=f"hidden_{i}")(x))
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
            name: hk.get_parameter(name, shape, jnp.float32, seeded(init))
            for name, (shape, init) in self.architecture.declare().items()
        }
        return self.architecture.apply(params, tokens)
