"""An inner `value_and_grad` whose derivative is computed forward-over-reverse.

Besides g, the loss value and aux (batch statistics, logits, metrics) have cotangents too, l and
a. One pass gives all of them: differentiate

    Phi(theta, s) = (1 + s l) L(theta) + s <a, aux(theta)>

along (u, 1) in (theta, s): d Phi' = u^T H + l L' + a^T aux'. Only what has a cotangent is in it
(`symbolic_zeros`): a metric that is only logged may have an infinite derivative, such as the norm
of parameters that are zero, and zero times that is NaN.

The inner loss may close over traced values, eta for instance. JAX would drop or refuse a
derivative through a closure of a custom rule, so the loss is traced once and its closed-over
values become arguments.

This assumes that the Jacobian of g is symmetric: g must be the gradient of L as JAX differentiates
it. A function in L with a custom derivative rule that is not its derivative (a straight-through
estimator, a clipped gradient) violates that; `custom_rules` decides which rules count. If theta
reaches such a function, g is traced with its rules and differentiated by reverse over reverse; if
only other inputs reach it (labels without a cotangent, for instance), only their part of u^T dg is.

`pushforward` and `differentiated` are a `jvp` and a `vjp` with clear errors. Fused kernels have a
backward pass of their own, often without a derivative. Some of them fail inside JAX under a JVP,
and a custom rule within a custom rule fails only when the whole program is lowered: both cases are
detected and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.dtypes
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.extend import core

from metalearn._utils.trees import is_array, is_differentiable, split
from metalearn.engines import custom_rules

INNER_GRADIENT = "metalearn_inner_gradient"

Leaves = Sequence[Any]
Loss = Callable[[Leaves, Leaves], tuple[jax.Array, Any]]  # theta, inputs -> value, aux
Push = Callable[[Callable[..., Any], Any, Any], Any]  # function, primals, tangents -> its tangent


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    result: Any = None,
    *,
    true_rules: tuple[str, ...] = (),
    push: Push | None = None,
) -> Callable[..., Any]:
    """Replace `jax.value_and_grad`; the derivative of its gradient is a JVP.

    Args:
      fun: the inner loss.
      argnums: as of `jax.value_and_grad`.
      has_aux: as of `jax.value_and_grad`.
      result: the result, if it is known: only its derivative is computed. None: compute it.
      true_rules: see `MixedFlow`.
      push: computes the directional derivative of the gradient; None: `pushforward`, a JVP.
    """

    def value_and_grad_fun(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, has_aux, args, kwargs)
        gradient, consts, _ = inner_gradient(call.loss, call.theta, call.inputs, true_rules, push)
        floats, rest, _ = split([*call.inputs, *consts])
        known = None if result is None else primal(result, has_aux)
        (value, aux), grads = _commuted(gradient)(call.theta, floats, rest, known)
        grads = jax.tree.unflatten(call.treedef, named(grads))
        grads = grads[0] if isinstance(argnums, int) else tuple(grads)
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fun


class Call:
    """One call of the function that `grad` receives.

    Attributes:
      loss: (theta, inputs) -> (value, aux).
      theta: leaves of the differentiated arguments.
      treedef: their structure.
      inputs: the other arrays among the arguments.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        argnums: int | tuple[int, ...],
        has_aux: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        if missing := [i for i in chosen if not -len(args) <= i < len(args)]:
            raise TypeError(
                f"`grad(fun, argnums={argnums})` differentiates positional argument {missing[0]} "
                f"of `fun`, which was called with {len(args)} of them. Pass it by position."
            )
        theta, treedef = jax.tree.flatten([args[i] for i in chosen])
        held = list(args)
        for i in chosen:
            held[i] = None  # theta is passed separately from the other arguments
        inputs, static, join = split((held, kwargs), is_array)

        def loss(theta: Leaves, inputs: Leaves) -> tuple[Any, Any]:
            positional, named = join(inputs, static)
            positional = list(positional)
            for i, value in zip(chosen, jax.tree.unflatten(treedef, theta), strict=True):
                positional[i] = value
            output = fun(*positional, **named)
            return output if has_aux else (output, ())

        self.loss: Loss = loss
        self.theta = [inexact(leaf) for leaf in theta]
        self.treedef = treedef
        self.inputs = list(inputs)


def named(grads: Leaves) -> list[jax.Array]:
    """Name inner gradients, so that a policy of `jax.checkpoint` can save them.

    Real and imaginary parts are named separately: `jax.checkpoint` rounds saved reals only.
    """

    def part(g: jax.Array) -> jax.Array:
        return checkpoint_name(g, INNER_GRADIENT)

    def whole(g: jax.Array) -> jax.Array:
        return jax.lax.complex(part(g.real), part(g.imag)) if jnp.iscomplexobj(g) else part(g)

    return list(map(whole, grads))


