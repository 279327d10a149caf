"""An inner `value_and_grad` whose derivative is a central difference of its gradient.

The cotangent u of an inner gradient g is pulled back by the directional derivative of the gradient
along u, as mixed flow does it (`metalearn.engines.mixed_flow.forward_over_reverse`), but the
directional derivative is a difference,

    u^T dg/d(theta, eta)  ~  (grad L(theta + e u) - grad L(theta - e u)) / (2 e),    e = move / |u|

which costs two gradients, and no second derivative. Its error is O(move^2) times the third
derivative of L, and rounding / move: in float32 a `move` of 0.01 is usual (Liu et al. 2019,
arXiv:1806.09055). Arguments of lower precision are moved in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import precise
from metalearn.engines.mixed_flow import forward_over_reverse as commuted


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    move: float,
) -> Callable[..., Any]:
    """Replace `jax.value_and_grad`; the derivative of its gradient is a central difference.

    Args:
      fun: the inner loss.
      argnums: as of `jax.value_and_grad`.
      has_aux: as of `jax.value_and_grad`.
      move: how far the differentiated arguments are moved, in their norm.
    """

    def push(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
        leaves = jax.tree.leaves(tangents[0])
        size = jnp.sqrt(sum(jnp.vdot(u, u).real for u in map(precise, leaves)))
        scale = move / jnp.where(size > 0, size, 1)

        def at(sign: int) -> Any:
            moved = jax.tree.map(lambda x, u: precise(x) + sign * scale * u, primals, tangents)
            return function(*moved)

        like = jax.eval_shape(function, *primals)
        return jax.tree.map(
            lambda a, b, x: ((a - b) / (2 * scale)).astype(x.dtype), at(1), at(-1), like
        )

    return commuted.value_and_grad(fun, argnums, has_aux, push=push)
