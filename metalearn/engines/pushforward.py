"""A `jvp` that says what is wrong where a model cannot be pushed forward.

Fused kernels come with a backward pass of their own and often without a derivative of it.
Some of those fail inside JAX when they are pushed forward, and a rule within a rule fails
only when the whole program is lowered, far from here: both are found and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
from jax.extend import core


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
            f"loss cannot be: {error} Fused kernels and callbacks are the usual cause. Replace it "
            "by one written in JAX, such as `metalearn.models.causal_attention` for attention."
        ) from error
    if "custom_lin" in _primitives(closed.jaxpr):  # what is left of a rule without a JVP
        raise TypeError(
            "`MixedFlow` pushes the inner gradient forward (a JVP), but the inner loss has a "
            "`jax.custom_vjp` inside the rule of another, which has no JVP. Write the inner one as "
            "a `jax.custom_jvp` or in plain JAX, or use `Reverse()`, which takes it."
        )
    flat = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves((primals, tangents)))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)
