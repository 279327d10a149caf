"""Whether a function's result depends on its argument, read off its jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from metalearn._utils.trees import is_differentiable


def depends(function: Callable[[Any], Any], argument: Any) -> bool:
    """Say whether a floating-point leaf of `function(argument)` may depend on `argument`.

    Never wrongly no: an operation passes dependence on from any input to all its outputs.
    """
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    if jaxpr.effects:  # a reference may carry it where no variable does
        return True
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    outputs = [v for v in jaxpr.outvars if not isinstance(v, Literal)]
    return any(v in reached and is_differentiable(v.aval) for v in outputs)
