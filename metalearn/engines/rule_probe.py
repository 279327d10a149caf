"""Whether a function with a derivative rule of its own has a true one, found by trying it.

A rule gives f a backward pass B(x, z), for a cotangent z of f(x). Differentiated once more, JAX
takes the derivative of B as it stands, and for that of the value f(x) some D: what the rule's own
computation of the value has. A gradient that passes through f has a symmetric Jacobian, whatever
is around f, if and only if

    dB/dx is symmetric,    and    dB/dz = D^T

that is, if the gradient of phi(x, z) = <z, f(x)> with respect to both has. Rounding with the
identity as its backward pass fails the second, for D = 0; a cotangent that is clipped fails it
too, where z is large; and so does a rule that is right but cut by a `stop_gradient`.

Random products tell: one `jvp` and one `vjp` of that gradient along the same u, compared entry by
entry. Points of several sizes, signs and kinds are tried, so that windows, thresholds and clips of
any usual size are met, on the CPU and at the shapes that the function has. What a function does
where nothing was tried, no trial can say.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from metalearn._utils.trees import is_differentiable
from metalearn.cost.jaxpr import flops

# What is larger is not tried: a trial is to cost a second at most.
LARGEST = 2**23  # numbers that go in and come out
MANY = 2**16  # from which on only the FEW most telling points are tried
PRODUCTS = 10**9  # FLOPs of a point
EQUATIONS = 3000
LOOPS = 10**4  # steps of loops within loops
FEW = 6


class Verdict(enum.Enum):
    """What a trial says of a rule."""

    DERIVATIVE = "is a derivative"
    NO_DERIVATIVE = "is no derivative"
    UNKNOWN = "cannot be told by trying"


class Trial(NamedTuple):
    """A verdict, and why."""

    verdict: Verdict
    reason: str
    forward: bool = True  # whether the gradient can be pushed forward (a JVP) at all


class Point(NamedTuple):
    """Where a function is tried: random x and z of a size."""

    x: float
    z: float
    kind: str = "any"  # or "positive", "unit" (between 0 and 1), "ties" (-1, 0 and 1)


# The first are the most telling. Nothing is proven wrong by sizes at which rounding may be to
# blame, nor by points where a function has a kink: these make the verdict UNKNOWN.
POINTS = (
    Point(1, 1),
    Point(0.1, 1e-3),
    Point(10, 1e3),
    Point(1, 1e6, "positive"),
    Point(1, 1, "ties"),
    Point(1, 1e-2, "unit"),
    Point(1e-3, 1e6),
    Point(0.1, 1, "positive"),
    Point(100, 1),
    Point(1, 1e2),
    Point(10, 1e-2, "positive"),
    Point(1e3, 1e-3),
    Point(1, 10, "unit"),
    Point(1, 1e4, "ties"),
)
MODERATE = 10

Values = tuple[list[Any], list[Any], list[Any], list[Any]]  # x, data, z, u

_known: dict[str, Trial] = {}  # verdicts by the program that tells


def trial(jaxpr: core.Jaxpr, equation: core.JaxprEqn, varied: Sequence[bool]) -> Trial:
    """Try the function that an equation of a jaxpr calls.

    `varied`: which of the equation's inputs are differentiated; the others are data.
    """
    try:
        with jax.ensure_compile_time_eval():
            return _trial(*_function_of(jaxpr, equation, varied))
    except Exception as error:  # whatever a rule raises where it is called with made-up numbers
        text = str(error).strip().partition("\n")[0]
        return _unknown(f"it cannot be tried: {type(error).__name__}: {text}", forward=False)


def _unknown(reason: str, forward: bool = True) -> Trial:
    return Trial(Verdict.UNKNOWN, reason, forward)


class _Function(NamedTuple):
    """A function of several arrays, (x, data, fixed) -> outputs, with the types of all."""

    apply: Callable[[list[Any], list[Any], list[Any]], list[Any]]
    x: list[Any]  # what is differentiated
    data: list[Any]  # numbers that are not
    fixed: list[Any]  # integers, booleans, keys
    outputs: list[Any]


def _function_of(
    jaxpr: core.Jaxpr, equation: core.JaxprEqn, varied: Sequence[bool]
) -> tuple[_Function]:
    flags = {
        variable: flag
        for variable, flag in zip(equation.invars, varied, strict=True)
        if not isinstance(variable, core.Literal)
    }
    x = [v for v, flag in flags.items() if flag]
    data = [v for v, flag in flags.items() if not flag and is_differentiable(v.aval)]
    fixed = [v for v, flag in flags.items() if not flag and not is_differentiable(v.aval)]
    outputs = [v for v in equation.outvars if str(v) != "_" and is_differentiable(v.aval)]
    alone = jaxpr.replace(
        constvars=[],
        invars=[*x, *data, *fixed],
        outvars=outputs,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )

    def apply(x: list[Any], data: list[Any], fixed: list[Any]) -> list[Any]:
        return jax.core.eval_jaxpr(alone, (), *x, *data, *fixed)

    if equation.effects:
        raise NotImplementedError(f"it has effects ({', '.join(map(str, equation.effects))})")

    def shapes(variables: list[Any]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]

    return (_Function(apply, shapes(x), shapes(data), shapes(fixed), shapes(outputs)),)


def _trial(function: _Function) -> Trial:
    if not function.x or not function.outputs:
        return Trial(Verdict.DERIVATIVE, "no derivative passes through it")

    def products(x: list[Any], data: list[Any], z: list[Any], u: list[Any], fixed: Any) -> Any:
        def gradient(x: list[Any], z: list[Any]) -> tuple[list[Any], list[Any]]:
            y, pull = jax.vjp(lambda x: function.apply(x, data, fixed), x)
            return pull(z)[0], y

        (back, y), pushed = jax.jvp(lambda x: gradient(x, z), (x,), (u,))
        _, pull = jax.vjp(lambda x, z: gradient(x, z)[0], x, z)
        return pushed, pull(u), (back, y)

    shapes = function.x, function.data, function.outputs, function.x, function.fixed
    closed = jax.make_jaxpr(products)(*shapes)
    if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
        return _unknown("its rule closes over traced values", forward=False)
    refusal = _refusal(closed, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))
    if refusal:
        return refusal
    text = _text(closed)
    if text is None:
        return _compared(closed, function)
    if text not in _known:
        _known[text] = _compared(closed, function)
    return _known[text]


def _refusal(closed: Any, size: int) -> Trial | None:
    """Say why a program of inputs and outputs of a size is not run; None where it may be."""
    equations = list(_equations(closed.jaxpr))
    names = {equation.primitive.name for equation, _ in equations}
    if "custom_lin" in names:  # what is left of a `custom_vjp` that has no JVP
        return _unknown("a `jax.custom_vjp` inside its rule has no JVP", forward=False)
    if closed.jaxpr.effects or any("callback" in name for name in names):
        return _unknown("its rule calls back into Python, or has other effects")
    if "while" in names:
        return _unknown("it has a loop that may not end for made-up inputs")
    loops = max((steps for _, steps in equations), default=1)
    if size > LARGEST or len(equations) > EQUATIONS or loops > LOOPS or flops(closed) > PRODUCTS:
        return _unknown("it is too large to be tried")
    return None


def _equations(jaxpr: Any, steps: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield each equation, and how many steps of loops it is in."""
    for equation in jaxpr.eqns:
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        yield equation, steps * length
        for inner in core.jaxprs_in_params(equation.params):
            yield from _equations(inner, steps * length)


