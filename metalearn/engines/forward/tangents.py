"""Tangents of forward mode: how many pass through a linearized step at once, and which are zero.

k tangents pass through one linear map by `vmap`, all at once; by `lax.map`, `chunk` of them at
once, for less memory; or by `vmap` with their leading axis sharded over devices.

The tangent of an entry of eta is zero until a step first reads that entry. An algorithm whose
entries are first read at different steps (a schedule in windows) says so in `Unroll.begins`.
`parts` cuts the T steps into a few parts; in each, `Forward` pushes only the tangents that may be
non-zero by the end of that part. Every part is compiled on its own, so there are at most `PARTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.trees import precise
from metalearn.sharding.mesh import on_current_mesh
from metalearn.unroll import Eta

Sharding: TypeAlias = jax.sharding.Sharding | None

PARTS = 6  # of the inner loop at most: each is compiled on its own
CANDIDATES = 64  # places to cut the loop at that are compared, at most


def push(linear: Callable[..., Any], tangents: Any, chunk: int | None, sharding: Sharding) -> Any:
    """Apply `linear` to each of k tangents, `chunk` of them at once.

    Args:
      linear: linear in its arguments.
      tangents: a tuple with a pytree for each argument, leaves [k, ...].
      chunk: tangents pushed at once; None: all k.
      sharding: of the leading axis; None: left to the compiler.

    Returns:
      What `linear` returns, leaves [k, ...].
    """
    tangents = place(tangents, sharding)
    count = jax.tree.leaves(tangents)[0].shape[0]
    if chunk is None or not count:
        return place(jax.vmap(linear)(*tangents), sharding)
    return jax.lax.map(lambda one: linear(*one), tangents, batch_size=min(chunk, count))


def place(tangents: Any, sharding: Sharding) -> Any:
    """Shard the leading axis of every leaf over devices; the others are left to the compiler."""
    if sharding is None or shard_count(sharding) == 1:
        return tangents
    if not isinstance(sharding, NamedSharding):
        return jax.lax.with_sharding_constraint(tangents, sharding)

    def put(leaf: jax.Array) -> jax.Array:
        others = (P.UNCONSTRAINED,) * (leaf.ndim - len(sharding.spec))
        where = on_current_mesh(NamedSharding(sharding.mesh, P(*sharding.spec, *others)))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree.map(put, tangents)


def round_up(count: int, sharding: Sharding) -> int:
    """Return the next number of tangents that divides among the devices."""
    return -(-count // shard_count(sharding)) * shard_count(sharding)


def shard_count(sharding: Sharding) -> int:
    """Return the number of shards of a leading axis."""
    if sharding is None:
        return 1
    devices = sharding.num_devices
    return devices // sharding.shard_shape((devices,))[0]


def tangent_norms(pushed: list[jax.Array], tangents: list[jax.Array]) -> jax.Array:
    """Return the norm of each tangent over all leaves, zero for those not pushed.

    Args:
      pushed: leaves [k, ...], the first k tangents.
      tangents: leaves [N, ...], all of them; only N is read.

    Returns:
      [N].
    """
    if not pushed:
        return jnp.zeros(0)
    squares = []
    for leaf in pushed:
        rows = precise(leaf).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        # Faster on a CPU than a sum of squares.
        highest = jax.lax.Precision.HIGHEST
        squares.append(jnp.einsum("kn,kn->k", rows.conj(), rows, precision=highest).real)
    norms = jnp.sqrt(sum(squares[1:], squares[0]))
    return jnp.pad(norms, (0, tangents[0].shape[0] - norms.shape[0]))


class Part(NamedTuple):
    """A part of the inner loop with a fixed number of tangents.

    Args:
      start: first step.
      stop: the step after its last.
      active: tangents pushed through it: those that may be non-zero before step `stop`.
    """

    start: int
    stop: int
    active: int


def first_reads(begins: Any, eta: Eta) -> np.ndarray:
    """Return the step that first reads each scalar of eta, in the order of `ravel_pytree`: [N].

    Args:
      begins: `Unroll.begins`; None: step 0 reads all.
      eta: the meta-parameters, N scalars.

    Raises:
      ValueError: if the shapes of `begins` are not those of eta.
    """
    leaves = jax.tree.leaves(eta)
    if begins is None:
        return np.zeros(sum(map(jnp.size, leaves)), int)
    steps = jax.tree.leaves(begins)
    shapes = [[np.shape(leaf) for leaf in tree] for tree in (steps, leaves)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`Unroll.begins` has a step for every entry of eta, but its leaves have the shapes "
            f"{shapes[0]} and those of eta {shapes[1]}."
        )
    return np.concatenate([np.ravel(np.asarray(leaf, int)) for leaf in steps])


def parts(begins: np.ndarray, horizon: int, limit: int = PARTS) -> list[Part]:
    """Cut T steps into at most `limit` parts, so that the fewest tangents are pushed in all.

    Dynamic programming over the steps at which further tangents become non-zero; of many such
    steps, `CANDIDATES` are compared.

    Args:
      begins: [N], from `first_reads`.
      horizon: T.
      limit: the most parts.
    """
    cuts = np.unique(np.concatenate([[0, horizon], begins[(begins > 0) & (begins < horizon)]]))
    if len(cuts) > CANDIDATES:
        cuts = cuts[np.unique(np.linspace(0, len(cuts) - 1, CANDIDATES).astype(int))]
    active = [int((begins < stop).sum()) for stop in cuts]
    best: dict[int, tuple[int, list[Part]]] = {0: (0, [])}  # cut -> (cost, the parts before it)
    for _ in range(limit):
        better: dict[int, tuple[int, list[Part]]] = {}  # with one more part
        for start, (cost, before) in best.items():
            for stop in range(start + 1, len(cuts)):
                part = Part(int(cuts[start]), int(cuts[stop]), active[stop])
                total = cost + (part.stop - part.start) * (part.active + 1)
                known = better.get(stop) or best.get(stop)
                if known is None or total < known[0]:
                    better[stop] = total, [*before, part]
        best |= better
    return best[len(cuts) - 1][1]
