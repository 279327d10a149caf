"""Many tangents through one linear map: at once, a few at a time, or spread over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.sharding.mesh import here

Sharding = jax.sharding.Sharding | None


def pushed(linear: Callable[..., Any], tangents: Any, chunk: int | None, sharding: Sharding) -> Any:
    """Apply `linear` to each of k tuples, a tuple of pytrees with leaves [k, ...]."""
    tangents = placed(tangents, sharding)
    if chunk is None:
        return placed(jax.vmap(linear)(*tangents), sharding)
    count = jax.tree.leaves(tangents)[0].shape[0]
    return jax.lax.map(lambda one: linear(*one), tangents, batch_size=min(chunk, count))


def placed(tangents: Any, sharding: Sharding) -> Any:
    """Spread the leading axis of every leaf over devices."""
    if sharding is None or shards(sharding) == 1:
        return tangents
    where = here(sharding) if isinstance(sharding, jax.sharding.NamedSharding) else sharding
    return jax.lax.with_sharding_constraint(tangents, where)


def padded(count: int, sharding: Sharding) -> int:
    """Return the next number of tangents that divides among the devices."""
    return -(-count // shards(sharding)) * shards(sharding)


def shards(sharding: Sharding) -> int:
    """Return the number of parts that a leading axis is cut into."""
    if sharding is None:
        return 1
    devices = sharding.num_devices
    return devices // sharding.shard_shape((devices,))[0]


def norms(tangents: list[jax.Array], all_of_them: list[jax.Array]) -> jax.Array:
    """Return the norm of each tangent over all leaves [N], zero for those not pushed."""
    if not tangents:
        return jnp.zeros(0)
    squares = [_squared(_precise(t).reshape(t.shape[0], -1)) for t in tangents]
    found = jnp.sqrt(sum(squares[1:], squares[0]))
    return jnp.pad(found, (0, all_of_them[0].shape[0] - found.shape[0]))


def _squared(rows: jax.Array) -> jax.Array:
    """Return |row|^2 of rows [k, n]: [k], real. A product: on a CPU, faster than squares."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("kn,kn->k", rows.conj(), rows, precision=highest).real


def _precise(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