def _text(closed: Any) -> str | None:
    """Return what tells two programs apart; None where that cannot be written down."""
    text = str(closed.jaxpr)
    if " at 0x" in text:  # a function by its address, which another may have later
        return None
    digest = hashlib.sha256(text.encode())
    for const in closed.consts:
        array = np.asarray(const)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _compared(closed: Any, function: _Function) -> Trial:
    """Run a program at every point, and compare."""
    treedef = jax.tree.structure(((function.x, function.outputs),) * 3)
    device, fixed = _cpu(), [_fixed(shape) for shape in function.fixed]

    @jax.jit
    def run(*leaves: Any) -> list[Any]:
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves)

    def products(x: list[Any], data: list[Any], z: list[Any], u: list[Any]) -> Any:
        leaves = jax.device_put([*x, *data, *z, *u, *fixed], device)
        return jax.tree.unflatten(treedef, jax.device_get(run(*leaves)))

    size = sum(math.prod(leaf.shape) for leaf in (*function.x, *function.outputs))
    normals, said, doubts = _normals(function), False, []
    sizes: dict[int, float] = {}
    quiet = jax.debug_nans(False), jax.debug_infs(False), np.errstate(all="ignore")
    with jax.default_device(device), quiet[0], quiet[1], quiet[2]:
        for number, point in enumerate(POINTS if size <= MANY else POINTS[:FEW]):
            values = _values(function, normals, point, number)
            difference = _difference(products, values, point, sizes)
            said |= difference is not None
            if not difference:
                continue
            where = f"at x of about {point.x:g} and cotangents of about {point.z:g}"
            if point.kind == "ties":
                doubts.append(f"it {difference.value} where arguments are zero, or equal")
            elif difference is Difference.LARGE and point.x <= MODERATE:
                return Trial(Verdict.NO_DERIVATIVE, f"it {difference.value} ({where})")
            else:
                doubts.append(f"it {difference.value} ({where})")
    if doubts:
        return _unknown(doubts[0])
    if not said:
        return _unknown("its derivatives are zero, or not finite, wherever it was tried")
    return Trial(Verdict.DERIVATIVE, "its Jacobian is symmetric wherever it was tried")


