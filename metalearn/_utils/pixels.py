"""Which inputs are pixels: uint8 images are rescaled to 0..1, and nothing else is.

Images are stored as uint8, and a network expects them between 0 and 1. Bytes of text and other
small integers are uint8 too, and must not be rescaled: they are indices of an embedding. The shape
of an example distinguishes the two: an image has a height and a width.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def are_pixels(what: str, dtype: Any, example: tuple[int, ...]) -> bool:
    """Return whether inputs are to be divided by 255: uint8 images.

    Args:
      what: reads them, for the message.
      dtype: of the inputs.
      example: the shape of one example.

    Raises:
      ValueError: for ambiguous inputs: uint8 without a height and a width.
    """
    if np.dtype(dtype) != np.uint8:
        return False
    if len(example) >= 2:
        return True
    raise ValueError(
        f"{what} got uint8 inputs, an example of which has the shape {list(example)}. uint8 is "
        "read as pixels and divided by 255, but these are no images [height, width, ...]. Tokens "
        "and other integers stay what they are as int32: pass `inputs.astype(np.int32)`. Pixels "
        "in a row: reshape them to [n, height, width, channels], or pass them as "
        "`inputs.astype(np.float32) / 255`."
    )
