"""Inner gradients and Hessian products in micro-batches, for a loss that is a mean over examples.

    g = 1/k sum_j grad L_j          u^T H = 1/k sum_j u^T H_j

over k parts of the batch, one after the other: the same sums in another order, so the result
equals that of the full batch up to rounding, and only the activations of one part are alive. Each
part is differentiated as its share of the mean, L_j / k: custom rules that depend on the size of a
cotangent then get the cotangents of the full batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.dtypes
import jax.numpy as jnp

from metalearn._utils.trees import is_array, split
from metalearn.engines.mixed_flow.forward_over_reverse import (
    Gradient,
    Leaves,
    inexact,
    inner_gradient,
    is_zero,
    named,
    primal,
    with_backward,
)
from metalearn.unroll import ExampleMean


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    result: Any = None,
    *,
    parts: int,
    true_rules: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Stand in for `jax.value_and_grad` of an `ExampleMean` with respect to theta."""
    if not isinstance(fun, ExampleMean) or argnums != 0:
        raise ValueError(
            f"`MixedFlow(micro_batches={parts})` takes an inner loss in parts, which is exact for "
            f"a mean over examples and wrong for any other, but `grad` was given {_name(fun)} "
            f"with argnums={argnums}. Write the loss as a `metalearn.ExampleMean` and "
            "differentiate it in its first argument, or use `micro_batches=1`."
        )

    def value_and_grad_fun(theta: Any, examples: Any, *shared: Any) -> Any:
        leaves, treedef = jax.tree.flatten(theta)
        leaves = [inexact(leaf) for leaf in leaves]
        rows, rows_treedef = jax.tree.flatten(examples)
        rows = [_cut(row, parts) for row in rows]
        dynamic, static, join = split(shared, is_array)

        def share(leaves: Leaves, inputs: Leaves) -> Any:
            theta = jax.tree.unflatten(treedef, leaves)
            part = jax.tree.unflatten(rows_treedef, inputs[: len(rows)])
            output = fun(theta, part, *join(inputs[len(rows) :], static))
            value, aux = output if has_aux else (output, ())
            return value / parts, aux

        inputs = [*(row[0] for row in rows), *dynamic]
        gradient, consts, shapes = inner_gradient(share, leaves, inputs, true_rules)
        cut, cut_rest, _ = split(rows)
        common, common_rest, _ = split([*dynamic, *consts])
        rule = _in_parts(gradient, parts, shapes[0].dtype)
        known = None if result is None else primal(result, has_aux)
        (value, aux), grads = rule(leaves, (cut, common), (cut_rest, common_rest), known)
        grads = jax.tree.unflatten(treedef, named(grads))
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fun


def _name(fun: Any) -> str:
    return getattr(fun, "__qualname__", type(fun).__name__)


def _cut(row: Any, parts: int) -> jax.Array:
    """Return an array [batch, ...] as [parts, batch / parts, ...]."""
    row = jnp.asarray(row)
    if not row.ndim or row.shape[0] % parts:
        raise ValueError(
            f"micro_batches={parts} does not divide an inner batch whose examples are an array of "
            f"shape {list(row.shape)}: its first axis counts them."
        )
    return row.reshape(parts, -1, *row.shape[1:])


def _whole(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, *rows.shape[2:])


def _in_parts(gradient: Gradient, parts: int, dtype: Any) -> Callable[..., Any]:
    """Return (theta, others, rest, known) -> ((value, aux), grads), computed part by part.

    `others` and `rest` are (cut, common): arrays [parts, ...] with a slice for each part, and
    arrays that all parts read.

    Args:
      gradient: of a part's share of the loss.
      parts: how many.
      dtype: of the loss.
    """

    def forward(theta: Leaves, others: Any, rest: Any, known: Any) -> Any:
        if known is not None:
            return known

        def add(total: Any, part: Any) -> tuple[Any, Any]:
            inputs = [*part[0], *others[1]], [*part[1], *rest[1]]
            (value, aux), grads = gradient.forward(theta, *inputs)
            return _plus(total, (value, grads)), aux

        zero = jnp.zeros((), dtype), list(map(jnp.zeros_like, theta))
        (value, grads), aux = jax.lax.scan(add, zero, (others[0], rest[0]))
        return (value, jax.tree.map(_whole, aux)), grads

    def backward(residuals: Any, cotangents: Any) -> Any:
        theta, others, rest = residuals
        (value_bar, aux_bar), u = cotangents
        leaves, treedef = jax.tree.flatten(aux_bar)
        unread, rows, join = split(leaves, is_zero)
        rows = [_cut_cotangent(leaf, parts) for leaf in rows]

        def add(total: Any, part: Any) -> tuple[Any, Any]:
            cut, cut_rest, bars = part
            inputs = [*cut, *others[1]], [*cut_rest, *rest[1]]
            aux_bar = jax.tree.unflatten(treedef, join(unread, bars))
            theta_bar, bars = gradient.back(theta, *inputs, ((value_bar, aux_bar), u))
            cut_bar, common_bar = list(bars[: len(cut)]), list(bars[len(cut) :])
            return _plus(total, (list(theta_bar), common_bar)), cut_bar

        zero = jax.tree.map(jnp.zeros_like, (list(theta), others[1]))
        (theta_bar, common_bar), cut_bar = jax.lax.scan(add, zero, (others[0], rest[0], rows))
        return theta_bar, (cut_bar, common_bar), None, None

    return with_backward(forward, backward)


def _plus(total: Any, terms: Any) -> Any:
    return jax.tree.map(jnp.add, total, terms)


def _cut_cotangent(leaf: Any, parts: int) -> jax.Array:
    """Cut a cotangent like its value; a placeholder if the value carries no derivative."""
    return jnp.zeros(parts) if leaf.dtype == jax.dtypes.float0 else _cut(leaf, parts)
