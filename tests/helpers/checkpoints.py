"""States to save, checkpoints of them, and what is read back."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn.checkpoints.manager import Checkpoints
from metalearn.train_state import TrainState


class Eta(NamedTuple):
    params: Any
    rates: Any


def a_state(seed=0, step=3) -> TrainState:
    """A state with a leaf of every kind there is, after one update so that none is zero."""
    key = jax.random.key(seed)
    w, b, low = jax.random.normal(key, (3, 2))
    params = {"w": w.at[0].set(-0.0), "b": [b, None], "low": low.astype(jnp.bfloat16)}
    eta = Eta(params, (jnp.float32(1e-40), jnp.arange(2, dtype=jnp.float16)))
    schedule = optax.cosine_decay_schedule(1e-3, 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    _, state = optimizer.update(eta, optimizer.init(eta), eta)
    return TrainState(jnp.asarray(step, jnp.int32), eta, state, jax.random.fold_in(key, 7))


def bits(tree):
    """The leaves of a pytree, as (path, type, bytes)."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p), leaf.shape, str(leaf.dtype), raw(leaf)) for p, leaf in leaves]


def largest_file(directory):
    """The file with most of the arrays in it."""
    files = [p for p in (directory / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(directory):
    path = largest_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def state_at(step, optimizer=None, inner=()):
    optimizer = optimizer or optax.adam(0.1)
    eta = {"w": jnp.arange(3.0) + step, "b": jnp.zeros(())}
    state = TrainState(jnp.asarray(step, jnp.int32), eta, optimizer.init(eta), jax.random.key(0))
    return dataclasses.replace(state, inner=inner)


def saved(directory, steps=(1, 2, 3), optimizer=None, inner=(), **options):
    """Save a checkpoint at each step; return the directory."""
    with contextlib.closing(Checkpoints(directory, keep=len(steps), **options)) as checkpoints:
        for step in steps:
            metrics = {"eval/loss": 1 / step}
            checkpoints.save(state_at(step, optimizer, inner), step, {}, metrics)
    return directory


def restored(directory, state=None, **options):
    """The outer step that is gone on from."""
    with contextlib.closing(Checkpoints(directory, **options)) as checkpoints:
        return int(checkpoints.restore(state or state_at(0))[0].step)
