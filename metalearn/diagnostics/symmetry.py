"""Symmetry of the Jacobians of inner gradients, measured on one task.

`MixedFlow` assumes symmetry, except for inner losses with derivative rules that do not count as
derivatives (`metalearn.engines.custom_rules`). That a rule counts was probed with random numbers,
or declared; here it is tested with the numbers of a task. With J the Jacobian of g and random
vectors u and v,

    u^T J v  =  v^T J u

holds up to rounding if J is symmetric, and almost never otherwise. v is drawn for the parameters
that g is the gradient with respect to, and for the other inputs of the loss.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import get_opaque_trace_state

from metalearn._utils.compiling import quick_compilation
from metalearn._utils.trees import is_differentiable, precise, precision, split
from metalearn.algorithm import Algorithm
from metalearn.engines import MetaGradient
from metalearn.engines.custom_rules import Plan, Rule
from metalearn.engines.mixed_flow.forward_over_reverse import Call, hoist
from metalearn.tasks import Tasks, draw_task

STEPS = 2  # inner steps that are measured


class Symmetry(NamedTuple):
    """Which inner gradients of a task an engine commutes, and their asymmetry.

    Args:
      rules: functions whose rules do not count as derivatives; inner gradients through them are
        not commuted.
      asymmetry: the largest |u^T J v - v^T J u| of the others, relative to the sizes of both terms.
      tolerance: the largest asymmetry that rounding explains.
    """

    rules: tuple[Rule, ...] = ()
    asymmetry: float = 0.0
    tolerance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures the symmetry of a task: (eta, tasks, key) -> Symmetry.

    Args:
      algorithm: whose inner gradients are measured.
      engine: whose assumptions are tested.
    """

    algorithm: Algorithm
    engine: MetaGradient

    def __call__(self, eta: Any, tasks: Tasks, key: jax.Array) -> Symmetry:
        """Measure the task that `key` draws, over its first steps. Compiles a program."""
        if not self.engine.commutes:
            return Symmetry()
        traced = _Traced(self.engine)

        def measured(eta: Any, tasks: Tasks, key: jax.Array) -> jax.Array:
            return _worst(self.algorithm, traced, eta, tasks, key)

        with jax.default_matmul_precision("highest"):
            lowered = jax.jit(measured).trace(eta, tasks, key).lower()
        rules = tuple({str(rule): rule for rule in traced.rules}.values())
        if not traced.tolerances:
            return Symmetry(rules)
        worst = float(lowered.compile(quick_compilation())(eta, tasks, key))
        return Symmetry(rules, worst * max(traced.tolerances), max(traced.tolerances))


class _Traced:
    """Rules and tolerances, collected while a program is traced."""

    def __init__(self, engine: MetaGradient):
        self.engine = engine
        self.rules: list[Rule] = []
        self.tolerances: list[float] = []


def _worst(
    algorithm: Algorithm, traced: _Traced, eta: Any, tasks: Tasks, key: jax.Array
) -> jax.Array:
    """Return the largest asymmetry of a task, in units of its tolerance: ()."""
    task = draw_task(algorithm, tasks, key)
    batches = task.first_batches(STEPS)

    def move(carry: tuple[Any, jax.Array], batch: Any) -> tuple[Any, None]:
        state, worst = carry
        measuring = _Measuring(traced)
        state = task.unroll.step(eta, state, batch, measuring.grad)
        return (state, jnp.stack([worst, *measuring.asymmetries]).max()), None

    start = task.unroll.init(eta), jnp.zeros((), jnp.float32)
    (_, worst), _ = jax.lax.scan(move, start, batches)
    return worst


class _Measuring:
    """Provides the `grad` of one inner step, and measures each gradient that it computes."""

    def __init__(self, traced: _Traced):
        self._traced = traced
        self._trace = get_opaque_trace_state(convention="metalearn")
        self.asymmetries: list[jax.Array] = []

    def grad(self, fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        """Replace `jax.grad`."""
        differentiate = jax.grad(fun, argnums=argnums, has_aux=has_aux)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            call = Call(fun, argnums, has_aux, args, kwargs)
            plan = self._traced.engine.plan(call)
            self._traced.rules += plan.rules
            # Values traced inside a transformation of the step itself cannot leave it.
            here = get_opaque_trace_state(convention="metalearn") == self._trace
            if here and not plan.rules:
                asymmetry, tolerance = _measured(call, plan)
                self._traced.tolerances.append(tolerance)
                self.asymmetries.append((asymmetry / tolerance).astype(jnp.float32))
            return differentiate(*args, **kwargs)

        return grad_fun


def _measured(call: Call, plan: Plan) -> tuple[jax.Array, float]:
    """Return (the asymmetry of a gradient's Jacobian (), its tolerance)."""
    hoisted, consts = hoist(call.loss, call.theta, call.inputs)
    inputs = [*call.inputs, *consts]
    commuting = [
        is_differentiable(leaf) and len(call.theta) + i not in plan.backwards
        for i, leaf in enumerate(inputs)
    ]
    floats, rest, join = split(inputs, commuting)

    def gradient(theta: list[Any], floats: list[Any]) -> Any:
        def value(theta: list[Any], floats: list[Any]) -> jax.Array:
            return hoisted(theta, join(floats, rest))[0]

        return jax.grad(value, (0, 1))(theta, floats)

    def along(direction: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the product of the Jacobian with a direction of (theta, floats)."""
        return jax.jvp(gradient, (call.theta, floats), direction)[1]

    zeros = jax.tree.map(jnp.zeros_like, (call.theta, floats))
    u, v, w = _random(call.theta, 0), _random(call.theta, 1), _random(floats, 2)
    directions = (u, zeros[1]), (v, zeros[1]), (zeros[0], w)
    # A loop, so that the derivative is compiled once and not for each direction.
    products = jax.lax.map(along, jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions))
    of_u, *of_others = (jax.tree.map(operator.itemgetter(i), products) for i in range(3))
    asymmetries = []
    for direction, (of_theta, _) in zip(directions[1:], of_others, strict=True):
        ours, our_size = _product(u, of_theta)
        theirs, their_size = _product(direction, of_u)
        size = our_size + their_size
        asymmetries.append(
            jnp.where(size > 0, abs(ours - theirs) / jnp.where(size > 0, size, 1), 0)
        )
    return jnp.stack(asymmetries).max(), _tolerance(hoisted.jaxpr)


def _random(tree: Any, seed: int) -> Any:
    """Return random numbers like the leaves of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    draws = [
        jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
        for k, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, draws)


def _product(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Return (<a, b> (), the root of the sum of its squared terms ()). Of complex, real parts."""
    terms = [(x * y).real for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    sums = [term.sum(dtype=precision(term)) for term in terms]
    squares = [(precise(term) ** 2).sum() for term in terms]
    zero = jnp.zeros(())
    return sum(sums, zero), jnp.sqrt(sum(squares, zero))


def _tolerance(jaxpr: core.Jaxpr) -> float:
    """Return the tolerance for the lowest floating-point precision in a loss."""
    eps = max((float(jnp.finfo(dtype).eps) for dtype in _floats(jaxpr)), default=0.0)
    if eps > 1e-5:
        return 0.3
    return 1e-7 if eps < 1e-10 else 1e-2


def _floats(jaxpr: core.Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "dtype") and is_differentiable(variable.aval):
                yield variable.aval.dtype
        for inner in core.jaxprs_in_params(equation.params):
            yield from _floats(inner)
