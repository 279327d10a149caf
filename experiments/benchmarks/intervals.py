"""A mean over seeds, and how sure it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from metalearn._utils.intervals import half_width


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean with its 95% interval; the median where a value is not finite, or huge."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    if not all(abs(value) < 1e3 for value in values):
        return f"{statistics.median(values):.3g} (median)"
    return f"{statistics.mean(values):.{digits}f} +- {half_width(values):.{digits}f}"
