"""Examples ordered by class, on the host, from which few-shot episodes are drawn.

A few-shot task draws classes first and examples second, so the data has that order: one array
whose first axis is the class and whose second is the example. Classes of unequal size are padded
with zeros to the largest; `counts` are the numbers of real examples, which bound the sampler. In
uint8, all of Omniglot with its rotations (6,492 classes x 20 x 28 x 28) is 102 MB: it fits on any
device.

Examples may be of any type, and of one array or several (a dictionary or another pytree). Episodes
contain them unchanged; only uint8 images are rescaled, to 0..1 (`metalearn._utils.pixels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn.datasets.arrays import arrays, map_arrays, rows_of


class ClassIndex(NamedTuple):
    """Examples by class.

    examples: [classes, examples, ...], or a pytree of such arrays; padding beyond the count of a
      class. uint8 are pixels of images, scaled to 0..1 in episodes; other types are unchanged.
    counts: [classes] int32, the number of real examples of each class.
    """

    examples: Any
    counts: np.ndarray


def from_labels(inputs: Any, labels: Any) -> ClassIndex:
    """Return labelled examples ordered by class, in their original order within a class.

    Args:
      inputs: [n, ...] of any numbers: an array, a list, or a dictionary or another pytree of them.
        Types are unchanged. Pictures keep their channel axis, [n, height, width, channels].
      labels: [n] integers or names, an array or a list; class c of the result is the c-th
        smallest label.

    Raises:
      ValueError: if there are not as many inputs as labels.
      TypeError: if the labels are no integers and no names, or the inputs no arrays.
    """
    inputs, _, classes = labelled("from_labels", inputs, labels)
    counts = np.bincount(classes)
    order = np.argsort(classes, kind="stable")
    starts = np.cumsum(counts) - counts
    position = np.arange(len(classes)) - np.repeat(starts, counts)

    def by_class(leaf: np.ndarray) -> np.ndarray:
        shape = (len(counts), int(counts.max(initial=0)), *leaf.shape[1:])
        examples = np.zeros(shape, leaf.dtype)
        examples[classes[order], position] = leaf[order]
        return examples

    return ClassIndex(map_arrays(by_class, inputs), counts.astype(np.int32))


def labelled(what: str, inputs: Any, labels: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return (inputs [n, ...], names [classes], classes [n]), a label for each example.

    Args:
      what: the function, as its user writes it, for messages.
      inputs: of the examples; see `from_labels`.
      labels: of the examples.

    Raises:
      ValueError: if lengths differ.
      TypeError: if the labels are no integers and no names, or the inputs no arrays.
    """
    inputs = arrays(what, "inputs", inputs, "[n, ...]")
    labels = label_array(what, labels)
    n = rows_of(what, "inputs", inputs)
    if labels.shape != (n,):
        one_hot = " Labels that are one-hot: `labels.argmax(-1)`." if labels.ndim == 2 else ""
        raise ValueError(
            f"`{what}` got {n} inputs and labels of shape {list(labels.shape)}, but every example "
            f"has one label: pass inputs [n, ...] and labels [n].{one_hot}"
        )
    names, classes = np.unique(labels, return_inverse=True)
    return inputs, names, classes


def label_array(what: str, values: Any) -> np.ndarray:
    """Return labels as an array; TypeError unless they are integers or names."""
    labels = np.asarray(values) if not isinstance(values, Mapping) else np.empty(0, object)
    if labels.dtype.kind in "biuUS":
        return labels
    raise TypeError(
        f"`{what}` got labels of {labels.dtype} ({type(values).__name__}), but a label says "
        "which class an example is of: an integer, or a name. Pass labels [n] of int; "
        "`labels.astype(int)` where they are whole numbers, `labels.argmax(-1)` of one-hot ones."
    )


def select(index: ClassIndex, classes: Sequence[int] | np.ndarray) -> ClassIndex:
    """Return an index of some of the classes, in the order of `classes`."""
    chosen = np.asarray(classes, dtype=np.intp)
    examples = map_arrays(lambda leaf: leaf[chosen], index.examples)
    return ClassIndex(examples, np.asarray(index.counts)[chosen])


def rotate(index: ClassIndex) -> ClassIndex:
    """Return four classes for each, one per quarter turn (Santoro et al. 2016, arXiv:1605.06065).

    Class c rotated counter-clockwise by k * 90 degrees becomes class c + k * classes.

    Raises:
      ValueError: if the examples are not square images [height, width, channels].
    """
    several = isinstance(index.examples, Mapping | tuple)
    shape: tuple[int, ...] = () if several else np.shape(index.examples)
    if len(shape) != 5 or shape[2] != shape[3]:
        raise ValueError(
            f"`rotate` got examples of shape {list(shape[2:])}, but a quarter turn keeps the shape "
            f"of square images [size, size, channels] only. Crop or pad the images to a square "
            f"first, or leave the rotations out."
        )
    rotated = [np.rot90(index.examples, k, axes=(2, 3)) for k in range(4)]
    return ClassIndex(np.concatenate(rotated), np.tile(index.counts, 4))
