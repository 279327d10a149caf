"""Inner gradients recorded on the way forward and played back on the way back.

A step that is run again for its derivative needs its gradients' values, and their own
derivative, but no second evaluation of the loss: the tape gives it the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.extend.core import get_opaque_trace_state

ValueAndGrad = Callable[..., Callable[..., Any]]


class Tape:
    """Records what a stand-in for `jax.value_and_grad` returns, call by call, in one step.

    Calls inside a transformation of the step's own leave None: they are computed again.
    """

    def __init__(self) -> None:
        self._trace = get_opaque_trace_state(convention="metalearn")
        self.results: list[Any] = []

    def recording(self, value_and_grad: ValueAndGrad) -> ValueAndGrad:
        """Return the stand-in, recorded."""

        def stand_in(fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
            differentiate = value_and_grad(fun, argnums=argnums, has_aux=has_aux)

            def call(*args: Any, **kwargs: Any) -> Any:
                result = differentiate(*args, **kwargs)
                here = get_opaque_trace_state(convention="metalearn") == self._trace
                self.results.append(result if here else None)
                return result

            return call

        return stand_in


def playing(results: list[Any], value_and_grad: ValueAndGrad) -> ValueAndGrad:
    """Return a stand-in whose calls return `results` in turn, differentiated as the other's.

    `value_and_grad` takes the result as a further argument, `given`.
    """
    left = iter(results)

    def stand_in(fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = next(left)
            return value_and_grad(fun, argnums, has_aux, given=given)(*args, **kwargs)

        return call

    return stand_in
