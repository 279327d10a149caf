"""Examples ordered by class, on the host: what few-shot episodes are drawn from.

A few-shot task picks classes first and examples second, so the data is stored that
way round: one array whose first axis is the class and whose second is the example.
Classes of unequal size are padded with zeros to the largest, and `counts` says how
many examples are real; a sampler never reaches past it. In uint8, all of Omniglot
with its rotations (6,492 classes x 20 x 28 x 28) is 102 MB: it fits on any device.

An index that is made by hand may hold anything else: features of any type, which episodes have
as they are. Images of uint8 alone are rescaled, to 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.datasets.arrays import one_array


class ClassIndex(NamedTuple):
    """Examples by class."""

    # [classes, examples, ...], anything past a class's count. uint8 are the pixels of images,
    # which an episode has as 0..1; other types it has as they are.
    examples: np.ndarray
    counts: np.ndarray  # [classes] int32: real examples of each class


def from_labels(images: Any, labels: Any) -> ClassIndex:
    """Order labelled images by class, keeping their order within a class.

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


def _labels(given: Any) -> np.ndarray:
    """Return labels as an array; TypeError unless they are integers or names."""
    labels = np.asarray(given) if not isinstance(given, Mapping) else np.empty(0, object)
    if labels.dtype.kind in "biuUS":
        return labels
    raise TypeError(
        f"`from_labels` got labels of {labels.dtype} ({type(given).__name__}), but a label says "
        "which class an image is of: an integer, or a name. Pass labels [n] of int; "
        "`labels.astype(int)` where they are whole numbers, `labels.argmax(-1)` of one-hot ones."
    )


def select(index: ClassIndex, classes: Sequence[int] | np.ndarray) -> ClassIndex:
    """Keep the given classes, in the order given."""
    chosen = np.asarray(classes, dtype=np.intp)
    return ClassIndex(np.asarray(index.examples)[chosen], np.asarray(index.counts)[chosen])


def rotate(index: ClassIndex) -> ClassIndex:
    """Make four classes of each, one per quarter turn (Santoro et al. 2016, arXiv:1605.06065).

    Class c turned counter-clockwise by k * 90 degrees becomes class c + k * classes.

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
    turned = [np.rot90(index.examples, k, axes=(2, 3)) for k in range(4)]
    return ClassIndex(np.concatenate(turned), np.tile(index.counts, 4))
