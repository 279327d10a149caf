"""A learned hyperparameter: its initial value, its range, and the windows that share a value.

eta holds a coordinate x, and the space defines its value:

    "raw"     value = x
    "log"     value = exp(x)                                positive, over orders of magnitude
    "logit"   value = low + (high - low) / (1 + exp(-x))    strictly between its bounds

Values are clipped to their range with a straight-through derivative (of one also at the bounds),
so that a clipped value still receives a hypergradient. `metalearn.algorithms.in_ranges` clips x
itself.

`place` looks up by name whether a hyperparameter is an argument of the optimizer, of the objective
or of the augmentation.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import is_integer, nearest, pick
from metalearn._utils.fields import check_fields
from metalearn.algorithms.fds.schedule import Windows, check_windows

SPACES = {
    "raw": "the value itself",
    "log": "its logarithm",
    "logit": "the logit of its position between its bounds",
}


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One learned hyperparameter.

    Args:
      low: the least value.
      high: the largest value.
      start: the initial value of every window, or a tuple of one for each window.
      windows: the number of windows of equal length, or their edges, from 0 to T.
      space: "raw", "log" or "logit": what the learned coordinate stands for, see
        `metalearn.algorithms.fds.hyperparameter`.
      shape: of one value, such as (classes,).
    """

    low: float
    high: float
    start: float | tuple[float, ...] = 0.0
    windows: Windows = 1
    space: str = "raw"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_windows(self.windows)
        except ValueError as error:
            what = f"`Hyperparameter(windows={self.windows!r:.80})`"
            raise ValueError(f"{what}: {error}") from error
        check_fields(self, "windows", "shape")
        pick(SPACES, self.space, "space")
        if not isinstance(self.shape, tuple) or not all(map(is_integer, self.shape)):
            raise ValueError(
                f"`Hyperparameter(shape={self.shape!r:.80})`: The shape of a hyperparameter is a "
                f"tuple of sizes, such as (classes,), not {self.shape!r:.80}."
            )
        starts = np.atleast_1d(np.asarray(self.start, float))
        if not self.low < self.high:
            raise ValueError(f"A range has low < high, not low={self.low}, high={self.high}.")
        if not ((self.low <= starts) & (starts <= self.high)).all():
            raise ValueError(
                f"start={self.start} is not in the range from {self.low} to {self.high}. Start "
                "inside it, or widen it."
            )
        if self.space == "log" and not (self.low > 0 and (starts > 0).all()):
            raise ValueError(
                f'space="log" holds only positive values, not low={self.low} and '
                f'start={self.start}. Take positive ones, such as low=1e-6, or space="raw".'
            )
        if self.space == "logit" and not ((self.low < starts) & (starts < self.high)).all():
            raise ValueError(
                f'space="logit" reaches its bounds only in the limit, so start={self.start} must '
                f"lie strictly between {self.low} and {self.high}."
            )
        if self.space == "logit" and not (np.abs(self._logit(starts)) <= LOGIT).all():
            width = self.high - self.low
            raise ValueError(
                f'space="logit" covers all but a thousandth of the range at each end, and start='
                f"{self.start} is in one. Start from {self.low + 1e-3 * width:.4g} to "
                f"{self.high - 1e-3 * width:.4g}, or widen the range."
            )

    def coordinate(self, value: jax.Array) -> jax.Array:
        """Return the coordinate x of a value."""
        if self.space == "log":
            return jnp.log(value)
        if self.space == "logit":
            return self._logit(value)
        return value

    def _logit(self, value: Any) -> Any:
        """Return the logit of the position of a value between the bounds."""
        position = (value - self.low) / (self.high - self.low)
        return jnp.log(position) - jnp.log1p(-position)

    def value(self, x: jax.Array) -> jax.Array:
        """Return the value of a coordinate, clipped to the range."""
        if self.space == "logit":
            return self.low + (self.high - self.low) * jax.nn.sigmoid(x)
        low, high = self.bounds()
        inside = jax.lax.stop_gradient(jnp.clip(x, low, high))
        x = inside + (x - jax.lax.stop_gradient(x))  # straight-through: its derivative is one
        return jnp.exp(x) if self.space == "log" else x

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest coordinate."""
        if self.space == "log":
            return math.log(self.low), math.log(self.high)
        if self.space == "logit":
            return -LOGIT, LOGIT
        return self.low, self.high


LOGIT = 7.0  # 1 / (1 + exp(-7)) = 0.999
_REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD  # *args, **kwargs
DATA_ARGUMENTS = {"optimizer": 0, "objective": 2, "augment": 2}  # leading ones, such as inputs


def place(
    names: Iterable[str], functions: Mapping[str, Callable[..., Any] | None]
) -> dict[str, str]:
    """Return which function has each hyperparameter as an argument: {name: "optimizer"}.

    Args:
      names: of the hyperparameters.
      functions: by "optimizer", "objective" or "augment".

    Raises:
      ValueError: for a name that is an argument of none of them, with the arguments there are.
    """
    arguments = {
        what: numeric(function, DATA_ARGUMENTS[what])
        for what, function in functions.items()
        if function
    }
    return {name: _place(name, arguments) for name in names}


def check_required(optimizer: Callable[..., Any], names: Iterable[str]) -> None:
    """Raise ValueError if an optimizer has a required argument that is not among the names."""
    parameters = inspect.signature(optimizer).parameters.values()
    required = [p for p in parameters if p.default is inspect.Parameter.empty]
    missing = [p.name for p in required if p.kind not in _REST]
    missing = [name for name in missing if name not in names]
    if missing:
        raise ValueError(
            f"The optimizer needs {', '.join(missing)}, which is not learned. Fix it, such as by "
            f"`functools.partial(optax.adamw, {missing[0]}=...)`, or learn it."
        )


def numeric(function: Callable[..., Any], skipped: int = 0) -> list[str]:
    """Return the names of a function's numeric arguments, after the first `skipped` ones."""
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return [p.name for p in parameters if p.kind not in _REST and _is_numeric(p)]


def _is_numeric(parameter: inspect.Parameter) -> bool:
    """Say whether a number can be passed, by the default value or else by the annotation."""
    default, hint = parameter.default, str(parameter.annotation)
    if "mask" in parameter.name:
        return False
    if default is inspect.Parameter.empty or default is None:
        return any(word in hint for word in ("float", "Scalar", "Array", "Numeric", "_empty"))
    return isinstance(default, int | float) and not isinstance(default, bool)


def _place(name: str, arguments: Mapping[str, list[str]]) -> str:
    for what, names in arguments.items():
        if name in names:
            return what
    listed = "; ".join(
        f"the {what} has {', '.join(names) or 'none'}" for what, names in arguments.items()
    )
    hint = nearest(name, [name for names in arguments.values() for name in names])
    raise ValueError(f"No hyperparameter is called {name!r}.{hint} There are: {listed}.")
