"""A hyperparameter that is learned: where it starts, how far it may go, how it is shared.

What is learned is a coordinate x, and the space says what it stands for:

    "raw"     value = x
    "log"     value = exp(x)                                positive, over orders of magnitude
    "logit"   value = low + (high - low) / (1 + exp(-x))    strictly between its bounds

A value is kept in its range; its derivative passes at the bounds, so that it can come back.
`metalearn.algorithms.in_ranges` keeps x itself from running away behind them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields
from metalearn.algorithms.fds.windows import Windows, check_windows

SPACES = {
    "raw": "the value itself",
    "log": "its logarithm",
    "logit": "the logit of its place between its bounds",
}


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter, in values except where "coordinate" is said."""

    low: float
    high: float
    start: float | tuple[float, ...] = 0.0  # of every window, or one for each
    windows: Windows = 1
    space: str = "raw"
    shape: tuple[int, ...] = ()  # of one value, such as (classes,)

    def __post_init__(self) -> None:
        check_windows(self.windows)
        check_fields(self, "windows", "shape")
        pick(SPACES, self.space, "space")
        if not isinstance(self.shape, tuple) or not all(map(is_integer, self.shape)):
            raise ValueError(
                "The shape of a hyperparameter is a tuple of sizes, such as (classes,), not "
                f"{self.shape!r:.80}."
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
                f'space="log" holds positive values alone, not low={self.low} and '
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
        """Return x for a value."""
        if self.space == "log":
            return jnp.log(value)
        if self.space == "logit":
            return self._logit(value)
        return value

    def _logit(self, value: Any) -> Any:
        place = (value - self.low) / (self.high - self.low)
        return jnp.log(place) - jnp.log1p(-place)

    def value(self, x: jax.Array) -> jax.Array:
        """Return the value that a coordinate stands for, in the range."""
        if self.space == "logit":
            return self.low + (self.high - self.low) * jax.nn.sigmoid(x)
        low, high = self.bounds()
        inside = jax.lax.stop_gradient(jnp.clip(x, low, high))
        x = inside + (x - jax.lax.stop_gradient(x))  # a derivative of one, everywhere
        return jnp.exp(x) if self.space == "log" else x

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest coordinate."""
        if self.space == "log":
            return math.log(self.low), math.log(self.high)
        if self.space == "logit":
            return -LOGIT, LOGIT
        return self.low, self.high


LOGIT = 7.0  # 1 / (1 + exp(-7)) = 0.999
