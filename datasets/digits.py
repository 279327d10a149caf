"""Digits: a real few-shot problem that needs no download.

scikit-learn's 1,797 handwritten digits (8 x 8 pixels, about 180 of each), with every quarter turn
of a digit as a class of its own: 40 classes, of which an episode draws a few. Not a benchmark to
report, but real images on which a learner shows within a minute whether it learns: for tests,
examples and the first run after installing.

Held-out classes are held-out digits. A 6 upside down is a 9, so both are training digits: if one of
them were held out, its rotations would be in the training set. Some classes are close to each other
(0, 1 and 8 are similar upside down), so a perfect score is out of reach with `rotations=True`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metalearn._utils.checks import pick
from metalearn.datasets.class_index import ClassIndex, from_labels, rotate, select
from metalearn.datasets.reading import DamagedDatasetError, cache_dir, damaged, examples, source

DIGITS = {"train": (0, 1, 6, 8, 9), "validation": (2, 5), "test": (3, 4, 7)}


def digits(split: str = "train", *, rotations: bool = True) -> ClassIndex:
    """Read a split of the digits, preparing the TFDS dataset in the cache the first time.

    Args:
      split: "train" (digits 0, 1, 6, 8, 9), "validation" (2, 5) or "test" (3, 4, 7).
      rotations: four classes for each digit, one per quarter turn: 20, 8 and 12 classes instead
        of 5, 2 and 3.

    Returns:
      An index of examples [classes, 183, 8, 8, 1] uint8, 0 (paper) to 255 (ink); `counts`
      are 174 to 183.

    Raises:
      ValueError: if there is no such split.
      OSError: if the cache directory cannot be written to.
    """
    chosen = pick(DIGITS, split, "split")
    index = select(from_labels(*drawings()), chosen)
    return rotate(index) if rotations else index


def drawings() -> tuple[np.ndarray, np.ndarray]:
    """Return all digits: images [1797, 8, 8, 1] uint8, labels [1797] int32."""
    from metalearn.datasets import digits_builder

    root = cache_dir() / "tfds"
    try:
        return _read(digits_builder.prepared(root))
    except DamagedDatasetError as error:
        damaged(root / "sklearn_digits", str(error))
        digits_builder.discard(root)
        return _read(digits_builder.prepared(root))


def _read(builder: Any) -> tuple[np.ndarray, np.ndarray]:
    records = list(examples(source(builder, "train")))
    images = np.stack([record["image"] for record in records]).astype(np.uint16)
    labels = np.asarray([record["label"] for record in records], np.int32)
    return (images * 255 // 16).astype(np.uint8), labels
