"""Sizes, strides and initial values of the image networks, shared by the three libraries.

LeNet-5 (LeCun et al. 1998, Proc. IEEE 86, 2278-2324) in its usual modern form: two
5x5 convolutions, the first padded, each followed by a ReLU and a max-pool, then three
dense layers. 61,706 parameters on 28x28x1 and 10 classes.

A wide residual network, WRN-d-w (Zagoruyko & Komodakis 2016, arXiv:1605.07146), is a
3x3 convolution to 16 features, three groups of n = (d - 4) / 6 blocks with 16w, 32w and
64w features, the second and third group halving the image, then an average over
positions and a dense head. A block computes

    x + conv(relu(norm(conv(relu(norm(x))))))

("pre-activation"). Where it changes the number of features, x is replaced by a 1x1
convolution of relu(norm(x)), as in the authors' code. Convolutions have no bias, as a
normalisation follows each of them. WRN-16-1 has 175,066 parameters on 3 channels and 10
classes; those of a wider one grow as w squared.

Both networks are for long training runs, where all images share one kernel, so their convolutions
are `lax.conv_general_dilated`: on a CPU, Hessian products take half the time and a quarter of the
memory of `convolution="patches"`. Where several runs are vmapped, each with its own kernels,
patches are faster (`metalearn.models.convolution`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from metalearn._utils.checks import at_most, counts, is_integer
from metalearn.models.convolution import flax_convolution

DEEPEST = 1000  # upper bound of the number of blocks, each of which is traced
LENET = ((6, "SAME"), (16, "VALID"))  # features and padding of its 5x5 convolutions
LENET_HIDDEN = (120, 84)

RESNET_12 = (64, 160, 320, 640)  # filters of its four blocks, as in arXiv:1904.03758

STEM = 16  # features of a residual network's first convolution
PADDING = ((1, 1), (1, 1))  # of 3x3 convolutions, as in the paper; "SAME" differs at stride 2
HE = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, 1502.01852


class Block(NamedTuple):
    """A residual block.

    features: of its two convolutions.
    stride: of its first convolution.
    projects: whether a 1x1 convolution of the input replaces the input in the sum.
    """

    features: int
    stride: int
    projects: bool


def wide_blocks(depth: int, width: int) -> list[Block]:
    """Return the blocks of WRN-depth-width; ValueError for a depth that is not 6n + 4."""
    per_group = _per_group(depth)
    if width < 1:
        raise ValueError(
            f"`WideResNet` got width={width}, but it multiplies 16, 32 and 64 features. Pass a "
            f"positive integer, such as width=1."
        )
    blocks, channels = [], STEM
    for group, features in enumerate((16 * width, 32 * width, 64 * width)):
        for i in range(per_group):
            stride = 2 if group and i == 0 else 1
            blocks.append(Block(features, stride, features != channels))
            channels = features
    return blocks


def _per_group(depth: int) -> int:
    if not is_integer(depth):
        counts("WideResNet", 10, depth=depth)
    at_most("WideResNet", 6 * DEEPEST, depth=depth)
    per_group, rest = divmod(depth - 4, 6)
    if rest or per_group < 1:
        near = [6 * n + 4 for n in (per_group, per_group + 1) if n >= 1] or [10]
        raise ValueError(
            f"`WideResNet` got depth={depth}, but its depth is 6n + 4: three groups of n blocks of "
            f"two convolutions, and four layers more. Pass depth={' or '.join(map(str, near))}."
        )
    return per_group


def flax_residual_conv(method: str, window: int) -> dict[str, Any]:
    """Return the arguments of a `window` x `window` convolution of a residual block in Flax.

    Args:
      method: of `metalearn.models.convolution.convolve`.
      window: 3, or 1 for a projection.
    """
    return {
        "kernel_size": (window, window),
        "padding": PADDING if window == 3 else "VALID",
        "use_bias": False,
        "kernel_init": HE,
        "conv_general_dilated": flax_convolution(method),
    }


def lenet_pixels(height: int, width: int) -> int:
    """Return the number of positions after LeNet's convolutions; ValueError for a small image."""
    sides = [(side // 2 - 4) // 2 for side in (height, width)]
    if min(sides) < 1:
        raise ValueError(
            f"`LeNet` got images of {height} x {width}, of which its convolutions and pools leave "
            f"nothing. Pad or enlarge them to 12 x 12 at least, or take a `ConvNet`."
        )
    return sides[0] * sides[1]


def leaky(x: jax.Array) -> jax.Array:
    """Return the leaky ReLU of ResNet-12, of slope 0.1."""
    return jax.nn.leaky_relu(x, 0.1)


def pooled_sides(network: str, pools: int, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) after as many 2x2 poolings; ValueError where they leave nothing.

    Args:
      network: its name, for the message.
      pools: blocks of the network that end in a pooling, each of which halves both sides.
      height: of the images, in pixels.
      width: of the images, in pixels.
    """
    sides = height >> pools, width >> pools
    if min(sides) < 1:
        most = min(height, width).bit_length() - 1
        raise ValueError(
            f"`{network}` got images of {height} x {width}, of which {pools} poolings leave "
            f"nothing: it is too deep for them. Take {most} blocks at most, or images of "
            f"{1 << pools} x {1 << pools} at least."
        )
    return sides
