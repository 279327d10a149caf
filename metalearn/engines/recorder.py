"""The `grad` that a step receives: it differentiates, and notes what it saw.

An inner loop that diverges, or one whose gradients are not finite, shows here and
nowhere else: the outer loss may look healthy for a while. Each engine brings its own
way of taking an inner value and gradient; recording is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state


class Inner(NamedTuple):
    """What the inner loop saw; stacked over steps by the engines.

    Inner gradients taken inside a transformation of the step's own (its own `vmap`,
    `scan` or `jit`) are differentiated as any other but not recorded.
    """

    losses: jax.Array  # [T, n]: the n inner losses of a step, in the order taken
    finite: jax.Array  # [T, n], bool: whether that loss's gradient has a finite squared norm
    # [T, 1]: the norm of the step's change of what `grad` differentiated; [T, 0] where that is
    # no part of the inner state as it stands.
    update_norm: jax.Array
    # [T, k]: the norm of each tangent after a step, of those that `Forward` pushes, in the
    # order in which they come into play; [T, 0] for engines that push none.
    tangent_norm: jax.Array


class Recorder:
    """Hands out `grad` for one inner step and keeps the losses that pass through it."""

    def __init__(self, value_and_grad: Callable[..., Callable[..., Any]]):
        self._value_and_grad = value_and_grad
        self._trace = get_opaque_trace_state(convention="metalearn")
        self._losses: list[jax.Array] = []
        self._finite: list[jax.Array] = []
        self._theta: set[int] = set()  # of the leaves that were differentiated: their id()

    def grad(
        self, fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        """Stand in for `jax.grad`: same arguments, same results."""
        differentiate = self._value_and_grad(fun, argnums=argnums, has_aux=has_aux)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            value, grads = differentiate(*args, **kwargs)
            chosen = (argnums,) if isinstance(argnums, int) else argnums
            self._theta |= {id(leaf) for i in chosen for leaf in jax.tree.leaves(args[i])}
            self._record(value[0] if has_aux else value, grads)
            return (grads, value[1]) if has_aux else grads

        return grad_fun

    def _record(self, loss: jax.Array, grads: Any) -> None:
        if get_opaque_trace_state(convention="metalearn") != self._trace:
            return  # these tracers must not leave the transformation they live in
        self._losses.append(loss)
        self._finite.append(jnp.isfinite(sum(map(_squared_norm, jax.tree.leaves(grads)))))

    def inner(self, before: Any, after: Any) -> Inner:
        """Return what was recorded for one step from state to state: leaves [n]."""
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=False)
        moved = [(old, new) for old, new in pairs if id(old) in self._theta]
        squares = [_squared_norm(new - old) for old, new in moved]
        norms = [jnp.sqrt(sum(squares[1:], squares[0]))] if squares else []
        inner = Inner(
            _stacked(self._losses, float),
            _stacked(self._finite, bool),
            _stacked(norms, float),
            _stacked([], float),  # tangents are the engine's own
        )
        return jax.lax.stop_gradient(inner)


def joined(seen: Sequence[Inner]) -> Inner:
    """Return what the parts of one loop saw, one after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)


def _stacked(values: list[jax.Array], dtype: Any) -> jax.Array:
    return jnp.stack(values) if values else jnp.zeros((0,), dtype)


def _squared_norm(leaf: jax.Array) -> jax.Array:
    """Return |leaf|^2 (): a dot product, far faster on a CPU than `isfinite(leaf).all()`.

    Real, of complex leaves too.
    """
    precise = jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.vdot(leaf, leaf, preferred_element_type=precise).real
