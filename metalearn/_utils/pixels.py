"""Which inputs are pixels: images of uint8 are read as 0..1, and nothing else is rescaled.

uint8 is how images are stored, and a network wants them between 0 and 1. It is also how bytes of
text and other small integers come, which are no amounts of light: an embedding looks them up.
The two are told apart by the shape of an example: an image has a height and a width.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def are_pixels(what: str, dtype: Any, example: tuple[int, ...]) -> bool:
    """Say whether inputs are to be divided by 255: uint8 images.

    Args:
      what: who reads them, for the message.
      dtype: of the inputs.
      example: the shape of one.

    Raises:
      ValueError: of uint8 that may be pixels and may be integers: without a height and a width.
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
