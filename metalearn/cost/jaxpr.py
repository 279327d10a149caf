"""The FLOPs of a traced function, counted on its jaxpr after dead code elimination; its factors.

XLA's further optimizations (common subexpressions, products by one) are not included, so this is
an upper bound, usually a close one. It is the fallback where the compiled program has custom
calls whose matrix products cannot be read (`metalearn.cost.hlo`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from metalearn.cost import convolution
from metalearn.cost.hlo import unknown_loop


def flops(closed: ClosedJaxpr) -> int:
    """Return the FLOPs of matrix products and convolutions, loops included."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _flops(jaxpr)


def largest_factor(closed: ClosedJaxpr) -> int:
    """Return the bytes of the largest factor or result of a product or convolution; 0: none."""
    return max(_sizes(closed.jaxpr), default=0)


def _sizes(jaxpr: Jaxpr) -> Iterator[int]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            for variable in (*eqn.invars, *eqn.outvars):
                aval: Any = variable.aval
                yield aval.size * aval.dtype.itemsize
        for inner in _jaxprs(eqn.params.values()):
            yield from _sizes(inner)


def _flops(jaxpr: Jaxpr) -> int:
    return sum(map(_equation, jaxpr.eqns))


def _equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in params["branches"])
    if name == "while":
        count = _flops(params["body_jaxpr"].jaxpr)
        if count:
            unknown_loop(count)
        return count
    called = sum(map(_flops, _jaxprs(params.values())))
    return called * params["length"] if name == "scan" else called


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
    """Yield the jaxprs among the parameters of an equation, in nested tuples and lists too."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _convolution(eqn: Any) -> int:
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    windows = [
        convolution.Window(lhs[i], rhs[k], out[o], stride, low, input_dilation, kernel_dilation)
        for i, k, o, stride, (low, _), input_dilation, kernel_dilation in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return convolution.flops(batch, features, rhs[numbers.rhs_spec[1]], windows)
