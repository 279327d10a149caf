"""Examples ordered by class, on the host, from which few-shot episodes are drawn.

A few-shot task draws classes first and examples second, so the data has that order: one array
whose first axis is the class and whose second is the example. Classes of unequal size are padded
with zeros to the largest; `counts` are the numbers of real examples, which bound the sampler. In
uint8, all of Omniglot with its rotations (6,492 classes x 20 x 28 x 28) is 102 MB: it fits on any
device.

A `ClassIndex` of your own may hold features of any type, which episodes contain unchanged. Only
uint8 images are rescaled, to 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.datasets.arrays import one_array


class ClassIndex(NamedTuple):
    """Examples by class.

    examples: [classes, examples, ...], padding beyond the count of a class. uint8 are pixels of
      images, scaled to 0..1 in episodes; other types are unchanged.
    counts: [classes] int32, the number of real examples of each class.
    """

    examples: np.ndarray
    counts: np.ndarray


def from_labels(images: Any, labels: Any) -> ClassIndex:
    """Return labelled images ordered by class, in their original order within a class.

    Args:
      images: [n, ...] uint8; pictures keep their channel axis, [n, height, width, channels].
      labels: [n] integers or names, an array or a list; class c of the result is the c-th
        smallest label.

    Raises:
      ValueError: if the images are not uint8, or not as many as the labels.
      TypeError: if the labels are no integers and no names, or the images no array.
    """
    images = np.asarray(one_array("from_labels", "images", images, "[n, ...]"))
    labels = _labels(labels)
    if images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`from_labels` got images {images.dtype}{list(images.shape)} and labels of shape "
            f"{list(labels.shape)}, but an index holds uint8 images with one label each. Pass "
            f"images as uint8 [n, ...] (pixel values 0..255) and labels as [n]. Features of "
            f"another type: `ClassIndex(examples [classes, examples, ...], counts [classes])`."
        )
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(classes, kind="stable")
    starts = np.cumsum(counts) - counts
    position = np.arange(len(labels)) - np.repeat(starts, counts)
    shape = (len(counts), int(counts.max(initial=0)), *images.shape[1:])
    examples = np.zeros(shape, np.uint8)
    examples[classes[order], position] = images[order]
    return ClassIndex(examples, counts.astype(np.int32))


def _labels(values: Any) -> np.ndarray:
    """Return labels as an array; TypeError unless they are integers or names."""
    labels = np.asarray(values) if not isinstance(values, Mapping) else np.empty(0, object)
    if labels.dtype.kind in "biuUS":
        return labels
    raise TypeError(
        f"`from_labels` got labels of {labels.dtype} ({type(values).__name__}), but a label says "
        "which class an image is of: an integer, or a name. Pass labels [n] of int; "
        "`labels.astype(int)` where they are whole numbers, `labels.argmax(-1)` of one-hot ones."
    )


def select(index: ClassIndex, classes: Sequence[int] | np.ndarray) -> ClassIndex:
    """Return an index of some of the classes, in the order of `classes`."""
    chosen = np.asarray(classes, dtype=np.intp)
    return ClassIndex(np.asarray(index.examples)[chosen], np.asarray(index.counts)[chosen])


def rotate(index: ClassIndex) -> ClassIndex:
    """Return four classes for each, one per quarter turn (Santoro et al. 2016, arXiv:1605.06065).

    Class c rotated counter-clockwise by k * 90 degrees becomes class c + k * classes.

    Raises:
      ValueError: if the examples are not square images [height, width, channels].
    """
    shape = index.examples.shape
    if len(shape) != 5 or shape[2] != shape[3]:
        raise ValueError(
            f"`rotate` got examples of shape {list(shape[2:])}, but a quarter turn keeps the shape "
            f"of square images [size, size, channels] only. Crop or pad the images to a square "
            f"first, or leave the rotations out."
        )
    rotated = [np.rot90(index.examples, k, axes=(2, 3)) for k in range(4)]
    return ClassIndex(np.concatenate(rotated), np.tile(index.counts, 4))
