"""Inner optimizers whose derivative is finite where a gradient is exactly zero.

Adam divides by sqrt(v), v a mean of squared gradients, and d sqrt(v)/dv is infinite at
v = 0. Training never notices: it takes no derivative of its own update. A meta-gradient
does, and infinity times the zero of a dead ReLU, an unused embedding or a padded token is
NaN, which then spreads to all of eta. Roots of that kind are in half of optax's optimizers,
as are the norms (sqrt of a sum of squares) by which others scale their steps.

Where an optimizer takes `eps_root` (`optax.adam(1e-3, eps_root=1e-8)`), that is the first
thing to try: it moves the root away from zero, changes the update a little, and bounds its
derivative by lr / sqrt(eps_root). For all others there is `differentiable_at_zero`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.extend.core import primitives

ROOTS = (primitives.sqrt_p, primitives.cbrt_p, primitives.rsqrt_p, primitives.pow_p)


def differentiable_at_zero(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return the same optimizer, its roots and powers given a derivative of 0 where it has none.

    The operations of an update are the same, in the same order, and so are their derivatives
    wherever those are finite. Where a gradient has been zero since the first step, Adam's
    update has the derivative lr / eps that it tends to as the gradient does. Roots inside a
    loop (`lax.scan`, `lax.while_loop`) of the optimizer's own are left as they are.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        taken = functools.partial(optimizer.update, **extra)
        return _with_safe_roots(taken)(updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _with_safe_roots(function: Callable[..., Any]) -> Callable[..., Any]:
    def safe(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = _evaluate(closed, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    return safe


def _evaluate(closed: core.ClosedJaxpr, *inputs: Any) -> list[Any]:
    """Evaluate a traced function on its leaves, one operation after the other."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, inputs, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in closed.jaxpr.eqns:
        outputs = _apply(equation, [read(variable) for variable in equation.invars])
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in closed.jaxpr.outvars]


def _apply(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Apply one operation, looking for roots inside calls and branches too."""
    primitive, params = equation.primitive, equation.params
    if primitive is primitives.jit_p:
        return _evaluate(params["jaxpr"], *inputs)
    if primitive is primitives.cond_p:
        branches = [functools.partial(_evaluate, branch) for branch in params["branches"]]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
    if primitive in ROOTS and jnp.issubdtype(jnp.result_type(inputs[0]), jnp.floating):
        return [_safe_root(lambda x: primitive.bind(x, *inputs[1:], **params), inputs[0])]
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return outputs if primitive.multiple_results else [outputs]


def _safe_root(root: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Return root(x), its derivative 0 wherever it is not finite."""
    x = jnp.asarray(x)
    _, slope = jax.jvp(root, (x,), (jnp.ones_like(x),))
    bad = jax.lax.stop_gradient(~jnp.isfinite(slope))
    return jnp.where(bad, jax.lax.stop_gradient(root(x)), root(jnp.where(bad, jnp.ones_like(x), x)))
