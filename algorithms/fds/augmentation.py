"""Random augmentation of images, differentiable in its strength, so that the strength is learned.

The random draws (which noise, how far along the range) do not depend on the strengths, which scale
them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def jitter(
    images: Float[Array, "n h w c"],
    key: jax.Array,
    noise: jax.typing.ArrayLike = 0.0,
    contrast: jax.typing.ArrayLike = 0.0,
    shift: jax.typing.ArrayLike = 0.0,
) -> Float[Array, "n h w c"]:
    """Add noise to each image, change its contrast and shift it, each by a draw of its own.

    Args:
      images: [n, h, w, c].
      key: (), of the random draws.
      noise: (), the standard deviation of the normal noise added to each pixel.
      contrast: (), the largest distance from one of the factor by which an image's deviation from
        its mean is multiplied.
      shift: (), the largest shift along each axis, in pixels and fractions of them.
    """
    noise_key, contrast_key, shift_key = jax.random.split(key, 3)
    count = images.shape[0]
    shifts = shift * jax.random.uniform(shift_key, (2, count), images.dtype, -1, 1)
    images = jax.vmap(_shifted)(images, shifts[0], shifts[1])
    factors = 1 + contrast * jax.random.uniform(contrast_key, (count, 1, 1, 1), images.dtype, -1, 1)
    mean = images.mean((1, 2, 3), keepdims=True)
    images = mean + factors * (images - mean)
    return images + noise * jax.random.normal(noise_key, images.shape, images.dtype)


def _shifted(
    image: Float[Array, "h w c"], down: Float[Array, ""], right: Float[Array, ""]
) -> Float[Array, "h w c"]:
    """Return an image [h, w, c] shifted by fractions of pixels, its edge rows repeated."""
    rows = jnp.arange(image.shape[0], dtype=image.dtype) - down
    columns = jnp.arange(image.shape[1], dtype=image.dtype) - right
    return _interpolated(_interpolated(image, rows).swapaxes(0, 1), columns).swapaxes(0, 1)


def _interpolated(
    image: Float[Array, "h w c"], rows: Float[Array, " rows"]
) -> Float[Array, "rows w c"]:
    """Return an image [h, ...] at fractional rows, by linear interpolation."""
    rows = jnp.clip(rows, 0, image.shape[0] - 1)
    below = jnp.clip(jnp.floor(rows), 0, image.shape[0] - 2).astype(jnp.int32)
    fraction = (rows - below)[:, None, None]
    return (1 - fraction) * image[below] + fraction * image[below + 1]
