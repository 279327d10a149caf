"""Convolutions that are fast when every task has its own kernel, and their companions.

Under `vmap` over tasks with their own kernels, a convolution becomes a grouped convolution, which
is slow on every backend; its second derivative is slower still. The same sum as a matrix of patches
times a matrix is a batched matmul, which is fast, and so are its derivatives.
`experiments/benchmarks/convolution.py` measures both: on a CPU, patches are 1.4 to 5.9 times as
fast with a kernel per task, and about equal with one kernel.

A kernel [kh * kw * c, features] is transposed before the product, so that its gradient is computed
as [features, kh * kw * c]. On a CPU, XLA takes up to 1.8 times as long for the same products as a
matrix of short rows, and a step of MAML has four such gradients for every convolution. The same
benchmark measures this.

The patch matrix holds kernel_h * kernel_w copies of the image, so "auto" uses
`lax.conv_general_dilated` for large images; a model that does not adapt per task may choose "lax".

`max_pool` and batch normalisation (`batch_statistics`, `normalized`) are written for cheap second
derivatives; each library stores the running statistics in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metalearn._utils.checks import pick
from metalearn._utils.trees import precise

METHODS = {
    "auto": "by the size of the output",
    "patches": "as patches times a matrix",
    "lax": "as `lax.conv_general_dilated`",
}
NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # dimension numbers of NHWC images, HWIO kernels
MOST_PATCHES = 128 * 128  # output pixels above which "auto" is "lax"


def convolve(
    images: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c features"],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    method: str = "auto",
    precision: Any = None,
) -> Float[Array, "n out_h out_w features"]:
    """Convolve images [n, h, w, c] with a kernel [kh, kw, c, features].

    Args:
      images: [n, h, w, c].
      kernel: [kh, kw, c, features].
      strides: along h and w.
      padding: "SAME", "VALID", or ((top, bottom), (left, right)).
      method: "patches", "lax", or "auto": by the size of the output.
      precision: of the products, as in `jax.lax`.
    """
    pick(METHODS, method, "convolution method")
    dtype = jnp.promote_types(images.dtype, kernel.dtype)  # of "lax", which takes one
    images, kernel = images.astype(dtype), kernel.astype(dtype)
    size, window = images.shape[1:3], kernel.shape[:2]
    pads: Any = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(size, window, strides, padding)
    (top, bottom), (left, right) = pads
    height = (size[0] + top + bottom - window[0]) // strides[0] + 1
    width = (size[1] + left + right - window[1]) // strides[1] + 1
    if method == "lax" or (method == "auto" and height * width > MOST_PATCHES):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            strides,
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
    columns = _patches(images, window, strides, pads, (height, width))
    rows = columns.reshape(-1, columns.shape[-1])
    flat = times_kernel(rows, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
    return flat.reshape(*columns.shape[:-1], kernel.shape[-1])


def times_kernel(
    rows: Float[Array, "n columns"],
    kernel: Float[Array, "columns features"],
    precision: Any = None,
) -> Float[Array, "n features"]:
    """Return rows @ kernel, whose gradient for the kernel is computed with its longer axis last.

    Without the barrier XLA folds the transposition into the products. A barrier is linear and its
    transpose is a barrier, so the derivatives of every order have it too.

    Args:
      rows: [n, columns], a patch each.
      kernel: [columns, features].
      precision: of the products, as in `jax.lax`.
    """
    if kernel.shape[0] <= kernel.shape[1]:
        return jnp.matmul(rows, kernel, precision=precision)
    transposed = jax.lax.optimization_barrier(kernel.T)
    return jnp.einsum("nc,fc->nf", rows, transposed, precision=precision)


def _patches(
    images: Float[Array, "n h w c"], window: Any, strides: Any, pads: Any, output: tuple[int, int]
) -> Float[Array, "n out_h out_w columns"]:
    """Return the window at every position: [n, out_h, out_w, kh * kw * c]."""
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    stop = [(size - 1) * stride + 1 for size, stride in zip(output, strides, strict=True)]
    slices = [
        padded[:, i : i + stop[0] : strides[0], j : j + stop[1] : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(slices, axis=-1)


def flax_convolution(method: str) -> Any:
    """Return a replacement of `lax.conv_general_dilated` for the argument of Flax layers.

    Dilation, groups and other layouts are computed by `lax` itself.
    """

    def conv_general_dilated(
        lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **options: Any
    ) -> jax.Array:
        ones = (options.get("lhs_dilation"), options.get("rhs_dilation"))
        plain = (
            lhs.ndim == 4
            and tuple(options.get("dimension_numbers") or ()) == NHWC
            and options.get("feature_group_count", 1) == 1
            and all(math.prod(dilation or (1,)) == 1 for dilation in ones)
        )
        if not plain:
            return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
        strides, precision = tuple(window_strides), options.get("precision")
        return convolve(lhs, rhs, strides, padding, method, precision)

    return conv_general_dilated


def max_pool(images: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Max-pool 2x2 windows with stride 2, without a last odd row or column: [n, h//2, w//2, c].

    Comparisons within a reshaped array: their second derivative is cheaper than that of
    `reduce_window`. The derivative goes to the first of several largest. That of `x.max()` divides
    by how many entries equal the maximum, which are none where XLA computes an entry a second time
    and rounds it otherwise, and is NaN then.
    """
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    windows = even.reshape(n, height // 2, 2, width // 2, 2, channels)
    rows = _larger(windows[..., 0, :], windows[..., 1, :])
    return _larger(rows[:, :, 0], rows[:, :, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the larger entries of two arrays of one shape: a's where equal, NaN where one is."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def batch_statistics(
    x: Float[Array, "*batch channels"],
) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """Return mean and variance [channels] of x [..., channels], in float32 at least."""
    leading, x = tuple(range(x.ndim - 1)), precise(x)
    mean = x.mean(leading)
    return mean, jnp.maximum((x * x).mean(leading) - mean * mean, 0)


def normalized(
    x: Float[Array, "*batch channels"],
    mean: Float[Array, " channels"],
    variance: Float[Array, " channels"],
    scale: Float[Array, " channels"],
    offset: Float[Array, " channels"],
) -> Float[Array, "*batch channels"]:
    """Return batch-normalised x [..., channels]; the other arguments are [channels].

    Computed in float32 at least, in the dtype of x and scale.
    """
    along = (None,) * (x.ndim - 1)
    gain = scale * jax.lax.rsqrt(precise(variance) + 1e-5)
    outputs = (precise(x) - mean[along]) * gain[along] + offset[along]
    return outputs.astype(jnp.result_type(x, scale))
