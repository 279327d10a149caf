"""Whether the Jacobian of an inner gradient is symmetric, measured on one task.

`MixedFlow` assumes that it is, except for inner losses with derivative rules that do not count as
derivatives (`metalearn.engines.custom_rules`). What it assumes of a rule was probed with
random numbers, or declared; here it is tested with the numbers of a task. With J the
Jacobian of g, two random vectors u and v tell,

    u^T J v  =  v^T J u

up to rounding, where J is symmetric, and hardly ever where it is not. v is drawn among the
parameters that g is the gradient with respect to, and among the other inputs of the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import get_opaque_trace_state

from metalearn._utils.trees import is_differentiable, split
from metalearn.algorithm import Algorithm
from metalearn.engines import MetaGradient
from metalearn.engines.custom_rules import Plan, Rule
from metalearn.engines.mixed_flow.forward_over_reverse import Call, hoist
from metalearn.tasks import Tasks, draw_task

STEPS = 2  # inner steps that are looked at


class Symmetry(NamedTuple):
    """What an engine makes of the inner gradients of a task, and whether it may."""

    # Functions whose rules do not count as derivatives; gradients that pass them are not commuted.
    rules: tuple[Rule, ...] = ()
    # The largest |u^T J v - v^T J u| of those that are, in units of what their products are made
    # of, and the least that rounding does not explain.
    asymmetry: float = 0.0
    tolerance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures tasks of an algorithm for an engine: (eta, tasks, key) -> Symmetry."""

    algorithm: Algorithm
    engine: MetaGradient

    def __call__(self, eta: Any, tasks: Tasks, key: jax.Array) -> Symmetry:
        """Measure the task that `key` draws, over its first steps. Compiles a program."""
        if not self.engine.commutes:
            return Symmetry()
        seen = _Seen(self.engine)

        def measured(eta: Any, tasks: Tasks, key: jax.Array) -> jax.Array:
            return _worst(self.algorithm, seen, eta, tasks, key)

        with jax.default_matmul_precision("highest"):
            lowered = jax.jit(measured).trace(eta, tasks, key).lower()
        rules = tuple({str(rule): rule for rule in seen.rules}.values())
        if not seen.tolerances:
            return Symmetry(rules)
        worst = float(lowered.compile()(eta, tasks, key))
        return Symmetry(rules, worst * max(seen.tolerances), max(seen.tolerances))


class _Seen:
    """What is noted while a program is traced."""

    def __init__(self, engine: MetaGradient):
        self.engine = engine
        self.rules: list[Rule] = []
        self.tolerances: list[float] = []


def _worst(algorithm: Algorithm, seen: _Seen, eta: Any, tasks: Tasks, key: jax.Array) -> jax.Array:
    """Return the largest asymmetry of a task, in units of its tolerance: ()."""
    task = draw_task(algorithm, tasks, key)
    batches = task.first_batches(STEPS)

    def move(carry: tuple[Any, jax.Array], batch: Any) -> tuple[Any, None]:
        state, worst = carry
        measuring = _Measuring(seen)
        state = task.unroll.step(eta, state, batch, measuring.grad)
        return (state, jnp.stack([worst, *measuring.asymmetries]).max()), None

    start = task.unroll.init(eta), jnp.zeros((), jnp.float32)
    (_, worst), _ = jax.lax.scan(move, start, batches)
    return worst


class _Measuring:
    """Hands out a `grad` for one inner step that measures what it differentiates."""

    def __init__(self, seen: _Seen):
        self._seen = seen
        self._trace = get_opaque_trace_state(convention="metalearn")
        self.asymmetries: list[jax.Array] = []

    def grad(self, fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        """Stand in for `jax.grad`."""
        differentiate = jax.grad(fun, argnums=argnums, has_aux=has_aux)

        def grad_fun(*args: Any, **kwargs: Any) -> Any:
            call = Call(fun, argnums, has_aux, args, kwargs)
            plan = self._seen.engine.plan(call)
            self._seen.rules += plan.rules
            # Inside a transformation of the step's own nothing can be taken out.
            here = get_opaque_trace_state(convention="metalearn") == self._trace
            if here and not plan.rules:
                asymmetry, tolerance = _measured(call, plan)
                self._seen.tolerances.append(tolerance)
                self.asymmetries.append((asymmetry / tolerance).astype(jnp.float32))
            return differentiate(*args, **kwargs)

        return grad_fun


def _measured(call: Call, plan: Plan) -> tuple[jax.Array, float]:
    """Return (the asymmetry of a gradient's Jacobian (), what rounding explains of it)."""
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

    u = _random(call.theta, 0)
    _, pushed = jax.jvp(lambda theta: gradient(theta, floats), (call.theta,), (u,))
    zeros = jax.tree.map(jnp.zeros_like, (call.theta, floats))
    directions = (_random(call.theta, 1), zeros[1]), (zeros[0], _random(floats, 2))
    found = []
    for v in directions:
        _, (along, _) = jax.jvp(gradient, (call.theta, floats), v)
        ours, our_size = _product(u, along)
        theirs, their_size = _product(v, pushed)
        size = our_size + their_size
        found.append(jnp.where(size > 0, abs(ours - theirs) / jnp.where(size > 0, size, 1), 0))
    return jnp.stack(found).max(), _tolerance(hoisted.jaxpr)


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
    sums = [term.sum(dtype=_precise(term)) for term in terms]
    squares = [(term.astype(_precise(term)) ** 2).sum() for term in terms]
    zero = jnp.zeros(())
    return sum(sums, zero), jnp.sqrt(sum(squares, zero))


def _precise(leaf: jax.Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _tolerance(jaxpr: core.Jaxpr) -> float:
    """Return how asymmetric rounding may make a Jacobian, by the lowest precision in a loss."""
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
