"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each.

The classic benchmark of few-shot learning (Lake et al. 2015, Science 350, 1332-1338). The drawings
are black on white, 105 x 105, one bit per pixel; as usual they are resized to 28 x 28 with
ink = 255 and paper = 0, and every quarter turn of a character is a character of its own
(Santoro et al. 2016, arXiv:1605.06065).

MAML's code also resizes with Pillow's LANCZOS, but the one-bit image, for which Pillow silently
uses the nearest pixel and breaks thin strokes. Here the grey image is resized.

Two partitions of the characters are in use; scores are comparable only within one:

| partition | train | validation | test | held out |
|---|---|---|---|---|
| vinyals | 1,028 | 172 | 423 | alphabets; Vinyals et al. 2016, arXiv:1606.04080 |
| maml | 1,100 | 100 | 423 | characters; Finn et al. 2017, arXiv:1703.03400 |

The lists of vinyals are those of tristandeleu/pytorch-meta (MIT licence): 33, 5 and 13
alphabets, of which train and test share one, Gurmukhi, but no character. MAML's partition depends
on the order in which a file system listed folders, so ours has its sizes and a fixed seed.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from typing import Any

import numpy as np

from metalearn._utils import strict_json
from metalearn._utils.checks import pick
from metalearn.datasets.class_index import ClassIndex, from_labels, rotate, select
from metalearn.datasets.reading import builder_of, cached, check_prepared, examples, source

SIZE = 28  # pixels a side
CHARACTERS = 1623
DRAWINGS = 20  # per character


def omniglot(
    split: str = "train",
    *,
    partition: str = "vinyals",
    rotations: bool = True,
    data_dir: str | None = None,
) -> ClassIndex:
    """Read a split of Omniglot, and cache it.

    Args:
      split: "train", "validation" or "test". No character is in two of them.
      partition: "vinyals" or "maml".
      rotations: four classes for each character, one per quarter turn.
      data_dir: the directory of datasets; None is TFDS's default, $TFDS_DATA_DIR or
        ~/tensorflow_datasets.

    Returns:
      An index of examples [classes, 20, 28, 28, 1] uint8, ink = 255, paper = 0.

    Raises:
      DatasetNotPreparedError: if TFDS's omniglot is missing, with the command that prepares it.
      DamagedDatasetError: if a file is missing, cannot be read, or names code outside TFDS.
      ValueError: if there is no such split or partition, or the data is incomplete.
    """
    labels = characters(split, partition)
    images = _images(data_dir)
    index = ClassIndex(images, np.full(CHARACTERS, DRAWINGS, np.int32))
    chosen = select(index, labels)
    return rotate(chosen) if rotations else chosen


def characters(split: str, partition: str) -> np.ndarray:
    """Return the characters of a split, as TFDS's labels: [n] integers in 0 .. 1622."""
    tables = {"vinyals": _vinyals, "maml": _maml}
    return np.asarray(pick(pick(tables, partition, "partition of Omniglot")(), split, "split"))


def _vinyals() -> dict[str, Any]:
    lists = importlib.resources.files("metalearn.datasets") / "omniglot_vinyals.json"
    return strict_json.loads(lists.read_text())


def _maml() -> dict[str, Any]:
    # NumPy guarantees that the stream of RandomState never changes; not that of default_rng.
    shuffled = np.random.RandomState(1).permutation(CHARACTERS)
    return {"train": shuffled[:1100], "validation": shuffled[1100:1200], "test": shuffled[1200:]}


def _images(data_dir: str | None) -> np.ndarray:
    """Return all characters in the order of TFDS's labels: [1623, 20, 28, 28, 1] uint8."""
    builder = builder_of("omniglot", data_dir)
    check_prepared(builder)
    shape = (CHARACTERS, DRAWINGS, SIZE, SIZE, 1)
    return cached(_cache_name(builder), lambda: _read(builder), np.uint8, shape)


def _cache_name(builder: Any) -> str:
    """Return the name of the cached array: the version, a digest of the files, and the size."""
    stored = {k: (s.shard_lengths, s.num_bytes) for k, s in sorted(builder.info.splits.items())}
    digest = hashlib.sha256(strict_json.dumps(stored, default=int).encode()).hexdigest()[:12]
    return f"omniglot-{builder.version}-{digest}-lanczos-{SIZE}x{SIZE}"


def _read(builder: Any) -> np.ndarray:
    images, labels = [], []
    for split in ("train", "test"):
        for record in examples(source(builder, split, undecoded=["image"])):
            images.append(_shrink(record["image"]))
            labels.append(record["label"])
    index = from_labels(np.stack(images), np.asarray(labels))
    if index.examples.shape[0] != CHARACTERS or (index.counts != DRAWINGS).any():
        raise ValueError(
            f"The omniglot in {builder.data_dir} has {len(index.counts)} characters with "
            f"{index.counts.min()} to {index.counts.max()} drawings, but Omniglot has "
            f"{CHARACTERS} with {DRAWINGS} each. It is a part of it or damaged: prepare the whole "
            f"into an empty directory, `python -m metalearn.datasets.prepare omniglot --data-dir=`."
        )
    return index.examples


def _shrink(png: bytes) -> np.ndarray:
    """Return one drawing decoded and resized, ink = 255 on paper = 0: [28, 28, 1] uint8."""
    from PIL import Image

    # First to grey: Pillow does not interpolate one-bit images.
    image = Image.open(io.BytesIO(png)).convert("L")
    small = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return 255 - np.asarray(small)[:, :, None]
