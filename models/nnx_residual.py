"""Wide residual networks in Flax NNX; `metalearn.models.layouts` says what they are."""

from __future__ import annotations

import jax
from flax import nnx

from metalearn.models.convolution import flax_convolution
from metalearn.models.layouts import HE, PADDING, STEM, Block, wide_blocks
from metalearn.models.nnx_layers import Norm


class WideResNet(nnx.Module):
    """WRN-depth-width; see `linen_residual.WideResNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        image: tuple[int, int, int],  # height, width, channels
        outputs: int,
        depth: int = 16,
        width: int = 1,
        momentum: float = 0.9,
        convolution: str = "lax",
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(image[2], STEM, convolution, rngs)
        channels, blocks = STEM, []
        for block in wide_blocks(depth, width):
            blocks.append(ResidualBlock(channels, block, momentum, convolution, rngs=rngs))
            channels = block.features
        self.blocks, self.norm = nnx.List(blocks), Norm(channels, momentum)
        self.head = nnx.Linear(channels, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply, with batch statistics where `train`, running ones where not."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, train)
        return self.head(nnx.relu(self.norm(x, train)).mean((1, 2)))


class ResidualBlock(nnx.Module):
    """Two convolutions, each after a normalisation, added to their input."""

    def __init__(
        self, channels: int, block: Block, momentum: float, convolution: str, *, rngs: nnx.Rngs
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


def _conv(
    channels: int, features: int, method: str, rngs: nnx.Rngs, stride: int = 1, window: int = 3
) -> nnx.Conv:
    return nnx.Conv(
        channels,
        features,
        (window, window),
        strides=stride,
        padding=PADDING if window == 3 else "VALID",
        use_bias=False,
        kernel_init=HE,
        conv_general_dilated=flax_convolution(method),
        rngs=rngs,
    )
