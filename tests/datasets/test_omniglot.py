"""Omniglot: prepared without TensorFlow, split without overlap.

A counterfeit of Omniglot's archives (each character drawn once, its number in binary
as black cells) stands in for the download; the real thing is tested where
TFDS_DATA_DIR holds it.
"""

import importlib
import io
import itertools
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from metalearn.datasets import open_source
from metalearn.datasets.omniglot import characters, omniglot
from metalearn.datasets.prepare import prepare

SIZES = {
    "vinyals": {"train": 1028, "validation": 172, "test": 423},
    "maml": {"train": 1100, "validation": 100, "test": 423},
}
ARCHIVES = {  # archive: first and last character
    "images_background": (0, 964),
    "images_evaluation": (964, 1623),
    "images_background_small1": (0, 10),
    "images_background_small2": (10, 30),
}


def drawing(label: int) -> bytes:
    """A one-bit PNG, 105 x 105, of 4 x 4 cells: cell i is ink where bit i of label is set."""
    bits = np.array([label >> i & 1 for i in range(16)], bool).reshape(4, 4)
    paper = np.ones((105, 105), bool)
    paper[:104, :104] = ~np.kron(bits, np.ones((26, 26), bool))
    file = io.BytesIO()
    Image.fromarray(paper).save(file, "png")
    return file.getvalue()


def write_archive(path: pathlib.Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for label in range(*ARCHIVES[name]):
            alphabet, character = label * 50 // 1623, label
            folder = f"{name}/Alphabet_{alphabet}/character{character + 1:02}"
            archive.writestr(f"{folder}/{label + 1:04}_01.png", drawing(label))


@pytest.fixture(scope="module")
def counterfeit(tmp_path_factory):
    """A data directory, prepared from counterfeit archives by `prepare`."""
    from tensorflow_datasets.core.download.resource import get_dl_fname

    from metalearn.datasets.omniglot_builder import Omniglot

    root = tmp_path_factory.mktemp("omniglot")
    for url, info in Omniglot.url_infos.items():
        path = root / get_dl_fname(url, info.checksum)
        write_archive(path, pathlib.Path(url).stem)
        note = {"urls": [url], "url_info": {"checksum": info.checksum, "size": info.size}}
        path.with_name(path.name + ".INFO").write_text(json.dumps(note))
    prepare("omniglot", data_dir=str(root / "tfds"), download_dir=str(root))
    return str(root / "tfds")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("METALEARN_CACHE", str(path))
    return path


@pytest.fixture
def drawn_once(monkeypatch):
    monkeypatch.setattr(importlib.import_module("metalearn.datasets.omniglot"), "DRAWINGS", 1)


@pytest.fixture(scope="module")
def real():
    path = os.environ.get("TFDS_DATA_DIR")
    if not path:
        pytest.skip("TFDS_DATA_DIR is unset: Omniglot tests need the prepared dataset")
    if not pathlib.Path(path, "omniglot", "3.0.0").exists():
        pytest.skip("TFDS_DATA_DIR holds no omniglot/3.0.0: prepare it to run this test")
    return path


def test_the_dataset_is_prepared_without_tensorflow_in_the_official_layout(counterfeit):
    lengths = {s: len(open_source("omniglot", s, data_dir=counterfeit)) for s in ("train", "test")}
    assert lengths == {"train": 964, "test": 659}
    record = open_source("omniglot", "small2", data_dir=counterfeit)[0]
    assert record["image"].shape == (105, 105, 3)
    assert 10 <= record["label"] < 30 and record["alphabet_char_id"] == record["label"]


def test_every_class_holds_its_own_drawings_as_white_ink_on_black(counterfeit, drawn_once):
    index = omniglot("train", rotations=False, data_dir=counterfeit)
    assert index.examples.shape == (1028, 1, 28, 28, 1)
    centres = index.examples[:, 0, 3::7, 3::7, 0].reshape(1028, 16)
    assert set(np.unique(centres)) == {0, 255}
    numbers = (centres == 255) @ (1 << np.arange(16))
    assert (numbers == characters("train", "vinyals")).all()


def test_images_are_read_once_and_then_come_from_the_cache(counterfeit, drawn_once, cache):
    omniglot("train", data_dir=counterfeit)
    (file,) = cache.iterdir()
    np.save(file, np.full_like(np.load(file), 9))
    assert (omniglot("test", data_dir=counterfeit).examples == 9).all()


def test_an_incomplete_omniglot_is_refused_and_not_cached(counterfeit, cache):
    with pytest.raises(ValueError, match="has 1623 characters with 1 to 1 drawings, but Omniglot"):
        omniglot(data_dir=counterfeit)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("partition", SIZES)
def test_no_character_is_in_two_splits_and_every_one_is_in_one(partition):
    splits = {split: characters(split, partition) for split in SIZES[partition]}
    assert {split: len(labels) for split, labels in splits.items()} == SIZES[partition]
    together = sorted(itertools.chain(*(labels.tolist() for labels in splits.values())))
    assert together == list(range(1623))


def test_the_partition_of_maml_never_changes():
    assert characters("test", "maml")[:5].tolist() == [1313, 762, 1373, 1496, 1215]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("val", "vinyals"), "No split is called 'val'. There are: test, train, validation."),
        (("train", "lake"), "No partition of Omniglot is called 'lake'. There are: maml, vinyals."),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(asked, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        omniglot(asked[0], partition=asked[1])


@pytest.mark.slow
def test_the_real_splits_have_their_sizes_and_share_no_image(real):
    seen: set[bytes] = set()
    for split, size in SIZES["vinyals"].items():
        index = omniglot(split, rotations=False, data_dir=real)
        assert index.examples.shape == (size, 20, 28, 28, 1)
        images = {image.tobytes() for image in index.examples.reshape(-1, 784)}
        assert not images & seen
        seen |= images
    assert 0.05 < index.examples.mean() / 255 < 0.15  # ink is white, and there is little of it
    assert len(omniglot("test", data_dir=real).counts) == 4 * 423
