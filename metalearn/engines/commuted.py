"""An inner `value_and_grad` whose own derivative is taken forward-over-reverse.

The rule has to be right in more places than g. The loss value and aux (batch
statistics, logits, metrics) carry cotangents of their own, l and a. They come out of the
same pass: differentiate

    Phi(theta, s) = (1 + s l) L(theta) + s <a, aux(theta)>

along (u, 1) in (theta, s): d Phi' = u^T H + l L' + a^T aux'.

And the inner loss may close over anything, eta among it. JAX would drop or refuse a
derivative through a closure of a custom rule, so the loss is traced once and what it
closes over becomes an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from metalearn.leaves import is_array, is_differentiable, split

INNER_GRADIENT = "metalearn_inner_gradient"

Leaves = Sequence[Any]
Loss = Callable[[Leaves, Leaves, Leaves], tuple[jax.Array, Any]]  # theta, others, rest


def value_and_grad(
    fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Stand in for `jax.value_and_grad`; the derivative of its gradient runs forward."""

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        thetas = [args[i] for i in chosen]
        theta, treedef = jax.tree.flatten(thetas)
        theta = [_real(leaf) for leaf in theta]

        def loss_fn(theta: Leaves, dynamic: Leaves) -> Any:
            positional, named = join(dynamic, static)
            positional = list(positional)
            for i, value in zip(chosen, jax.tree.unflatten(treedef, theta), strict=True):
                positional[i] = value
            result = fun(*positional, **named)
            return result if has_aux else (result, ())

        held = list(args)
        for i in chosen:
            held[i] = None  # theta travels apart from the other arguments
        dynamic, static, join = split((held, kwargs), is_array)
        loss, others, rest = _hoist(loss_fn, theta, dynamic)
        (value, aux), grads = _commuted(loss)(theta, others, rest)
        grads = jax.tree.unflatten(treedef, [checkpoint_name(g, INNER_GRADIENT) for g in grads])
        grads = grads[0] if isinstance(argnums, int) else tuple(grads)
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fun


def _real(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`MixedFlow` takes inner gradients with respect to real floating-point arrays, but "
            f"got {array.dtype}{list(array.shape)}. Keep integer and complex leaves out of what "
            "`grad` differentiates, or use `Reverse()`."
        )
    return array


def _hoist(
    function: Callable[[Leaves, Leaves], Any], theta: Leaves, dynamic: Leaves
) -> tuple[Loss, list[Any], list[Any]]:
    """Make all that a loss reads an argument: (loss, other float leaves, other leaves)."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(theta, dynamic)
    treedef = jax.tree.structure(shapes)
    others, rest, join = split([list(dynamic), list(closed.consts)])

    def loss(theta: Leaves, others: Leaves, rest: Leaves) -> tuple[jax.Array, Any]:
        dynamic, consts = join(others, rest)
        flat = jax.core.eval_jaxpr(closed.jaxpr, consts, *theta, *dynamic)
        return jax.tree.unflatten(treedef, flat)

    return loss, others, rest


def _commuted(loss: Loss) -> Callable[[Leaves, Leaves, Leaves], Any]:
    """Return (theta, others, rest) -> ((value, aux), grads), with the commuted rule."""

    def forward(theta: Leaves, others: Leaves, rest: Leaves) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(theta, others, rest)

    def backward(residuals: Any, cotangents: Any) -> Any:
        theta, others, rest = residuals
        (value_bar, aux_bar), u = cotangents

        def phi(theta: Leaves, others: Leaves, s: jax.Array) -> jax.Array:
            value, aux = loss(theta, others, rest)
            return (1 + s * value_bar) * value + s * _inner_product(aux_bar, aux)

        def gradient(theta: Leaves, s: jax.Array) -> Any:
            return jax.grad(phi, (0, 1))(theta, others, s)

        s = jnp.zeros((), value_bar.dtype)
        _, (theta_bar, others_bar) = jax.jvp(gradient, (theta, s), (u, jnp.ones_like(s)))
        return theta_bar, others_bar, None

    rule = jax.custom_vjp(forward)
    rule.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    return rule


def _inner_product(cotangents: Any, values: Any) -> jax.Array | float:
    """Return the real inner product over the leaves that carry derivatives."""
    pairs = zip(jax.tree.leaves(cotangents), jax.tree.leaves(values), strict=True)
    return sum((jnp.real(jnp.sum(c * v)) for c, v in pairs if is_differentiable(v)), start=0.0)
