"""A `jvp`, and a `vjp`, that say what is wrong where a model has no such derivative.

Fused kernels come with a backward pass of their own and often without a derivative of it.
Some of those fail inside JAX when they are pushed forward, and a rule within a rule fails
only when the whole program is lowered, far from here: both are found and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.dtypes
import numpy as np
from jax.extend import core

from metalearn._utils.trees import is_differentiable


def pushforward(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Return the tangent of `function` at `primals` along `tangents`.

    Raises:
      TypeError: where an operation in it has no forward-mode derivative.
    """

    def tangent(primals: Any, tangents: Any) -> Any:
        return jax.jvp(function, primals, tangents)[1]

    try:
        closed, shapes = jax.make_jaxpr(tangent, return_shape=True)(primals, tangents)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            "`MixedFlow` pushes the inner gradient forward (a JVP), and an operation of the inner "
            f"loss cannot be: {_first_line(error)} Fused kernels and callbacks are the usual "
            "cause. Replace it by one written in JAX, such as `metalearn.models.causal_attention` "
            "for attention."
        ) from error
    if "custom_lin" in _primitives(closed.jaxpr):  # what is left of a rule without a JVP
        raise TypeError(
            "`MixedFlow` pushes the inner gradient forward (a JVP), but the inner loss has a "
            "`jax.custom_vjp` inside the rule of another, which has no JVP. Write the inner one as "
            "a `jax.custom_jvp` or in plain JAX, or use `Reverse()`, which takes it."
        )
    flat = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves((primals, tangents)))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


def differentiated(
    function: Callable[..., Any], primals: tuple[Any, ...], cotangents: Any, names: str
) -> tuple[Any, ...]:
    """Pull cotangents of a function's result, an inner gradient, back to `primals`.

    Raises:
      TypeError: where an operation in it has no derivative. `names` says which bring rules.
    """
    try:
        result, pull = jax.vjp(function, *primals)
        leaves, treedef = jax.tree.flatten(result)
        pairs = zip(leaves, jax.tree.leaves(cotangents), strict=True)
        return pull(jax.tree.unflatten(treedef, [_cotangent(*pair) for pair in pairs]))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            "`MixedFlow` differentiates this inner gradient as it stands, by reverse over reverse, "
            f"since functions of the inner loss bring rules that do not count as derivatives "
            f"({names}), but an operation cannot be: {_first_line(error)} No engine can "
            "differentiate it. Replace it by one written in JAX, such as "
            "`metalearn.models.causal_attention` for attention."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _cotangent(value: Any, cotangent: Any) -> Any:
    """Return a cotangent as `jax.vjp` takes it: of integers and keys, none."""
    return cotangent if is_differentiable(value) else np.zeros(value.shape, jax.dtypes.float0)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)
