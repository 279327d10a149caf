"""Examination of one task: its meta-gradient and inner losses, and the effect of zeros on them.

A network with a dead ReLU, an embedding that no token of the batch uses or a masked output has
inner gradients with exact zeros, and a task whose support is masked has zeros only. A task drawn
now may have none, and the thousandth task some. So zeros can be inserted: one entry per leaf of
each inner gradient, or every entry, is multiplied by zero, value and derivative, as a dead unit
does. This works for any optimizer and any engine: it transforms the unroll, replacing the `grad`
that its steps receive.

Zeros can also be replaced by a small number: what is then still not finite has another cause.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.engines import Inner
from metalearn.tasks import Tasks
from metalearn.unroll import Unroll

# Which entries of inner gradients are zero: unchanged; none; one in each leaf; all.
AS_THEY_ARE, NONE, ONE_A_LEAF, ALL = range(4)
FILL = 1e-3  # replaces a zero


class Look(NamedTuple):
    """The result of examining one task. Leaves of eta are in the order of `jax.tree.leaves`.

    Args:
      loss: (), the outer loss.
      finite: [leaves], bool: whether a leaf's meta-gradient is finite everywhere.
      zero: [leaves], bool: whether a leaf's meta-gradient is zero everywhere.
      inner: inner losses and finiteness, [T, n].
    """

    loss: jax.Array
    finite: jax.Array
    zero: jax.Array
    inner: Inner


def look_at(
    solve: Callable[..., Any],
    eta: Any,
    tasks: Tasks,
    key: jax.Array,
    zeros: jax.Array | int = AS_THEY_ARE,
    steps: int | None = None,
) -> Look:
    """Examine the task that `key` draws.

    Args:
      solve: eta, tasks, key, transform of the unroll, steps -> ((loss (), aux), meta-gradient).
      eta: the meta-parameters.
      tasks: the distribution to draw from.
      key: draws the task.
      zeros: (), int: which entries of inner gradients are exactly zero: unchanged, none, one in
        each leaf and no other, or all.
      steps: the number of inner steps to run; None: all.
    """
    transform = functools.partial(_zeroed, zeros=jnp.asarray(zeros))
    (loss, aux), grads = solve(eta, tasks, key, transform, steps)
    leaves = jax.tree.leaves(grads)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    zero = jnp.stack([(leaf == 0).all() for leaf in leaves])
    return Look(loss, finite, zero, aux.inner)


def _zeroed(unroll: Unroll, zeros: jax.Array) -> Unroll:
    """Return an unroll whose inner gradients have the zeros that `zeros` () selects."""

    def with_zeros(move: Callable[..., Any]) -> Callable[..., Any]:
        return lambda eta, state, batch, grad: move(eta, state, batch, _with_zeros(grad, zeros))

    undo = with_zeros(unroll.undo) if unroll.undo else None
    return unroll._replace(step=with_zeros(unroll.step), undo=undo)


def _with_zeros(grad: Callable[..., Any], zeros: jax.Array) -> Callable[..., Any]:
    """Return a replacement of an engine's `grad`, with zeros in the gradients it returns."""

    def with_zeros(leaf: jax.Array) -> jax.Array:
        if not leaf.size:
            return leaf
        filled = jnp.where((zeros == NONE) | (zeros == ONE_A_LEAF), FILL, 0).astype(leaf.dtype)
        leaf = leaf + jnp.where(leaf == 0, filled, jnp.zeros_like(leaf))
        # A product turns an infinite cotangent into NaN, as a dead unit does.
        factor = jnp.where(zeros == ALL, 0, 1).astype(leaf.dtype)
        first = jnp.where((zeros == ALL) | (zeros == ONE_A_LEAF), 0, 1).astype(leaf.dtype)
        return leaf * jnp.full_like(leaf, factor).at[(0,) * leaf.ndim].set(first)

    def grad_with_zeros(fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        differentiate = grad(fun, argnums=argnums, has_aux=has_aux)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            result = differentiate(*args, **kwargs)
            grads, *aux = result if has_aux else (result,)
            grads = jax.tree.map(with_zeros, grads)
            return (grads, *aux) if has_aux else grads

        return grad_fun

    return grad_with_zeros
