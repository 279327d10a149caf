"""Image-classification datasets as a whole, for training runs.

`read_images` returns all images of a split with their labels, [n, h, w, c] uint8, and
`TrainingRuns` is a distribution over training runs on them:

    images = read_images("mnist", "train")
    tasks = TrainingRuns.create(*images, validation=0.1)

Any TFDS dataset with the features "image" (all of one size) and "label" can be read. PNGs are
decoded by Pillow from the stored bytes, in half the time of TFDS's own decoding: MNIST's
60,000 take 4 seconds. The name "digits" is scikit-learn's dataset, which needs no network.

With a share of wrong labels (`with_label_noise`), the best regularisation and the harmful examples
are known (Zhang et al. 2017, arXiv:1611.03530).
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from metalearn._utils.checks import at_least, pick
from metalearn.datasets.digits import drawings
from metalearn.datasets.reading import examples, open_source

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
SUFFIXES = (".png", ".jpg", ".jpeg")
DIGITS_TRAIN = 1300  # the other 497 are the test split


class Images(NamedTuple):
    """Images with their labels, on the host.

    inputs: [n, h, w, c] uint8.
    labels: [n] int32.
    """

    inputs: np.ndarray
    labels: np.ndarray


def read_images(name: str, split: str = "train", *, data_dir: str | None = None) -> Images:
    """Read a split of an image-classification dataset.

    Args:
      name: the dataset's name in TFDS, such as "mnist", "fashion_mnist" or "cifar10"; or
        "digits", scikit-learn's.
      split: a split or slice of one, such as "train" or "train[:5000]"; of "digits",
        "train" (1,300) or "test" (497).
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets. "digits" are in the cache directory instead.

    Raises:
      DatasetNotPreparedError: if the dataset is missing, with the command that prepares it.
      ValueError: if there is no such split of "digits", or the dataset has no images of
        one size with one label each.
    """
    if name == "digits":
        return _digits(split)
    records: Any = open_source(name, split, data_dir=data_dir)
    _check(name, records.dataset_info.features)
    image = records.dataset_info.features["image"]
    stored, decode = _decoder(image)
    records = open_source(name, split, data_dir=data_dir, undecoded=stored)
    inputs = np.empty((len(records), *image.shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for i, record in enumerate(examples(records)):
        inputs[i], labels[i] = decode(record["image"]), record["label"]
    return Images(inputs, labels)


class Folder(NamedTuple):
    """The images of a folder, on the host.

    inputs: [n, h, w, c] uint8.
    labels: [n] int32, the class of each; None: they are not by class.
    classes: the names of the classes, in the order of their labels.
    files: the path of each image in the folder.
    """

    inputs: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    files: tuple[str, ...]


def read_folder(folder: pathlib.Path, channels: int | None = None) -> Folder:
    """Read a folder of PNG and JPEG images, in the order of their names.

    If it has folders in it, each is a class, named like the folder; or else it holds the images.

    Args:
      folder: its path.
      channels: 1 (grey), 3 (colour) or 4 (and alpha), to which images are converted; None: grey
        images to 1, others to 3.

    Raises:
      ValueError: if there are no images, one cannot be read, or their sizes differ.
    """
    places = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = tuple(place.name for place in places)
    paths: list[pathlib.Path] = []
    for place in places or [folder]:
        images_of = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
        if not images_of:
            raise ValueError(
                f"The folder {place} holds no images ({', '.join(SUFFIXES)}). Put the images of a "
                "class into a folder of its name, and leave no empty folder among them."
            )
        paths += images_of
    images = [_image(path, channels) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{path} is an image {list(image.shape)}, and {paths[0]} is {list(images[0].shape)}"
                ": the images of a folder are of one size. Crop or resize them."
            )
    files = tuple(path.relative_to(folder).as_posix() for path in paths)
    if not classes:
        return Folder(np.stack(images), None, (), files)
    labels = np.array([classes.index(path.parent.name) for path in paths], np.int32)
    return Folder(np.stack(images), labels, classes, files)


def _image(path: pathlib.Path, channels: int | None) -> np.ndarray:
    """Return the pixels [h, w, c] uint8 of an image file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of mode {image.mode}, and not of 8 bits")
            mode = MODES[channels or (1 if image.mode in ("1", "L") else 3)]
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}). Mend it, or take it out of the folder."
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def with_label_noise(
    images: Images, share: float, seed: int, *, classes: int | None = None
) -> Images:
    """Return images with a share of the labels replaced by another class, drawn uniformly.

    Args:
      images: n images, which are not copied.
      share: of the labels to replace, in 0..1: exactly round(share * n) of them.
      seed: of the random draws.
      classes: the number of classes; None: the largest label plus one.

    Raises:
      ValueError: if the share is not in 0..1, or there is no other class.
    """
    at_least("with_label_noise", 0, seed=seed)
    labels = np.asarray(images.labels)
    count = int(labels.max(initial=-1)) + 1 if classes is None else classes
    _check_noise(labels, share, count)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
    noisy = labels.copy()
    # Adding 1 .. count - 1 modulo count never gives the same class.
    noisy[rows] = (labels[rows] + rng.integers(1, count, len(rows))) % count
    return Images(images.inputs, noisy)


def _digits(split: str) -> Images:
    inputs, labels = drawings()
    order = np.random.default_rng(0).permutation(len(labels))
    rows = {"train": order[:DIGITS_TRAIN], "test": order[DIGITS_TRAIN:]}
    chosen = pick(rows, split, "split of the digits")
    return Images(inputs[chosen], labels[chosen])


def _decoder(image: Any) -> tuple[list[str], Callable[[Any], np.ndarray]]:
    """Return (features to read undecoded, a decoder from a stored image to pixels [h, w, c])."""
    import tensorflow_datasets as tfds

    if not isinstance(image, tfds.features.Image):
        return [], np.asarray
    from PIL import Image

    mode = MODES[image.shape[-1]]

    def decode(stored: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(stored)).convert(mode)).reshape(image.shape)

    return ["image"], decode


def _check(name: str, features: Mapping[str, Any]) -> None:
    """Raise ValueError unless every record is one uint8 image of one size, and one label."""
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"The dataset {name!r} is not one of labelled images: `read_images` reads the features "
            f"'image' and 'label', and it has {', '.join(sorted(features))}. Read it with "
            f"`open_source` and make `Images(inputs, labels)` of what it holds."
        )
    image, label = features["image"], features["label"]
    kind = np.dtype(image.np_dtype)
    fixed = len(image.shape) == 3 and None not in image.shape and image.shape[-1] in MODES
    if not fixed or kind != np.uint8 or label.shape != ():
        raise ValueError(
            f"The dataset {name!r} has images {kind}{list(image.shape)} with labels of shape "
            f"{list(label.shape)}, but `read_images` makes one array of uint8 images, all of one "
            f"size [h, w, c] with 1, 3 or 4 channels, with one label each. Read it with "
            f"`open_source`, resize, and make `Images(inputs, labels)` of it."
        )


def _check_noise(labels: np.ndarray, share: float, classes: int) -> None:
    if not 0 <= share <= 1:
        raise ValueError(
            f"`with_label_noise` got share={share}, but a share of the labels is between 0 and 1. "
            f"Pass 0.25 for a quarter of them."
        )
    if classes < 2 or (labels.size and not 0 <= labels.min() <= labels.max() < classes):
        kind = f"from {labels.min()} to {labels.max()}" if labels.size else "none"
        raise ValueError(
            f"`with_label_noise` got labels {kind} with classes={classes}, but a wrong label is "
            f"another of at least two classes, 0 .. classes - 1. Pass classes=, the number of all."
        )
