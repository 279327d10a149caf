"""Copies of sharded arrays in host memory: of which shards an array consists in this process.

A sharded array keeps its sharding. Each process copies the shards of its own devices, one of those
that are copies of each other, and puts them back on the same devices: no process has the whole of
an array that is sharded over several.

Sizes are those of arrays, or of their shapes (`jax.ShapeDtypeStruct`) with shardings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shards:
    """Of which shards an array consists in this process."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding | None  # None: on the default device, committed to none
    shards: list[Any]  # the shape and dtype of each different one
    devices: list[list[Any]]  # those that have each of them
    key_impl: Any  # of a leaf of PRNG keys, which are saved as their data; else None

    @classmethod
    def of(cls, leaf: Any) -> Shards:
        """Return the shards of an array, or of its shape with a sharding."""
        where = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.Array) and not _data(leaf).committed:
            where = None
        data, impl = leaf, None
        if _is_key(leaf):
            impls: list[Any] = []
            jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), leaf)
            data, impl = jax.eval_shape(jax.random.key_data, leaf), impls[0]
        shape, copies = data.shape, {"": [None]}
        if where is not None:
            shape, copies = where.shard_shape(data.shape), {}
            for device, index in where.addressable_devices_indices_map(data.shape).items():
                copies.setdefault(str(index), []).append(device)
        shards = [jax.ShapeDtypeStruct(shape, data.dtype)] * len(copies)
        return cls(data.shape, where, shards, [*copies.values()], impl)

    @property
    def nbytes(self) -> int:
        """Bytes of the different shards."""
        return self.shard_bytes * len(self.shards)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard: what the array takes on each device."""
        return math.prod(self.shards[0].shape) * self.shards[0].dtype.itemsize

    def to_host(self, value: jax.Array) -> list[np.ndarray]:
        """Return copies of the different shards of an array."""
        shards = {shard.device: shard.data for shard in _data(value).addressable_shards}
        if self.sharding is None:
            return [np.asarray(shard) for shard in shards.values()]
        return [np.asarray(shards[same[0]]) for same in self.devices]

    def to_devices(self, arrays: Sequence[np.ndarray]) -> jax.Array:
        """Return the array with these shards, on the devices that had them."""
        if self.sharding is None:
            data = jax.device_put(arrays[0])
        else:
            pairs = zip(arrays, self.devices, strict=True)
            single = [jax.device_put(array, device) for array, same in pairs for device in same]
            data = jax.make_array_from_single_device_arrays(self.shape, self.sharding, single)
        return data if self.key_impl is None else jax.random.wrap_key_data(data, impl=self.key_impl)


def shards_of(tree: Any) -> list[Shards]:
    """Return the shards of each leaf of a tree of arrays, or of their shapes."""
    return [Shards.of(leaf) for leaf in jax.tree.leaves(tree)]


def process_bytes(tree: Any) -> int:
    """Return the bytes of a tree in this process, copies of shards not counted."""
    return sum(shards.nbytes for shards in shards_of(tree))


def device_bytes(tree: Any) -> int:
    """Return the bytes of a tree on each device."""
    return sum(shards.shard_bytes for shards in shards_of(tree))


def bytes_on_devices(tree: Any) -> int:
    """Return the bytes of a tree on all devices of this process, with all copies of shards."""
    return sum(each.shard_bytes * sum(map(len, each.devices)) for each in shards_of(tree))


def begin_copies(tree: Any) -> None:
    """Begin to copy the arrays of a tree to the host, which `to_host` waits for."""
    for leaf in jax.tree.leaves(tree):
        _data(leaf).copy_to_host_async()


def to_host(shards: Sequence[Shards], tree: Any) -> list[np.ndarray]:
    """Return the different shards of all arrays of a tree, in host memory.

    Args:
      shards: see `shards_of`.
      tree: the arrays.
    """
    pairs = zip(shards, jax.tree.leaves(tree), strict=True)
    return [array for each, value in pairs for array in each.to_host(value)]


def to_devices(shards: Sequence[Shards], arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Return the arrays whose shards are those of `to_host`, on the devices that had them."""
    rest = iter(arrays)
    return [each.to_devices([next(rest) for _ in each.shards]) for each in shards]


@jax.jit
def copied(tree: Any) -> Any:
    """Return copies of the arrays of a tree on their devices: those of the tree may be donated."""

    def copy(leaf: jax.Array) -> jax.Array:
        if not _is_key(leaf):
            return jnp.copy(leaf)
        data = jnp.copy(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(copy, tree)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
