"""CIFAR-FS and FC100: the classes of CIFAR-100, 32 x 32 in colour, divided for few-shot learning.

| dataset | train | validation | test | divided by |
|---|---|---|---|---|
| CIFAR-FS, Bertinetto et al. 2019, arXiv:1805.08136 | 64 | 16 | 20 | class, at random |
| FC100, Oreshkin et al. 2018, arXiv:1805.10123 | 60 | 20 | 20 | superclass: 12, 4 and 4 of them |

A split has all images of its classes, of the training and the test images of CIFAR-100: 600 each.
The lists are those of tristandeleu/pytorch-meta (MIT licence), with the names of TFDS.
"""

from __future__ import annotations

import importlib.resources
import io
from typing import Any

import numpy as np

from metalearn._utils import strict_json
from metalearn._utils.checks import pick
from metalearn.datasets.class_index import ClassIndex, from_labels
from metalearn.datasets.reading import builder_of, check_prepared, examples, source

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # their names in the lists


def cifar_fs(split: str = "train", *, data_dir: str | None = None) -> ClassIndex:
    """Read a split of CIFAR-FS from TFDS's cifar100.

    Args:
      split: "train" (64 classes), "validation" (16) or "test" (20).
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Returns:
      An index of examples [classes, 600, 32, 32, 3] uint8.

    Raises:
      DatasetNotPreparedError: if TFDS's cifar100 is missing, with the command that prepares it.
      ValueError: if there is no such split.
    """
    return _read("cifar_fs", "label", split, data_dir)


def fc100(split: str = "train", *, data_dir: str | None = None) -> ClassIndex:
    """Read a split of FC100 from TFDS's cifar100.

    Args:
      split: "train" (60 classes of 12 superclasses), "validation" (20 of 4) or "test" (20 of 4).
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Returns:
      An index of examples [classes, 600, 32, 32, 3] uint8.

    Raises:
      DatasetNotPreparedError: if TFDS's cifar100 is missing, with the command that prepares it.
      ValueError: if there is no such split.
    """
    return _read("fc100", "coarse_label", split, data_dir)


def class_names(dataset: str, split: str) -> list[str]:
    """Return the classes of a split of "cifar_fs", or the superclasses of one of "fc100"."""
    lists = importlib.resources.files("metalearn.datasets") / f"{dataset}.json"
    return strict_json.loads(lists.read_text())[pick(SPLITS, split, "split")]


def _read(dataset: str, feature: str, split: str, data_dir: str | None) -> ClassIndex:
    """Return the images whose `feature` is in the list of a split, by their class."""
    names = class_names(dataset, split)
    builder = builder_of("cifar100", data_dir)
    check_prepared(builder)
    numbers = {builder.info.features[feature].str2int(name) for name in names}
    images, labels = [], []
    for part in ("train", "test"):
        for record in examples(source(builder, part, undecoded=["image"])):
            if int(record[feature]) in numbers:
                images.append(_decoded(record["image"]))
                labels.append(int(record["label"]))
    return from_labels(np.stack(images), np.asarray(labels))


def _decoded(png: Any) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
