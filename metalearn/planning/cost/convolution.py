"""How many multiplications a convolution takes: padding and dilation take none.

The gradient of a strided convolution is one over an input spread out with zeros. A
count of outputs times kernel would charge for every zero; counted by the pairs that
meet, a convolution and its two gradients cost the same, as they should.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """One spatial axis of a convolution."""

    inputs: int
    kernel: int
    outputs: int
    stride: int = 1
    low: int = 0  # padding before the first input
    input_dilation: int = 1
    kernel_dilation: int = 1

    def pairs(self) -> int:
        """Return the number of (output, kernel) positions that meet an input."""
        starts = np.arange(self.outputs)[:, None] * self.stride - self.low
        at = starts + np.arange(self.kernel) * self.kernel_dilation
        inside = (at >= 0) & (at <= (self.inputs - 1) * self.input_dilation)
        return int((inside & (at % self.input_dilation == 0)).sum())


def flops(batch: int, features: int, summed: int, windows: Iterable[Window]) -> int:
    """Return 2 x multiplications.

    Args:
      batch: of the output.
      features: of the output.
      summed: input features that each output sums over (of its own group).
      windows: one for each spatial axis.
    """
    count = 2 * batch * features * summed
    for window in windows:
        count *= window.pairs()
    return count