def _normals(function: _Function) -> Values:
    """Draw standard normal numbers, complex ones where the dtype is."""
    rng = np.random.default_rng(0)

    def drawn(shape: Any) -> np.ndarray:
        draw = rng.standard_normal(shape.shape, np.float32)
        if not jnp.issubdtype(shape.dtype, jnp.complexfloating):
            return draw
        return draw + 1j * rng.standard_normal(shape.shape, np.float32)

    shapes = function.x, function.data, function.outputs, function.x
    x, data, z, u = ([drawn(shape) for shape in group] for group in shapes)
    return x, data, z, u


def _values(function: _Function, normals: Values, point: Point, number: int) -> Values:
    """Return the numbers of a point; each has an order of its own."""

    def scaled(draw: np.ndarray, shape: Any, size: float, kind: str = "any") -> np.ndarray:
        values = np.roll(draw, 7 * number)
        if np.iscomplexobj(values) or kind == "any":
            pass
        elif kind == "ties":
            values = np.clip(np.round(values), -1, 1)
        else:
            values = abs(values) if kind == "positive" else abs(values) % 1
        return (size * values).astype(shape.dtype)

    def group(draws: list[Any], shapes: list[Any], *how: Any) -> list[Any]:
        return [scaled(draw, shape, *how) for draw, shape in zip(draws, shapes, strict=True)]

    x, data, z, u = normals
    return (
        group(x, function.x, point.x, point.kind),
        group(data, function.data, point.x, point.kind),
        group(z, function.outputs, point.z),
        group(u, function.x, point.x),
    )


