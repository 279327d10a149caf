"""What an engine refuses before it starts, each with the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.unroll import Unroll


def check_eta(eta: Any) -> None:
    """Raise TypeError where eta has no leaves, or one without a derivative."""
    leaves = jax.tree_util.tree_leaves_with_path(eta)
    if not leaves:
        raise ValueError("`eta` has no leaves, so there is nothing to learn. Did `init` return it?")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`eta{jax.tree_util.keystr(path)}` has dtype {dtype}, and a meta-gradient "
                "exists for floating-point leaves only. Keep counters, keys and masks in the "
                "inner state or on the algorithm, and leave in `eta` what is learned."
            )


def outer_loss(unroll: Unroll, eta: Any, state: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return what `unroll.loss` returns; TypeError unless that is (loss (), metrics)."""
    result = unroll.loss(eta, state)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        return result
    raise TypeError(
        "`Unroll.loss` returns the outer loss and a dictionary of metrics, (loss, metrics), but "
        f"this one returned {type(result).__name__}. Without metrics: `return loss, {{}}`."
    )


def horizon(batches: Any) -> int:
    """Return T, the leading axis that all leaves of `batches` share."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        found = sorted(str(shape) for shape in shapes) or "no leaves at all"
        raise ValueError(
            "The leaves of `batches` must share a leading axis of T >= 1 inner steps, but their "
            f"shapes are {found}. An inner loop that reads no data takes `jnp.arange(T)`."
        )
    return int(lengths.pop())  # type: ignore[arg-type]


@contextlib.contextmanager
def going_backwards() -> Iterator[None]:
    """Raise ValueError with the way out where JAX finds a loop that it cannot go back through."""
    try:
        yield
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" not in str(error):
            raise
        raise ValueError(
            "An inner loop holds a `jax.lax.while_loop`, and JAX has no backward pass through one. "
            "The usual cause is a line search of the inner optimizer, such as that of "
            "`optax.lbfgs`. Use `Forward()`, which goes through it, an estimator such as `ES()`, "
            "or an optimizer without it: `optax.lbfgs(0.1, linesearch=None)`."
        ) from error
