"""A mean over seeds, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t at 97.5%, by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean with its 95% interval; the median where a value is not finite, or huge."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    if not all(abs(value) < 1e3 for value in values):
        return f"{statistics.median(values):.3g} (median)"
    width = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} +- {width:.{digits}f}"
