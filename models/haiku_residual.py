"""Wide residual networks in Haiku; `metalearn.models.layouts` says what they are."""

from __future__ import annotations

import haiku as hk
import jax

from metalearn.models.haiku_layers import Conv, Norm, seeded
from metalearn.models.layouts import HE, PADDING, STEM, Block, wide_blocks


class WideResNet(hk.Module):
    """WRN-depth-width; see `linen_residual.WideResNet`. Images [batch, h, w, c]."""

    def __init__(
        self,
        outputs: int,
        depth: int = 16,
        width: int = 1,
        momentum: float = 0.9,
        convolution: str = "lax",
        name: str | None = None,
    ):
        super().__init__(name)
        self.outputs, self.blocks = outputs, wide_blocks(depth, width)
        self.momentum, self.convolution = momentum, convolution

    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Apply, with batch statistics where `train`, running ones where not."""
        options = (self.momentum, self.convolution)
        x = _conv(STEM, self.convolution, "stem")(x)
        for i, block in enumerate(self.blocks):
            x = ResidualBlock(block, *options, name=f"block_{i}")(x, train)
        x = jax.nn.relu(Norm(self.momentum, name="norm")(x, train))
        return hk.Linear(self.outputs, name="head")(x.mean((1, 2)))


class ResidualBlock(hk.Module):
    """Two convolutions, each after a normalisation, added to their input."""

    def __init__(self, block: Block, momentum: float, convolution: str, name: str | None = None):
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


def _conv(features: int, method: str, name: str, stride: int = 1, window: int = 3) -> Conv:
    padding, init = PADDING if window == 3 else "VALID", seeded(HE)
    return Conv(features, stride, method, window, padding, with_bias=False, init=init, name=name)
