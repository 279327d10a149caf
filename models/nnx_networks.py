"""The networks of the few-shot literature in Flax NNX."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from metalearn.models.convolution import flax_convolution, max_pool
from metalearn.models.normalization import batch_statistics, normalized
from metalearn.models.transformer import Architecture


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


class Norm(nnx.Module):
    """Batch normalisation whose running statistics carry their derivative.

    `nnx.BatchNorm` cuts it with a `stop_gradient`; under the policy "running" the
    meta-gradient would then not be that of the loss.
    """

    def __init__(self, features: int, momentum: float):
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = (
            nnx.BatchStat(jnp.zeros(features)),
            nnx.BatchStat(jnp.ones(features)),
        )
        self.momentum = momentum

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise over all axes but the last, by the batch or by what is remembered."""
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = batch_statistics(x)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return normalized(x, mean, var, self.scale[...], self.bias[...])


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
