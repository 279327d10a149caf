"""Augmentation whose strength can be learned: differentiable in how much, random in which."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def jitter(
    images: jax.Array,
    key: jax.Array,
    noise: jax.typing.ArrayLike = 0.0,
    contrast: jax.typing.ArrayLike = 0.0,
    shift: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    """Change each image a little, in its own way.

    Args:
      images: [n, h, w, c].
      key: decides the changes.
      noise: (), the standard deviation of what is added to each pixel.
      contrast: (), how far the factor of an image's deviation from its mean is from one, at most.
      shift: (), pixels by which an image moves along each axis at most, in fractions too.
    """
    noise_key, contrast_key, shift_key = jax.random.split(key, 3)
    count = images.shape[0]
    moves = shift * jax.random.uniform(shift_key, (2, count), images.dtype, -1, 1)
    images = jax.vmap(_shifted)(images, moves[0], moves[1])
    factors = 1 + contrast * jax.random.uniform(contrast_key, (count, 1, 1, 1), images.dtype, -1, 1)
    mean = images.mean((1, 2, 3), keepdims=True)
    images = mean + factors * (images - mean)
    return images + noise * jax.random.normal(noise_key, images.shape, images.dtype)


def _shifted(image: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
    """Return an image [h, w, c] moved by fractions of pixels, its edge repeated."""
    rows = jnp.arange(image.shape[0], dtype=image.dtype) - down
    columns = jnp.arange(image.shape[1], dtype=image.dtype) - right
    return _between(_between(image, rows).swapaxes(0, 1), columns).swapaxes(0, 1)


def _between(image: jax.Array, places: jax.Array) -> jax.Array:
    """Read an image [h, ...] at fractional rows, linearly between its own."""
    places = jnp.clip(places, 0, image.shape[0] - 1)
    below = jnp.clip(jnp.floor(places), 0, image.shape[0] - 2).astype(jnp.int32)
    share = (places - below)[:, None, None]
    return (1 - share) * image[below] + share * image[below + 1]