def inexact(leaf: Any) -> jax.Array:
    """Return a leaf of theta as an array; TypeError unless it is floating-point or complex."""
    array = jnp.asarray(leaf)
    if not is_differentiable(array):
        raise TypeError(
            f"`MixedFlow` takes inner gradients with respect to floating-point arrays, but got "
            f"{array.dtype}{list(array.shape)}. Keep integers out of what `grad` differentiates."
        )
    return array


class Hoisted:
    """A traced function (theta, inputs) -> result whose closed-over values are inputs.

    Call it with (theta, [*inputs, *consts]). The constants may be traced values and are not stored
    here: they would outlive their trace.

    Attributes:
      jaxpr: of inputs [*theta, *inputs, *consts].
      shapes: of the result.
    """

    def __init__(self, jaxpr: core.Jaxpr, shapes: Any):
        self.jaxpr = jaxpr
        self.shapes = shapes

    def __call__(self, theta: Leaves, inputs: Leaves) -> Any:
        flat = jax.core.eval_jaxpr(self.jaxpr, (), *theta, *inputs)
        return jax.tree.unflatten(jax.tree.structure(self.shapes), flat)


def hoist(function: Callable[..., Any], theta: Leaves, inputs: Leaves) -> tuple[Hoisted, list[Any]]:
    """Return (function, consts): a function whose closed-over values became inputs, and those."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(list(theta), list(inputs))
    jaxpr, consts = closed.jaxpr, list(closed.consts)
    jaxpr = jaxpr.replace(
        constvars=[],
        invars=[*jaxpr.invars, *jaxpr.constvars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return Hoisted(jaxpr, shapes), consts


class Gradient(NamedTuple):
    """An inner gradient, of (theta, floats, rest), and its derivative.

    `floats` and `rest` are the other inputs of the loss, with and without derivatives.

    Args:
      forward: (theta, floats, rest) -> ((value, aux), grads).
      back: (theta, floats, rest, cotangents of forward's result) -> those of (theta, floats).
    """

    forward: Callable[[Leaves, Leaves, Leaves], Any]
    back: Callable[[Leaves, Leaves, Leaves, Any], tuple[Leaves, Leaves]]


def inner_gradient(
    loss: Loss,
    theta: Leaves,
    inputs: Leaves,
    true_rules: Sequence[str] = (),
    push: Push | None = None,
) -> tuple[Gradient, list[Any], Any]:
    """Return (gradient of a loss, its closed-over values, shapes of its result).

    Its `floats` and `rest` are split from [*inputs, *closed-over values].
    """
    hoisted, consts = hoist(loss, theta, inputs)
    plan = _planned(hoisted, theta, [*inputs, *consts], true_rules)
    shapes = hoisted.shapes
    if plan.rules:
        hoisted, consts = hoist(jax.value_and_grad(loss, has_aux=True), theta, inputs)
    _, _, join = split([*inputs, *consts])

    def result(theta: Leaves, floats: Leaves, rest: Leaves) -> Any:
        return hoisted(theta, join(floats, rest))

    if plan.rules:
        names = custom_rules.listed(plan.rules)

        def back(theta: Leaves, floats: Leaves, rest: Leaves, bars: Any) -> Any:
            def as_it_stands(theta: Leaves, floats: Leaves) -> Any:
                return result(theta, floats, rest)

            return differentiated(as_it_stands, (theta, floats), bars, names)

        return Gradient(result, back), consts, shapes

    numbers = enumerate([*inputs, *consts], len(theta))
    apart = [i in plan.backwards for i, leaf in numbers if is_differentiable(leaf)]

    def commuted(theta: Leaves, floats: Leaves, rest: Leaves, bars: Any) -> Any:
        return pullback(result, apart, theta, floats, rest, bars, push or pushforward)

    return Gradient(jax.value_and_grad(result, has_aux=True), commuted), consts, shapes


def planned(call: Call, true_rules: Sequence[str]) -> custom_rules.Plan:
    """Return which second derivatives of a loss may be assumed symmetric."""
    hoisted, consts = hoist(call.loss, call.theta, call.inputs)
    return _planned(hoisted, call.theta, [*call.inputs, *consts], true_rules)


def _planned(
    hoisted: Hoisted, theta: Leaves, inputs: Leaves, true_rules: Sequence[str]
) -> custom_rules.Plan:
    others = [len(theta) + i for i, leaf in enumerate(inputs) if is_differentiable(leaf)]
    return custom_rules.plan(hoisted.jaxpr, range(len(theta)), others, true_rules)


def primal(result: Any, has_aux: bool) -> Any:
    """Return a known result of `value_and_grad` as ((value, aux), leaves of grads)."""
    value, grads = result
    return value if has_aux else (value, ()), jax.tree.leaves(grads)


def _commuted(gradient: Gradient) -> Callable[[Leaves, Leaves, Leaves, Any], Any]:
    """Return (theta, floats, rest, known) -> ((value, aux), grads), with a custom rule."""

    def forward(theta: Leaves, floats: Leaves, rest: Leaves, known: Any) -> Any:
        if known is not None:
            return known
        return gradient.forward(theta, floats, rest)

    def backward(residuals: Any, cotangents: Any) -> Any:
        theta, floats, rest = residuals
        return *gradient.back(theta, floats, rest, cotangents), None, None

    return with_backward(forward, backward)


def with_backward(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` of four arguments, whose first three are the residuals of `backward`.

    Cotangents that are zero since nothing reads an output are `SymbolicZero`s.
    """

    def saved(*inputs: Any) -> Any:
        inputs = custom_vjp_primal_tree_values(inputs)
        return forward(*inputs), inputs[:3]

    rule = jax.custom_vjp(forward)
    rule.defvjp(saved, backward, symbolic_zeros=True)
    return rule


def is_zero(cotangent: Any) -> bool:
    """Return whether nothing reads the output that a cotangent is of."""
    return isinstance(cotangent, SymbolicZero)


def pullback(
    loss: Callable[[Leaves, Leaves, Leaves], Any],
    apart: Sequence[bool],
    theta: Leaves,
    floats: Leaves,
    rest: Leaves,
    cotangents: Any,
    push: Push,
) -> tuple[Leaves, Leaves]:
    """Pull cotangents of ((value, aux), grads) back to (theta, floats): one JVP of a gradient.

    Args:
      loss: (theta, floats, rest) -> (value, aux).
      apart: which of `floats` are differentiated by reverse over reverse instead.
      theta: the differentiated leaves.
      floats: other inputs that carry a derivative.
      rest: other inputs that carry none.
      cotangents: of ((value, aux), grads).
      push: computes the JVP.
    """
    (value_bar, aux_bar), u = cotangents
    backwards, forwards, join = split(floats, apart)
    moved, held, whole = split(theta, [not is_zero(leaf) for leaf in u])
    tangents = [leaf for leaf in u if not is_zero(leaf)]

    def phi(theta: Leaves, forwards: Leaves, s: jax.Array) -> jax.Array:
        value, aux = loss(theta, join(backwards, forwards), rest)
        if not is_zero(value_bar):
            value = (1 + s * value_bar) * value
        return value + s * _inner_product(aux_bar, aux)

    def gradient(moved: Leaves, s: jax.Array) -> Any:
        return jax.grad(phi, (0, 1))(whole(moved, held), forwards, s)

    s = jnp.zeros((), value_bar.dtype)
    theta_bar, forwards_bar = push(gradient, (moved, s), (tangents, jnp.ones_like(s)))
    if not backwards:
        return theta_bar, forwards_bar

    def as_it_stands(backwards: Leaves) -> Any:
        inputs = theta, join(backwards, forwards), rest
        return jax.value_and_grad(loss, has_aux=True)(*inputs)

    (backwards_bar,) = differentiated(as_it_stands, (backwards,), cotangents, "")
    return theta_bar, join(backwards_bar, forwards_bar)


def _inner_product(cotangents: Any, values: Any) -> jax.Array | float:
    """Return the real inner product over the leaves that have a cotangent."""
    pairs = zip(jax.tree.leaves(cotangents), jax.tree.leaves(values), strict=True)
    read = [(c, v) for c, v in pairs if is_differentiable(v) and not is_zero(c)]
    return sum((jnp.real(jnp.sum(c * v)) for c, v in read), start=0.0)


def pushforward(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Return the tangent of `function` at `primals` along `tangents`.

    Raises:
      TypeError: if an operation in it has no forward-mode derivative.
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
    if "custom_lin" in _primitives(closed.jaxpr):  # the remainder of a rule without a JVP
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
      TypeError: if an operation in it has no derivative; `names` are functions with rules.
    """
    bars = jax.tree.leaves(cotangents)

    def read(*primals: Any) -> list[Any]:
        leaves = jax.tree.leaves(function(*primals))
        return [leaf for leaf, bar in zip(leaves, bars, strict=True) if not is_zero(bar)]

    try:
        result, pull = jax.vjp(read, *primals)
        pairs = zip(result, (bar for bar in bars if not is_zero(bar)), strict=True)
        return pull([_cotangent(*pair) for pair in pairs])
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
    """Return a cotangent as `jax.vjp` expects it: float0 for integers and keys."""
    return cotangent if is_differentiable(value) else np.zeros(value.shape, jax.dtypes.float0)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)
