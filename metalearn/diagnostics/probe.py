"""A look at one task: its meta-gradient, what its inner loop saw, and what zeros would do.

A network with a dead ReLU, an embedding that no token of the batch uses or a masked output
has inner gradients with exact zeros, and a task whose support is masked has nothing else. A
task drawn now may have none, and the thousandth one some. So a look can put them there: one
entry per leaf of each inner gradient, or every entry, is multiplied by zero, value and
derivative alike, which is what the dead unit does. No optimizer needs to be known for that,
and no engine: it wraps the algorithm and the `grad` its steps receive.

It can take them away too, by a small number in place of each zero: what is not finite then has
another reason than zeros.
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

# What a look does to the zeros in inner gradients.
AS_THEY_ARE, NONE, ONE_A_LEAF, ALL = range(4)
FILL = 1e-3  # what stands in for a zero that is taken away


class Look(NamedTuple):
    """What is seen of one task. The leaves of eta are in the order of `jax.tree.leaves`."""

    loss: jax.Array  # (): the outer loss
    finite: jax.Array  # [leaves], bool: whether a leaf's meta-gradient is finite everywhere
    zero: jax.Array  # [leaves], bool: whether it is zero everywhere
    inner: Inner  # inner losses and finiteness, [T, n]


def look_at(
    solve: Callable[..., Any],
    eta: Any,
    tasks: Tasks,
    key: jax.Array,
    zeros: jax.Array | int = AS_THEY_ARE,
    steps: int | None = None,
) -> Look:
    """Look at the task that `key` draws.

    Args:
      solve: eta, tasks, key, transform of the unroll, steps -> ((loss (), aux), meta-gradient).
      eta: where to look.
      tasks: where the task comes from.
      key: draws the task.
      zeros: (), int: which entries of inner gradients are exactly zero: as they are, none, one
        in each leaf and no other, or all.
      steps: look at no more inner steps than the first so many; None: at all.
    """
    transform = functools.partial(_zeroed, zeros=jnp.asarray(zeros))
    (loss, aux), grads = solve(eta, tasks, key, transform, steps)
    leaves = jax.tree.leaves(grads)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    zero = jnp.stack([(leaf == 0).all() for leaf in leaves])
    return Look(loss, finite, zero, aux.inner)


def _zeroed(unroll: Unroll, zeros: jax.Array) -> Unroll:
    """Return an unroll whose inner gradients get a zero in each leaf where `zeros` () says so."""

    def with_zeros(move: Callable[..., Any]) -> Callable[..., Any]:
        return lambda eta, state, batch, grad: move(eta, state, batch, _with_zeros(grad, zeros))

    undo = with_zeros(unroll.undo) if unroll.undo else None
    return unroll._replace(step=with_zeros(unroll.step), undo=undo)


def _with_zeros(grad: Callable[..., Any], zeros: jax.Array) -> Callable[..., Any]:
    """Stand in for the `grad` of an engine, with the zeros of a look in what it returns."""

    def with_zeros(leaf: jax.Array) -> jax.Array:
        if not leaf.size:
            return leaf
        filled = jnp.where((zeros == NONE) | (zeros == ONE_A_LEAF), FILL, 0).astype(leaf.dtype)
        leaf = leaf + jnp.where(leaf == 0, filled, jnp.zeros_like(leaf))
        # A product, since it passes an infinite cotangent on as NaN, as a dead unit does.
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
