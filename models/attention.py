"""Causal self-attention and rotary positions, as plain functions of arrays.

An attention is any callable (q, k, v) -> out, each [batch, S, heads, head_dim]. Under
`MixedFlow` it is differentiated forward over reverse, so every operation in it, those of a
hand-written backward pass included, needs a JVP. Fused kernels mostly have none; the two
attentions here are ordinary JAX, and have derivatives of any order.

| attention               | memory of one layer's gradient | extra work              |
|-------------------------|--------------------------------|-------------------------|
| `causal_attention`      | batch * heads * S * S          | none                    |
| `BlockedAttention(n)`   | batch * heads * n * S          | the scores once more    |

References: Vaswani et al. 2017 (arXiv:1706.03762); Su et al. 2021 for rotary positions
(arXiv:2104.09864); Rabe and Staats 2021 for attention in blocks (arXiv:2112.05682).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Average the values at positions up to each query's own: [batch, S, heads, head_dim]."""
    return _attend(q, k, v, jnp.arange(q.shape[1]))


@dataclasses.dataclass(frozen=True)
class BlockedAttention:
    """`causal_attention`, `block` queries at a time, whose scores are never held together.

    Exact. Each block's scores are computed again on the way back. The last block may be
    shorter.
    """

    block: int = 128

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block < 1:
            raise ValueError(f"`BlockedAttention(block={self.block})` must be at least 1.")

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend: q, k, v [batch, S, heads, head_dim] -> the same shape."""
        length = q.shape[1]
        whole = length - length % self.block
        attend = jax.checkpoint(_attend, prevent_cse=False)

        def one(start: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice_in_dim(q, start, self.block, axis=1)
            return attend(block, k, v, start + jnp.arange(self.block))

        out = []
        if whole:
            blocks = jax.lax.map(one, jnp.arange(0, whole, self.block))  # [blocks, batch, ...]
            out.append(jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], whole, *q.shape[2:]))
        if whole < length:
            out.append(_attend(q[:, whole:], k, v, jnp.arange(whole, length)))
        return jnp.concatenate(out, axis=1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attend from queries at `positions` [block] to all keys at or before them."""
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=precise)
    visible = positions[:, None] >= jnp.arange(k.shape[1])[None]
    # A finite floor: the tangent of infinity minus infinity would be NaN.
    floor = jnp.finfo(precise).min / 2
    scores = jnp.where(visible[None, None], scores / math.sqrt(q.shape[-1]), floor)
    # A softmax that divides after the sum over keys: one array of [S, S] fewer to keep.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]  # [batch, block, heads, 1]
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=precise)
    return (mixed / total).astype(v.dtype)


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Turn pairs of features by an angle that grows with position: [batch, S, heads, even].

    Feature i is paired with feature i + head_dim / 2, and the pair at position t is turned by
    t * base^(-2i / head_dim). A product of two vectors so turned depends on their positions
    by the difference alone.
    """
    cosine, sine = (table[None, :, None].astype(x.dtype) for table in _angles(x, base))
    first, second = jnp.split(x, 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1)


def _angles(x: jax.Array, base: float) -> tuple[jax.Array, jax.Array]:
    """Return the cosine and the sine of every angle, [S, head_dim / 2]."""
    length, half = x.shape[1], x.shape[-1] // 2
    precise = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=precise) / half)
    angles = jnp.arange(length, dtype=precise)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)
