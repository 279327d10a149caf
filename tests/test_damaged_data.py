"""Datasets of which a file disappears, is cut short, or holds something else. Real files."""

import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from metalearn.datasets import DatasetNotPreparedError, digits, open_source, read_text
from metalearn.datasets.cache import cached
from metalearn.datasets.reading import DamagedDatasetError, examples

SHARD = "sklearn_digits-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from metalearn.datasets.digits_builder import prepared

    root = tmp_path_factory.mktemp("whole")
    prepared(root)
    return root


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the dataset to damage: (TFDS's directory, the dataset's own)."""
    shutil.copytree(whole, tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds" / "sklearn_digits" / "1.0.0"


def read(root):
    return list(examples(open_source("sklearn_digits", "train", data_dir=str(root))))


def cut(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: pathlib.Path):
    path.write_bytes(b"")


def overwrite(path: pathlib.Path):
    path.write_bytes(os.urandom(path.stat().st_size))


def overwrite_the_middle(path: pathlib.Path):
    stored = bytearray(path.read_bytes())
    third = len(stored) // 3
    stored[third : 2 * third] = bytes(third)
    path.write_bytes(stored)


def test_a_missing_shard_is_refused_by_name_with_the_way_out(copy):
    root, folder = copy
    (folder / SHARD).unlink()
    with pytest.raises(DamagedDatasetError) as caught:
        read(root)
    assert str(caught.value) == (
        f"The dataset 'sklearn_digits' in {folder} is damaged: {SHARD} cannot be read (there is "
        f"no such file). Delete that directory and prepare it again, with: tfds build "
        f"sklearn_digits --data_dir={root} --file_format=array_record."
    )


@pytest.mark.parametrize("damage", [cut, empty, overwrite, overwrite_the_middle])
def test_a_damaged_shard_is_refused_by_split_with_the_way_out(copy, damage):
    root, folder = copy
    damage(folder / SHARD)
    expected = f"The dataset 'sklearn_digits' in {folder} is damaged: its split 'train' cannot be"
    with pytest.raises(DamagedDatasetError, match=re.escape(expected)):
        read(root)


@pytest.mark.parametrize("damage", [cut, empty, overwrite, pathlib.Path.unlink])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_is_refused_with_the_way_out(copy, damage, name):
    root, folder = copy
    damage(folder / name)
    with pytest.raises((DamagedDatasetError, DatasetNotPreparedError), match="tfds build"):
        read(root)


def test_an_index_beyond_the_records_is_no_damage(whole):
    source = open_source("sklearn_digits", "train", data_dir=str(whole))
    with pytest.raises(IndexError, match="There are 1797 records, and none has the index 1797."):
        source[1797]


def test_an_unknown_split_is_refused_with_those_there_are(whole):
    with pytest.raises(ValueError, match="has no split 'tset'. There are: train; and slices, such"):
        open_source("sklearn_digits", "tset", data_dir=str(whole))


@pytest.mark.parametrize("name", ["x_y", "", "("])
def test_an_unknown_dataset_is_refused(name, tmp_path):
    expected = re.escape(f"TFDS has no dataset called {name!r} (")
    with pytest.raises(ValueError, match=expected):
        read_text(name, data_dir=str(tmp_path))


@pytest.mark.parametrize("damage", [cut, empty, overwrite, pathlib.Path.unlink])
@pytest.mark.parametrize("name", [SHARD, "dataset_info.json"])
def test_the_digits_in_the_cache_are_prepared_again_where_they_are_damaged(
    tmp_path, monkeypatch, whole, damage, name
):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    shutil.copytree(whole, tmp_path / "tfds")
    before = digits("test")
    damage(tmp_path / "tfds" / "sklearn_digits" / "1.0.0" / name)
    with pytest.warns(UserWarning, match="sklearn_digits in the cache cannot be read"):
        after = digits("test")
    assert (before.examples == after.examples).all()
    again = digits("test")  # and no warning any more
    assert (before.examples == again.examples).all()


@pytest.mark.parametrize("damage", [cut, empty, overwrite])
def test_a_damaged_array_in_the_cache_is_built_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    array = np.arange(1000)
    cached("a", lambda: array)
    damage(tmp_path / "a.npy")
    with pytest.warns(UserWarning, match=r"a\.npy in the cache cannot be read .* built again"):
        assert (cached("a", lambda: array) == array).all()
    assert (cached("a", lambda: np.zeros(1)) == array).all()  # it was kept


def test_a_pickle_in_the_cache_is_never_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    np.save(tmp_path / "a.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.warns(UserWarning, match="Object arrays cannot be loaded when allow_pickle=False"):
        assert cached("a", lambda: np.zeros(2)).tolist() == [0, 0]
