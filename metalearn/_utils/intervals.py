"""Means over tasks with their confidence intervals."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over tasks and its confidence interval.

    Args:
      mean: over the tasks.
      ci95: half-width of the 95% interval, by Student's t (`half_width`); nan for a single task.
      tasks: how many; where some are left out, the others.
    """

    mean: float
    ci95: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.ci95:.4f}"


def half_width(values: Any) -> Any:
    """Return the half-width of the 95% confidence interval of a mean over n values.

    It is t_{n-1} s / sqrt(n) with Student's t, whose quantile is 12.71 at n=2, 2.26 at n=10 and
    1.96 in the limit: the normal one, which is right for a known variance, is too narrow.

    Args:
      values: [n, ...]; the interval is over the leading axis.

    Returns:
      float64 [...]; nan if n is 1: one value gives no estimate of the variance.
    """
    from scipy.special import stdtrit  # a dependency of jax, imported where it is needed

    values = np.asarray(values, np.float64)
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], math.nan)[()]
    with np.errstate(invalid="ignore", over="ignore"):  # the spread of infinite values is nan
        return stdtrit(n - 1, 0.975) * values.std(0, ddof=1) / math.sqrt(n)


def interval(values: np.ndarray) -> Estimate:
    """Return the mean of values [n] with its interval; both NaN if n is 0."""
    mean = values.astype(np.float64).mean() if len(values) else math.nan
    return Estimate(float(mean), float(half_width(values)), len(values))
