"""Folders of images by class, read into one array: data/train/CLASS/IMAGE.png or .jpg.

The name of a subfolder is the class of the images in it. All images of a folder become one array
[n, height, width, channels] of uint8, so they have one size, or are resized to one; and one number
of channels, 1 if every image is grey and 3 otherwise. JPEGs are turned as their EXIF says. The
transparency of a PNG is dropped, and files of other kinds are ignored.

Decoding is done once: the array is stored in the cache directory (METALEARN_CACHE, or
~/.cache/metalearn), under a digest of the names, sizes and times of all files and of the options.
It is in memory as a whole; images that do not fit are better decoded when they are needed, by a
source of `metalearn.datasets.HostFewShot`.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from metalearn._utils import strict_json
from metalearn._utils.checks import is_integer, pick
from metalearn._utils.counting import counted
from metalearn.datasets.class_index import ClassIndex, from_labels
from metalearn.datasets.reading import cached

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # the EXIF tag

Size = tuple[int, int]  # (height, width)
T = TypeVar("T")


class Folder(NamedTuple):
    """The images of a folder, on the host.

    images: [n, height, width, channels] uint8, ordered by class.
    labels: [n] int32, numbers of `classes`; None: there are no subfolders, so no labels.
    classes: the names of the subfolders, sorted.
    files: the path of each image in the folder.
    """

    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    files: tuple[str, ...]


def read_folder(
    folder: str | pathlib.Path,
    *,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    training: bool = True,
    progress: bool = True,
) -> Folder:
    """Read all images of a folder of folders, one per class, and cache them.

    Args:
      folder: with a subfolder for each class, of .png, .jpg and .jpeg files.
      size: (height, width) to resize all images to; None: as they are, all of one size.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); None: 1 if every image is grey, else 3.
      classes: the names of the subfolders to read, where the folder has others too; None: all.
      training: whether classes are told apart, which takes two. False: one will do, or a folder of
        images without subfolders, which have no labels.
      progress: show a progress bar while images are decoded.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it has too few classes, or not those of `classes`, one of them has no images,
        an image cannot be read, or the images have several sizes and none is asked for. The file
        is named.
    """
    if channels is not None:
        pick({str(count): count for count in MODES}, str(channels), "number of channels")
    wanted = None if size is None else _check_size(size)
    root = pathlib.Path(folder)
    files = _files(root, training, classes)
    names = tuple(name for name in files if name)
    paths = [path for images in files.values() for path in images]
    labels = np.repeat(np.arange(len(names)), [len(images) for images in files.values()])

    def read() -> np.ndarray:
        return _read(root, paths, wanted, channels, progress)

    images = cached(_cache_name(root, paths, wanted, channels), read, np.uint8)
    inside = tuple(path.relative_to(root).as_posix() for path in paths)
    return Folder(images, labels.astype(np.int32) if names else None, names, inside)


def image_folder(
    split: str = "train",
    *,
    train: str,
    validation: str,
    test: str,
    size: Sequence[int] | None = None,
    channels: int | None = None,
) -> ClassIndex:
    """Read the folder of a split: of images, in a subfolder for each class (`read_folder`).

    Args:
      split: "train", "validation" or "test".
      train: the folder of the classes to train on.
      validation: the folder of the classes to evaluate on during training.
      test: the folder of the classes to report.
      size: (height, width) to resize all images to; None: as they are, all of one size.
      channels: 1, 3 or 4; None: 1 if every image is grey, else 3. Set it where splits may differ.

    Returns:
      An index of examples [classes, examples, height, width, channels] uint8.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if there is no such split; and as `read_folder`.
    """
    folder = pick({"train": train, "validation": validation, "test": test}, split, "split")
    if not folder:
        raise ValueError(
            f"`image_folder` got no folder for its {split} split (dataset.{split}). Name one whose "
            "classes are in no other split: of which some classes are moved to a folder of their "
            "own, if all images are in one."
        )
    read = read_folder(folder, size=size, channels=channels)
    return from_labels(read.images, read.labels)


def _check_size(size: Any) -> Size:
    values = [*size] if isinstance(size, tuple | list) else [size]
    if len(values) != 2 or not all(is_integer(n) and n >= 1 for n in values):
        raise ValueError(
            f"`size={size!r}`: it is (height, width) in pixels, such as (84, 84), to which all "
            "images are resized."
        )
    return int(values[0]), int(values[1])


def _files(
    root: pathlib.Path, training: bool, chosen: Sequence[str] | None
) -> dict[str, list[pathlib.Path]]:
    """Return the sorted image files of each class, by its sorted names; "": of no class."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root} (looked for from {pathlib.Path.cwd()}). Name one with a "
            "subfolder of images for each class."
        )
    classes = [
        path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] not in "._"
    ]
    if chosen is not None:
        missing = sorted({*chosen} - {path.name for path in classes})
        if missing:
            raise ValueError(
                f"The folder {root} has no subfolder {missing[0]!r}, and `classes` names it"
                f"{f', as {len(missing) - 1} others that are not there' if missing[1:] else ''}. "
                "Leave it out, or name the folder that holds them all."
            )
        classes = [path for path in classes if path.name in {*chosen}]
    if not training and not classes:
        return {"": _images(root, "it is to be read")}
    if len(classes) < 2 and training:
        inside = f"one, {classes[0].name!r}" if classes else "none"
        raise ValueError(
            f"The folder {root} should have a subfolder of images for each class, at least two, "
            f"but has {inside}. Order the images by class: {root / 'CLASS' / 'IMAGE.png'}; or name "
            "the folder that holds those of the classes."
        )
    return {path.name: _images(path, "its name is that of a class") for path in classes}