def _fixed(shape: Any) -> Any:
    """Return a value for what has no derivative: a key, or integers 0 and 1, or booleans."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0, impl=str(jax.random.key_impl(shape)))
        return jax.random.split(key, shape.shape) if shape.shape else key
    return np.random.default_rng(0).integers(0, 2, shape.shape).astype(shape.dtype)


class Difference(enum.Enum):
    """How the two products differ; its value goes on from "it"."""

    NONE = ""
    SMALL = "is not quite symmetric"
    LARGE = "has a backward pass that is not the derivative of its value"

    def __bool__(self) -> bool:
        return self is not Difference.NONE


class Distance(NamedTuple):
    """How far two vectors are apart, and what is to be made of it."""

    difference: float
    reference: float  # the sum of their norms
    tight: float  # rounding explains as much
    wide: float  # nothing but a wrong rule explains more


def _difference(
    products: Callable[..., Any], values: Values, point: Point, sizes: dict[int, float]
) -> Difference | None:
    """Compare the products at a point; None where nothing can be said.

    `sizes`: of each product for inputs of size one, the largest until now. Where a function has
    saturated, a product is a difference of numbers that large, and little is left but rounding.
    """
    pushed, pulled, scale = products(*values)
    unit = _units(values, len(pulled[1]))
    pairs = zip([*pushed[0], *pushed[1]], [*pulled[0], *pulled[1]], strict=True)
    distances = []
    for row, (pair, one) in enumerate(zip(pairs, unit, strict=True)):
        made_of = sizes.get(row, 0.0) * one * max(1, point.x) ** 2
        distances.append(_distance(*pair, [*scale[0], *scale[1]][row], made_of))
        if point.x <= 1 and one:
            sizes[row] = max(sizes.get(row, 0.0), distances[-1].reference / one)
    if all(distance.reference == 0 for distance in distances):
        return None
    if not any(d.difference > d.tight for d in distances):
        return Difference.NONE
    noise = _noise(products, values, (pushed, pulled))
    noisy = list(zip(distances, noise, strict=True))
    if not any(d.difference > d.tight + n for d, n in noisy):
        return Difference.NONE
    large = any(d.difference > d.wide + n for d, n in noisy)
    return Difference.LARGE if large else Difference.SMALL


def _units(values: Values, outputs: int) -> list[float]:
    """Return what each product is for a function all of whose derivatives are one, roughly."""
    _, _, z, u = values
    size = max(float(np.sqrt(np.mean(abs(_wide(leaf)) ** 2))) if leaf.size else 0.0 for leaf in z)
    norms = [_norm(_wide(leaf)) for leaf in u]
    return [*(size * math.hypot(*norms) for _ in norms), *[math.hypot(*norms)] * outputs]


def _distance(ours: Any, theirs: Any, scale: Any, made_of: float) -> Distance:
    eps = float(jnp.finfo(ours.dtype).eps)
    ours, theirs, scale = (_wide(leaf) for leaf in (ours, theirs, scale))
    fine = np.isfinite(ours) & np.isfinite(theirs)
    reference = _norm(ours[fine]) + _norm(theirs[fine])
    floor = 16 * _norm(scale[np.isfinite(scale)]) + 4 * made_of
    floor *= eps if eps < 1e-5 else eps / 5  # of half precision, several eps are too much
    tolerance = _tolerance(eps)
    wide = max(0.1, 2 * tolerance) * reference + 4 * floor
    return Distance(
        _norm(ours[fine] - theirs[fine]), reference, tolerance * reference + floor, wide
    )


def _tolerance(eps: float) -> float:
    """Return the relative difference that rounding explains, for a machine epsilon.

    1e-9 in float64, 1e-4 in float32, 0.03 in float16 and 0.05 in bfloat16.
    """
    if eps < 1e-10:
        return 1e-9
    return 1e3 * eps if eps < 1e-5 else min(30 * eps, 0.05)


def _noise(products: Callable[..., Any], values: Values, before: Any) -> list[float]:
    """Return a bound on how far rounding of the inputs moves each product."""
    rng = np.random.default_rng(99)
    half = any(jnp.finfo(leaf.dtype).eps > 1e-5 for leaf in values[0])

    def moved(leaf: np.ndarray) -> np.ndarray:
        step = (1 if half else 4) * float(jnp.finfo(leaf.dtype).eps)
        return (leaf * (1 + step * rng.standard_normal(leaf.shape))).astype(leaf.dtype)

    def moves(old: Any, new: Any) -> float:
        old, new = _wide(old), _wide(new)
        fine = np.isfinite(old) & np.isfinite(new)
        return _norm(old[fine] - new[fine])

    after = products(*([moved(leaf) for leaf in leaves] for leaves in values))[:2]
    by_product = [
        [moves(*pair) for pair in zip([*old[0], *old[1]], [*new[0], *new[1]], strict=True)]
        for old, new in zip(before, after, strict=True)
    ]
    return [(2 if half else 20) * sum(pair) for pair in zip(*by_product, strict=True)]


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


def _wide(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _cpu() -> Any:
    """Return a CPU where there is one: its products are as precise as their dtype."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
