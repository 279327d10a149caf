"""The FLOPs of a convolution, without the zeros of padding and dilation.

The gradient of a strided convolution is a convolution over an input dilated with zeros. Outputs
times kernel would count every zero. Counting only the pairs of a kernel entry and an input entry,
a convolution and its two gradients have the same FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """One spatial axis of a convolution.

    Args:
      inputs: size of the input.
      kernel: size of the kernel.
      outputs: size of the output.
      stride: of the window.
      low: padding before the first input.
      input_dilation: 1: none.
      kernel_dilation: 1: none.
    """

    inputs: int
    kernel: int
    outputs: int
    stride: int = 1
    low: int = 0
    input_dilation: int = 1
    kernel_dilation: int = 1

    def pairs(self) -> int:
        """Return the number of (output, kernel) positions that read an input."""
        starts = np.arange(self.outputs)[:, None] * self.stride - self.low
        at = starts + np.arange(self.kernel) * self.kernel_dilation
        inside = (at >= 0) & (at <= (self.inputs - 1) * self.input_dilation)
        return int((inside & (at % self.input_dilation == 0)).sum())


def flops(batch: int, features: int, summed: int, windows: Iterable[Window]) -> int:
    """Return 2 x multiplications.

    Args:
      batch: size of the output's batch axis.
      features: size of the output's feature axis.
      summed: input features that each output sums over (those of its group).
      windows: one for each spatial axis.
    """
    count = 2 * batch * features * summed
    for window in windows:
        count *= window.pairs()
    return count
