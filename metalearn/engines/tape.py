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


class Playback:
    """Returns recorded results, call by call, differentiated as `value_and_grad` does.

    `value_and_grad` takes the result as a further argument, `given`.
    """

    def __init__(self, results: list[Any], value_and_grad: ValueAndGrad):
        self._left = list(results)
        self._value_and_grad = value_and_grad

    def stand_in(self, fun: Any, argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        """Stand in for `jax.value_and_grad`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._check(bool(self._left))
            known = self._value_and_grad(fun, argnums, has_aux, given=self._left.pop(0))
            return known(*args, **kwargs)

        return call

    def finish(self) -> None:
        """Raise ValueError where results are left over."""
        self._check(not self._left)

    def _check(self, same: bool) -> None:
        if not same:
            raise ValueError(
                "An `Unroll.undo` must take the inner gradients of the step it undoes, all of "
                "them, at the same points and in the same order, with the `grad` it is given; this "
                "one takes more or fewer than `step` does."
            )