def _images(folder: pathlib.Path, why: str) -> list[pathlib.Path]:
    """Return the sorted image files of a folder; ValueError if there are none."""
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(
            f"The folder {folder} has no image ({', '.join(SUFFIXES)}), but {why}. Put images into "
            "it, directly and not into folders inside it, or delete it."
        )
    return images


def _cache_name(
    root: pathlib.Path, paths: list[pathlib.Path], size: Size | None, channels: int | None
) -> str:
    """Return the name of the cached array: a digest of the files and of the options."""
    stats = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    described = strict_json.dumps({"files": stats, "size": size, "channels": channels})
    return f"folder-{hashlib.sha256(described.encode()).hexdigest()[:24]}"


def _read(
    root: pathlib.Path,
    paths: list[pathlib.Path],
    size: Size | None,
    channels: int | None,
    progress: bool,
) -> np.ndarray:
    """Return the images [n, height, width, channels] uint8."""
    headers = list(_on_threads(_header, paths))
    if channels is None:
        channels = 1 if all(mode in GREY for mode, _ in headers) else 3
    if size is None:
        size = headers[0][1]
        for path, (_, other) in zip(paths, headers, strict=True):
            if other != size:
                raise ValueError(
                    f"The images of {root} have several sizes: {paths[0]} is {_shown(size)} and "
                    f"{path} is {_shown(other)} (height x width), but they become one array. Pass "
                    f"size=({size[0]}, {size[1]}) or another to resize all of them."
                )
    images = np.empty((len(paths), *size, channels), np.uint8)
    mode = MODES[channels]

    def decode(number: int) -> None:
        images[number] = _decoded(paths[number], mode, size).reshape(images.shape[1:])

    done = _on_threads(decode, range(len(paths)))
    for _ in counted(done, len(paths), "image", f"reading {root}", progress):
        pass
    return images


def _on_threads(function: Callable[[Any], T], values: Iterable[Any]) -> Iterable[T]:
    """Map in threads, in order; Pillow decodes without Python's lock."""
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        yield from pool.map(function, values)
    finally:
        pool.shutdown(cancel_futures=True)


def _header(path: pathlib.Path) -> tuple[str, Size]:
    """Return the mode and the upright size of an image, which is not decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if mode not in (*GREY, *COLOUR):
        raise ValueError(
            f"The image {path} has pixels of Pillow's mode {mode!r}, which do not fit into 8 bits. "
            "Save it with 8 bits a channel, or pass arrays to `FewShot.from_arrays`."
        )
    return mode, (width, height) if turned else (height, width)


def _decoded(path: pathlib.Path, mode: str, size: Size) -> np.ndarray:
    """Return the pixels of an image, upright: [height, width] or [height, width, channels]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as stored:
            image = ImageOps.exif_transpose(stored)
            if "transparency" in image.info:  # of a palette: Pillow converts it by way of RGBA
                image = image.convert("RGBA")
            image = image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return ValueError(
        f"The image {path} cannot be read ({reason}). It is damaged, or no image: replace it or "
        "delete it."
    )


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
