"""Self-attention, causal and not, and rotary positions, as plain functions of arrays.

An attention is any callable (q, k, v) -> out, each [batch, S, heads, head_dim]. `MixedFlow`
differentiates it forward over reverse, so every operation in it, including those of a hand-written
backward pass, needs a JVP. Most fused kernels have none; the attentions here are ordinary JAX,
with derivatives of any order.

| attention               | memory of one layer's gradient | extra work              |
|-------------------------|--------------------------------|-------------------------|
| `causal_attention`      | batch * heads * S * S          | none                    |
| `full_attention`        | batch * heads * S * S          | none                    |
| `BlockedAttention(n)`   | batch * heads * n * S          | the scores, recomputed  |

References: Vaswani et al. 2017 (arXiv:1706.03762); Su et al. 2021 for rotary positions
(arXiv:2104.09864); Rabe and Staats 2021 for attention in blocks (arXiv:2112.05682).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metalearn._utils.fields import check_fields

Heads = Float[Array, "batch S heads head_dim"]


def causal_attention(q: Heads, k: Heads, v: Heads) -> Heads:
    """Causal self-attention: q, k, v [batch, S, heads, head_dim] -> the same shape."""
    return _attend(q, k, v, jnp.arange(q.shape[1]))


def full_attention(q: Heads, k: Heads, v: Heads) -> Heads:
    """Self-attention to all positions: q, k, v [batch, S, heads, head_dim] -> the same shape."""
    return _attend(q, k, v, jnp.full(q.shape[1], q.shape[1] - 1))


@dataclasses.dataclass(frozen=True)
class BlockedAttention:
    """`causal_attention` in blocks of queries, so that only the scores of one block are in memory.

    Exact. The scores of a block are recomputed in the backward pass (rematerialisation).

    Args:
      block: queries of a block; the last block may be shorter.
    """

    block: int = 128

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block < 1:
            raise ValueError(f"`BlockedAttention(block={self.block})` must be at least 1.")

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        """Attend: q, k, v [batch, S, heads, head_dim] -> the same shape."""
        length = q.shape[1]
        full = length - length % self.block  # queries in full blocks
        attend = jax.checkpoint(_attend, prevent_cse=False)

        def attend_block(start: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice_in_dim(q, start, self.block, axis=1)
            return attend(block, k, v, start + jnp.arange(self.block))

        out = []
        if full:
            starts = jnp.arange(0, full, self.block)
            blocks = jax.lax.map(attend_block, starts)  # [blocks, batch, ...]
            out.append(jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], full, *q.shape[2:]))
        if full < length:
            out.append(_attend(q[:, full:], k, v, jnp.arange(full, length)))
        return jnp.concatenate(out, axis=1)


def _attend(
    q: Float[Array, "batch block heads head_dim"],
    k: Heads,
    v: Heads,
    positions: Int[Array, " block"],
) -> Float[Array, "batch block heads head_dim"]:
    """Attend from queries at `positions` [block] to all keys at or before them."""
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=precise)
    visible = positions[:, None] >= jnp.arange(k.shape[1])[None]
    # A finite floor: the tangent of infinity minus infinity would be NaN.
    floor = jnp.finfo(precise).min / 2
    scores = jnp.where(visible[None, None], scores / math.sqrt(q.shape[-1]), floor)
    # A softmax that divides after the sum over keys: one residual [S, S] less.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]  # [batch, block, heads, 1]
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=precise)
    return (mixed / total).astype(v.dtype)


def rotate(x: Heads, base: float = 10_000.0) -> Heads:
    """Rotary positions: rotate pairs of features [batch, S, heads, even], an angle per position.

    Feature i is paired with feature i + head_dim / 2, and the pair at position t is rotated by
    t * base^(-2i / head_dim). The inner product of two rotated vectors depends only on the
    difference of their positions.
    """
    cosine, sine = (table[None, :, None].astype(x.dtype) for table in _angles(x, base))
    first, second = jnp.split(x, 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1)


def _angles(x: Heads, base: float) -> tuple[Float[Array, "S half"], Float[Array, "S half"]]:
    """Return the cosine and the sine of every rotation, [S, head_dim / 2]."""
    length, half = x.shape[1], x.shape[-1] // 2
    precise = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(half, dtype=precise) / half)
    angles = jnp.arange(length, dtype=precise)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)
