"""mini-ImageNet: 100 classes of ImageNet, 84 x 84 in colour, from a folder of the user's own.

64 classes to train on, 16 for validation and 20 to test, by the split of Ravi and Larochelle 2017
("Optimization as a model for few-shot learning", ICLR), which the literature uses; Vinyals et al.
2016 (arXiv:1606.04080) took 600 images of each class. ImageNet's licence lets nobody pass its
images on, so they come from a folder in one of two forms, a class being a folder that is named by
its WordNet number:

    FOLDER/n01532829/IMAGE.jpg         all classes side by side; others are left out
    FOLDER/train/n01532829/IMAGE.jpg   and FOLDER/val (or validation), FOLDER/test

What decides the split is the list of classes, not the folder. The benchmark's files have 600 images
of each class, and ImageNet's own folders about 1,300, which make another, easier benchmark.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from metalearn._utils.checks import pick
from metalearn.datasets.cifar_few_shot import class_names
from metalearn.datasets.class_index import ClassIndex, from_labels
from metalearn.datasets.folders import read_folder

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def mini_imagenet(
    split: str = "train", *, folder: str, size: Sequence[int] = (84, 84)
) -> ClassIndex:
    """Read a split of mini-ImageNet from a folder of images by class.

    Args:
      split: "train" (64 classes), "validation" (16) or "test" (20).
      folder: which holds the folders of the classes, or folders train, val and test of them.
      size: (height, width) to which all images are resized; they are cached at that size.

    Returns:
      An index of examples [classes, examples, height, width, 3] uint8; the published images are 600
      of each class. At 84 x 84 the classes to train on are then 813 MB.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if there is no such split, or classes of it are missing; and as `read_folder`.
    """
    inside = pick(FOLDERS, split, "split")
    if not folder:
        raise ValueError(
            "`mini_imagenet` got no folder (dataset.folder). Name the one with a folder of images "
            "for each class, FOLDER/n01532829/IMAGE.jpg."
        )
    root = pathlib.Path(folder)
    root = next((root / name for name in inside if (root / name).is_dir()), root)
    names = class_names("mini_imagenet", split)
    missing = [name for name in names if not (root / name).is_dir()]
    if missing and root.is_dir():
        raise ValueError(
            f"The folder {root} has no folder for {len(missing)} of the {len(names)} classes in "
            f"the {split} split of mini-ImageNet, such as {missing[0]}. A class is a folder named "
            "by its WordNet number. For other classes, or another split, take the dataset "
            "'image_folder'."
        )
    read = read_folder(root, size=size, channels=3, classes=names)
    return from_labels(read.images, read.labels)
