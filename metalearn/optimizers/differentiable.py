"""Inner optimizers whose derivative is finite wherever their update is.

Training takes no derivative of its own update. A meta-gradient does, and an update that is
finite can have a derivative that is not:

- An infinite slope. Adam divides by sqrt(v), v a mean of squared gradients, and d sqrt(v)/dv
  is infinite at v = 0. Infinity times the zero of a dead ReLU, an unused embedding or a padded
  token is NaN, which then spreads to all of eta. Such roots are in half of optax's optimizers.
- A norm of a gradient that is all zero: the root of a sum of squares, and a division by it.
  Clipping by a norm (`optax.clip_by_global_norm`) and trust ratios (lamb, lars) have both.
- An operation whose result is not used: where(norm < 1, g, g / norm) divides in either case,
  and radam takes the root of a negative number in its first steps. The value is dropped; its
  derivative is zero times infinity or NaN, which is NaN.

Where an optimizer takes `eps_root` (`optax.adam(1e-3, eps_root=1e-8)`), that mends the first: it
moves the root away from zero, changes the update a little, and bounds its derivative by
lr / sqrt(eps_root). For all others there is `differentiable_at_zero`.

What it does: out = f(x, y) of an elementwise operation has the tangent f_x dx + f_y dy, and a
slope f_x that is infinite or NaN is taken to be 0. No value changes, and no derivative that was
finite. At a point where the update has a derivative in the mathematical sense, that is the
derivative: the infinite slope belongs to an operation whose result is not used (clipping), or
is multiplied by a zero (Adam's v, whose own derivative 2 g is zero at g = 0: lr / eps remains,
the limit). Where it has none, as |g| at 0, 0 is a subgradient.

An update whose value is NaN (`optax.contrib.normalize` divides 0 by 0) remains so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.extend.core import primitives

# Primitives by name. Elementwise ones with an infinite slope at some finite point:
SINGULAR = frozenset(
    "sqrt rsqrt cbrt pow integer_pow div rem log log1p atan2 asin acos acosh atanh erf_inv lgamma "
    "digamma tan exp exp2 expm1 sinh cosh".split()
)
# elementwise ones whose slope is finite wherever their operands are:
CURVED = frozenset("square abs sin cos tanh asinh atan logistic erf erfc".split())
BILINEAR = frozenset("mul dot_general conv_general_dilated".split())
# others that multiply a derivative by something of what they are given:
JOINT = frozenset(
    "reduce_max reduce_min reduce_prod cummax cummin cumprod cumlogsumexp custom_jvp_call".split()
)
# and those whose derivative is not finite where values of a matrix coincide:
DECOMPOSITIONS = frozenset("svd eigh qr cholesky".split())
# What has functions of its own among its parameters:
CALLS = (
    primitives.scan_p,
    primitives.while_p,
    primitives.cond_p,
    primitives.remat_p,
    primitives.closed_call_p,
)


def differentiable_at_zero(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return the same optimizer, each slope that is infinite or NaN replaced by 0.

    The operations of an update are the same, in the same order, and so are their derivatives
    wherever those are finite, to rounding. Where a gradient has been zero since the first step,
    Adam's update has the derivative lr / eps that it tends to as the gradient does; clipping by a
    norm that is zero is the identity, and so is its derivative.

    Loops, branches, `jit` and `jax.checkpoint` inside an update are included. A `custom_jvp` or
    `custom_vjp` inside keeps its own rule as it is.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        plain = functools.partial(optimizer.update, **extra)
        return _with_finite_slopes(plain)(updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _with_finite_slopes(function: Callable[..., Any]) -> Callable[..., Any]:
    def safe(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        flat = _evaluate(closed, leaves, [False] * len(leaves))[0]
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    return safe


def _evaluate(
    closed: core.ClosedJaxpr, inputs: Sequence[Any], suspects: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Evaluate a traced function on its leaves, one operation after the other.

    A value is suspect if it may be infinite or NaN though the optimizer's arguments are not,
    since it comes from a singular operation. Returns the outputs, and whether each is suspect.
    """
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, inputs, strict=True)
    suspect = dict(zip(closed.jaxpr.invars, suspects, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    def doubted(variable: Any) -> bool:
        if isinstance(variable, core.Literal):
            return not np.isfinite(variable.val).all()
        return suspect.get(variable, False)

    for equation in closed.jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        doubts_in = [doubted(variable) for variable in equation.invars]
        outputs, doubts = _apply(equation, operands, doubts_in)
        values |= zip(equation.outvars, outputs, strict=True)
        suspect |= zip(equation.outvars, doubts, strict=True)
    outvars = closed.jaxpr.outvars
    return [read(variable) for variable in outvars], [doubted(variable) for variable in outvars]


def _apply(
    equation: Any, operands: Sequence[Any], doubts: Sequence[bool]
) -> tuple[Sequence[Any], Sequence[bool]]:
    """Apply one operation; return its outputs, and whether each is suspect."""
    primitive, params = equation.primitive, equation.params
    if primitive is primitives.jit_p:
        return _evaluate(params["jaxpr"], operands, doubts)
    doubt, rule = any(doubts) or primitive in CALLS, None
    if primitive in CALLS:
        params = {name: _safe_inside(value) for name, value in params.items()}
    elif _is_singular(equation):
        doubt, rule = True, _rule(primitive.name)
    elif doubt:
        rule = _rule(primitive.name)

    def apply(*operands: Any) -> Any:
        return primitive.bind(*operands, **primitive.get_bind_params(params))

    outputs = _by_rule(rule, apply, operands) if rule else apply(*operands)
    outputs = outputs if primitive.multiple_results else [outputs]
    return outputs, [doubt and _has_tangent(variable.aval) for variable in equation.outvars]


def _safe_inside(value: Any) -> Any:
    """Return a parameter of a call; if it is a function, with finite slopes inside."""
    if isinstance(value, tuple):  # branches
        return tuple(map(_safe_inside, value))
    if not isinstance(value, core.ClosedJaxpr):
        is_open = isinstance(value, core.Jaxpr)  # of `jax.checkpoint`, in older versions of JAX
        return _safe_inside(core.ClosedJaxpr(value, ())).jaxpr if is_open else value

    def inside(*inputs: Any) -> list[Any]:
        return _evaluate(value, inputs, [True] * len(inputs))[0]

    return jax.make_jaxpr(inside)(
        *[jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in value.in_avals]
    )


def _is_singular(equation: Any) -> bool:
    """Say whether an operation has a slope that is not finite at some finite point."""
    name, params = equation.primitive.name, equation.params
    if name in DECOMPOSITIONS:
        return True
    if name not in SINGULAR or not _has_tangent(equation.outvars[0].aval):
        return False
    if name == "div" and isinstance(equation.invars[1], core.Literal):
        return bool(equation.invars[1].val == 0)
    return name != "integer_pow" or params["y"] < 0


# A rule takes the tangent of an operation: from the operation, its operands, and their tangents,
# None where an operand has none.
Tangent = jax.Array | None
Rule = Callable[[Callable[..., Any], Sequence[Any], Sequence[Tangent]], Any]


def _rule(name: str) -> Rule | None:
    """Return the rule of an operation that is singular, or whose operands may not be finite."""
    if name in BILINEAR:
        return _bilinear
    if name in SINGULAR or name in CURVED:
        return _quotient if name == "div" else _elementwise
    if name in DECOMPOSITIONS:
        return _decomposition
    return _joint if name in JOINT else None


def _by_rule(rule: Rule, apply: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Apply an operation whose tangent is taken by a rule."""
    applied = jax.custom_jvp(apply)

    @functools.partial(applied.defjvp, symbolic_zeros=True)
    def push(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        known = [None if isinstance(t, SymbolicZero) else t for t in tangents]
        return applied(*primals), rule(apply, primals, known)

    return applied(*operands)


def _elementwise(
    apply: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tangent]
) -> Any:
    terms = [_slope(apply, primals, i) * t for i, t in enumerate(tangents) if t is not None]
    return functools.reduce(jnp.add, terms)


def _quotient(
    apply: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tangent]
) -> Any:
    """Return the tangent of x / y in the way of JAX: dx / y - dy x y^-2, rounded alike."""
    (x, y), (dx, dy) = primals, tangents
    terms = []
    if dx is not None:
        ok = jnp.isfinite(apply(jnp.ones((), x.dtype), y))  # of the shape of y, which may be ()
        terms.append(jnp.where(ok, apply(dx, jnp.where(ok, y, 1)), 0))
    if dy is not None:
        ok = jnp.isfinite(x * jax.lax.integer_pow(y, -2))
        power = jax.lax.integer_pow(jnp.where(ok, y, 1), -2)
        terms.append(-dy * jnp.where(ok, x, 0) * power)
    return functools.reduce(jnp.add, terms)


def _bilinear(
    apply: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tangent]
) -> Any:
    (x, y), (dx, dy) = primals, tangents
    terms = [] if dx is None else [apply(dx, _finite(y))]
    terms += [] if dy is None else [apply(_finite(x), dy)]
    return functools.reduce(jnp.add, terms)


def _joint(apply: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tangent]) -> Any:
    """Return the tangents beside operands that are finite; 0 where an output is not."""
    beside = [jnp.nan_to_num(x) if _has_tangent(x) else x for x in primals]
    moved = [
        (jnp.zeros_like(x) if _has_tangent(x) else np.zeros(x.shape, jax.dtypes.float0))
        if tangent is None
        else tangent
        for x, tangent in zip(primals, tangents, strict=True)
    ]
    return jax.tree.map(
        lambda out, t: jnp.where(jnp.isfinite(out), t, 0) if _has_tangent(out) else t,
        apply(*primals),
        jax.jvp(apply, beside, moved)[1],
    )


def _decomposition(
    apply: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Tangent]
) -> Any:
    """Return the tangents of a decomposition; 0 for a factor that has one that is not finite."""
    (x,), (dx,) = primals, tangents
    rows, columns = x.shape[-2:]
    distinct = jnp.eye(rows, columns, dtype=x.dtype) * (
        1 + jax.lax.broadcasted_iota(x.dtype, (rows, columns), 1)
    )
    trial, treedef = jax.tree.flatten(jax.jvp(apply, (x,), (jnp.ones_like(x),))[1])
    factors = []
    for i, factor in enumerate(trial):
        ok = jnp.isfinite(factor).all()
        beside = jnp.where(ok, x, jnp.broadcast_to(distinct, x.shape))
        tangent = jax.tree.leaves(jax.jvp(apply, (beside,), (dx,))[1])[i]
        factors.append(jnp.where(ok, tangent, 0))
    return jax.tree.unflatten(treedef, factors)


def _slope(apply: Callable[..., Any], operands: Sequence[Any], index: int) -> jax.Array:
    """Return an elementwise operation's derivative in one operand, 0 where it is not finite.

    Where it is not, its own derivative is that of the operation at 1, and dropped.
    """

    def at(operands: Sequence[Any]) -> jax.Array:
        before, x, after = operands[:index], operands[index], operands[index + 1 :]
        return jax.jvp(lambda x: apply(*before, x, *after), (x,), (jnp.ones_like(x),))[1]

    bad = jax.lax.stop_gradient(~jnp.isfinite(at(operands)))
    beside = [jnp.where(bad, jnp.ones_like(x), x) for x in operands]
    return jnp.where(bad, 0, at(beside))


def _has_tangent(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
