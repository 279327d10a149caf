"""Wide residual networks in Flax linen; `metalearn.models.layouts` says what they are."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from metalearn.models.convolution import flax_convolution
from metalearn.models.layouts import HE, PADDING, STEM, Block, wide_blocks


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko & Komodakis 2016 (arXiv:1605.07146). Images [batch, h, w, c].

    Outputs [batch, outputs]. The depth is 6n + 4.
    """

    outputs: int
    depth: int = 16
    width: int = 1
    momentum: float = 0.9  # of running statistics, where the policy keeps any
    convolution: str = "lax"  # see `metalearn.models.layouts`

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply, with batch statistics where `train`, running ones where not."""
        options = (self.momentum, self.convolution)
        x = _conv(STEM, self.convolution, "stem")(x)
        for i, block in enumerate(wide_blocks(self.depth, self.width)):
            x = ResidualBlock(block, *options, name=f"block_{i}")(x, train)
        x = nn.relu(nn.BatchNorm(not train, momentum=self.momentum, name="norm")(x))
        return nn.Dense(self.outputs, name="head")(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions, each after a normalisation, added to their input."""

    block: Block
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


def _conv(features: int, method: str, name: str, stride: int = 1, window: int = 3) -> nn.Conv:
    return nn.Conv(
        features,
        (window, window),
        strides=(stride, stride),
        padding=PADDING if window == 3 else "VALID",
        use_bias=False,
        kernel_init=HE,
        conv_general_dilated=flax_convolution(method),
        name=name,
    )
