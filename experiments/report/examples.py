"""Examples of a dataset on a page of HTML, as what they are: images, texts, or numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from metalearn.experiments.report.page import escaped

LONGEST = 400  # characters of a text or of a list of numbers
STYLE = (
    "display:inline-block;vertical-align:top;margin:0 .5rem .5rem 0;max-width:24rem;"
    "font-size:.85rem;color:#555"
)


def cards(examples: Sequence[tuple[Any, str]]) -> str:
    """Return examples side by side, each (input, caption), as HTML."""
    if not examples:
        return '<p class="note">None.</p>'
    each = (
        f'<figure class="card" style="{STYLE}">{content(value)}'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
        for value, caption in examples
    )
    return f"<div>{''.join(each)}</div>"


def content(value: Any) -> str:
    """Return one input as HTML: an image [h, w] or [h, w, c], bytes of a text [S], or numbers."""
    array = np.asarray(value)
    if is_image(array):
        data = base64.b64encode(png(array)).decode()
        return (
            f'<img alt="" style="width:5rem;image-rendering:pixelated" '
            f'src="data:image/png;base64,{data}">'
        )
    if array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() < 256:
        text = bytes(array.astype(np.uint8)).decode("utf-8", "replace")
    else:
        text = np.array2string(array, precision=3, threshold=60, max_line_width=60)
    cut = text[:LONGEST] + (" ..." if len(text) > LONGEST else "")
    return f"<pre>{escaped(cut)}</pre>"


def is_image(array: np.ndarray) -> bool:
    """Return whether an input is drawn as an image."""
    return array.ndim == 3 and array.shape[-1] in (1, 3, 4) and min(array.shape[:2]) > 1


def png(image: np.ndarray) -> bytes:
    """Return an image [h, w, c] as a PNG: uint8, or floats from their least to their largest."""
    from PIL import Image

    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = np.asarray((image - low) / max(high - low, 1e-12) * 255, np.uint8)
    drawn = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(drawn, "PNG")
    return drawn.getvalue()


def label(target: Any) -> str:
    """Return a target in a few characters."""
    array = np.asarray(target)
    return f"{array.item():g}" if not array.ndim else f"{[*array.shape]}"
