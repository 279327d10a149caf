"""Convolutions that stay fast when every task has its own kernel.

Under `vmap` over tasks, each with kernels of its own, a convolution becomes a grouped
one, and no backend is good at those; its second derivative is worse. The same sum
written as patches times a matrix is a batched matmul, which all of them are good at, and
so are its derivatives. On a CPU it wins without `vmap` too, while images are small.
`experiments/benchmarks/convolution.py` measures both.

A patch matrix holds kernel_h * kernel_w copies of the image, so large images go back to
`lax.conv_general_dilated`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

METHODS = ("auto", "patches", "lax")
PATCHES_UP_TO = 64 * 64  # pixels of output, where "auto" changes over


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    method: str = "auto",
) -> jax.Array:
    """Convolve images [n, h, w, c] with a kernel [kh, kw, c, features]."""
    if method not in METHODS:
        raise ValueError(f"A convolution is done by one of {METHODS}, not {method!r}.")
    pads = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    height, width = (
        (size + sum(pad) - k) // stride + 1
        for size, pad, k, stride in zip(
            images.shape[1:3], pads, kernel.shape[:2], strides, strict=True
        )
    )
    if method == "lax" or (method == "auto" and height * width > PATCHES_UP_TO):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, strides, pads, dimension_numbers=layout)
    columns = _patches(images, kernel.shape[:2], strides, pads, (height, width))
    flat = columns.reshape(-1, columns.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return flat.reshape(*columns.shape[:-1], kernel.shape[-1])


def _patches(
    images: jax.Array, window: Any, strides: Any, pads: Any, output: tuple[int, int]
) -> jax.Array:
    """Cut out every window: [n, out_h, out_w, kh * kw * c], in the kernel's own order."""
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    stop = [(size - 1) * stride + 1 for size, stride in zip(output, strides, strict=True)]
    slices = [
        padded[:, i : i + stop[0] : strides[0], j : j + stop[1] : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(slices, axis=-1)


def flax_convolution(method: str) -> Any:
    """Return a stand-in for `lax.conv_general_dilated`, as `flax` layers accept one.

    What patches do not cover (dilation, groups, other layouts) goes to `lax`.
    """

    def conv_general_dilated(
        lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options: Any
    ) -> jax.Array:
        plain = (
            lhs.ndim == 4
            and options.get("feature_group_count", 1) == 1
            and math.prod(options.get("lhs_dilation") or (1,)) == 1
            and math.prod(options.get("rhs_dilation") or (1,)) == 1
        )
        if not plain:
            return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
        return convolve(lhs, rhs, tuple(window_strides), padding, method)

    return conv_general_dilated


def max_pool(images: jax.Array) -> jax.Array:
    """Pool windows of 2x2, stride 2, a last odd row or column dropped: [n, h//2, w//2, c].

    A reshape and a maximum, whose second derivative is cheap, as `reduce_window`'s is not.
    """
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
