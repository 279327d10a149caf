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

from metalearn.engines.pushforward import pushforward
from metalearn.leaves import is_array, is_differentiable, split

INNER_GRADIENT = "metalearn_inner_gradient"

Leaves = Sequence[Any]
Loss = Callable[[Leaves, Leaves, Leaves], tuple[jax.Array, Any]]  # theta, others, rest


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    given: Any = None,
) -> Callable[..., Any]:
    """Stand in for `jax.value_and_grad`; the derivative of its gradient runs forward.

    With `given`, its result is known from before and only its derivative is computed.
    """

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        thetas = [args[i] for i in chosen]
        theta, treedef = jax.tree.flatten(thetas)
        theta = [real(leaf) for leaf in theta]

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
        loss, consts, _ = hoist(loss_fn, theta, dynamic)
        others, rest, join_inputs = split([list(dynamic), consts])

        def hoisted(theta: Leaves, others: Leaves, rest: Leaves) -> Any:
            return loss(theta, *join_inputs(others, rest))

        known = None if given is None else primal(given, has_aux)
        (value, aux), grads = _commuted(hoisted)(theta, others, rest, known)
        grads = jax.tree.unflatten(treedef, named(grads))
        grads = grads[0] if isinstance(argnums, int) else tuple(grads)
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fun


def named(grads: Leaves) -> list[jax.Array]:
    """Name inner gradients, so that a checkpoint's policy can keep them."""
    return [checkpoint_name(g, INNER_GRADIENT) for g in grads]


def real(leaf: Any) -> jax.Array:
    """Return a leaf of theta as an array; TypeError unless it is real and floating."""
    array = jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`MixedFlow` takes inner gradients with respect to real floating-point arrays, but "
            f"got {array.dtype}{list(array.shape)}. Keep integer and complex leaves out of what "
            "`grad` differentiates, or use `Reverse()`."
        )
    return array


def hoist(
    function: Callable[[Leaves, Leaves], Any], theta: Leaves, dynamic: Leaves
) -> tuple[Callable[[Leaves, Leaves, Leaves], Any], list[Any], Any]:
    """Make all that a loss closes over an argument.

    Returns (loss(theta, dynamic, consts), consts, the shapes of what the loss returns).
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(theta, dynamic)
    treedef = jax.tree.structure(shapes)

    def loss(theta: Leaves, dynamic: Leaves, consts: Leaves) -> Any:
        flat = jax.core.eval_jaxpr(closed.jaxpr, consts, *theta, *dynamic)
        return jax.tree.unflatten(treedef, flat)

    return loss, list(closed.consts), shapes


def primal(given: Any, has_aux: bool) -> Any:
    """Return a known result of `value_and_grad` as the rules have it: ((value, aux), leaves)."""
    value, grads = given
    return value if has_aux else (value, ()), jax.tree.leaves(grads)


def _commuted(loss: Loss) -> Callable[[Leaves, Leaves, Leaves, Any], Any]:
    """Return (theta, others, rest, known) -> ((value, aux), grads), with the commuted rule."""

    def forward(theta: Leaves, others: Leaves, rest: Leaves, known: Any) -> Any:
        if known is not None:
            return known
        return jax.value_and_grad(loss, has_aux=True)(theta, others, rest)

    def backward(residuals: Any, cotangents: Any) -> Any:
        theta, others, rest = residuals
        return *pullback(loss, theta, others, rest, cotangents), None, None

    rule = jax.custom_vjp(forward)
    rule.defvjp(lambda *inputs: (forward(*inputs), inputs[:3]), backward)
    return rule


def pullback(
    loss: Loss, theta: Leaves, others: Leaves, rest: Leaves, cotangents: Any
) -> tuple[Leaves, Leaves]:
    """Pull ((value, aux), grads) cotangents back to (theta, others): one jvp of a gradient."""
    (value_bar, aux_bar), u = cotangents

    def phi(theta: Leaves, others: Leaves, s: jax.Array) -> jax.Array:
        value, aux = loss(theta, others, rest)
        return (1 + s * value_bar) * value + s * _inner_product(aux_bar, aux)

    def gradient(theta: Leaves, s: jax.Array) -> Any:
        return jax.grad(phi, (0, 1))(theta, others, s)

    s = jnp.zeros((), value_bar.dtype)
    return pushforward(gradient, (theta, s), (u, jnp.ones_like(s)))


def _inner_product(cotangents: Any, values: Any) -> jax.Array | float:
    """Return the real inner product over the leaves that carry derivatives."""
    pairs = zip(jax.tree.leaves(cotangents), jax.tree.leaves(values), strict=True)
    return sum((jnp.real(jnp.sum(c * v)) for c, v in pairs if is_differentiable(v)), start=0.0)
