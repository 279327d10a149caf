"""Many tangents through one linear map: at once, a few at a time, or spread over devices.

Which directions of eta matter when: a tangent is zero until its entry of eta is first read.

An algorithm whose entries of eta come into play one after the other (a schedule in windows)
says so in `Unroll.begins`. `Forward` then pushes, in each part of the loop, the tangents that
may differ from zero by then. Each part is compiled on its own, so there are only a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.sharding.mesh import on_current_mesh

Sharding = jax.sharding.Sharding | None


def push(linear: Callable[..., Any], tangents: Any, chunk: int | None, sharding: Sharding) -> Any:
    """Apply `linear` to each of k tuples, a tuple of pytrees with leaves [k, ...]."""
    tangents = place(tangents, sharding)
    if chunk is None:
        return place(jax.vmap(linear)(*tangents), sharding)
    count = jax.tree.leaves(tangents)[0].shape[0]
    return jax.lax.map(lambda one: linear(*one), tangents, batch_size=min(chunk, count))


def place(tangents: Any, sharding: Sharding) -> Any:
    """Spread the leading axis of every leaf over devices."""
    if sharding is None or shard_count(sharding) == 1:
        return tangents
    where = (
        on_current_mesh(sharding) if isinstance(sharding, jax.sharding.NamedSharding) else sharding
    )
    return jax.lax.with_sharding_constraint(tangents, where)


def round_up(count: int, sharding: Sharding) -> int:
    """Return the next number of tangents that divides among the devices."""
    return -(-count // shard_count(sharding)) * shard_count(sharding)


def shard_count(sharding: Sharding) -> int:
    """Return the number of parts that a leading axis is cut into."""
    if sharding is None:
        return 1
    devices = sharding.num_devices
    return devices // sharding.shard_shape((devices,))[0]


def tangent_norms(tangents: list[jax.Array], all_of_them: list[jax.Array]) -> jax.Array:
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


PARTS = 6  # of the loop at most: each takes its own compilation
CANDIDATES = 64  # places to cut at that are looked at


class Part(NamedTuple):
    """Steps start to stop, through which `active` tangents are pushed."""

    start: int
    stop: int
    active: int


def first_reads(begins: Any, eta: Any) -> np.ndarray:
    """Return the step that first reads each scalar of eta, in the order of `ravel_pytree`."""
    leaves = jax.tree.leaves(eta)
    if begins is None:
        return np.zeros(sum(leaf.size for leaf in leaves), int)
    given = jax.tree.leaves(begins)
    shapes = [[np.shape(leaf) for leaf in tree] for tree in (given, leaves)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`Unroll.begins` has a step for every entry of eta, but its leaves have the shapes "
            f"{shapes[0]} and those of eta {shapes[1]}."
        )
    return np.concatenate([np.ravel(np.asarray(leaf, int)) for leaf in given])


def parts(begins: np.ndarray, horizon: int, limit: int = PARTS) -> list[Part]:
    """Cut T steps into at most `limit` parts, so that the fewest tangents are pushed."""
    cuts = np.unique(np.concatenate([[0, horizon], begins[(begins > 0) & (begins < horizon)]]))
    if len(cuts) > CANDIDATES:
        cuts = cuts[np.unique(np.linspace(0, len(cuts) - 1, CANDIDATES).astype(int))]
    active = [int((begins < stop).sum()) for stop in cuts]
    best: dict[int, tuple[int, list[Part]]] = {0: (0, [])}  # candidate -> cost, parts up to it
    for _ in range(limit):
        best |= _one_more(best, cuts, active)
    return best[len(cuts) - 1][1]


def _one_more(best: Any, cuts: np.ndarray, active: list[int]) -> dict[int, tuple[int, list[Part]]]:
    """Return the best ways of getting to each candidate with one more part, where better."""
    found: dict[int, tuple[int, list[Part]]] = {}
    for begin, (cost, before) in best.items():
        for end in range(begin + 1, len(cuts)):
            part = Part(int(cuts[begin]), int(cuts[end]), active[end])
            total = cost + (part.stop - part.start) * (part.active + 1)
            known = found.get(end) or best.get(end)
            if known is None or total < known[0]:
                found[end] = total, [*before, part]
    return found
