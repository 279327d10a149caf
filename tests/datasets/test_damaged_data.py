"""Datasets of which a file disappears, is cut short, or holds something else. Real files."""

import io
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

from metalearn.datasets import DatasetNotPreparedError, digits, omniglot, open_source, read_text
from metalearn.datasets.reading import DamagedDatasetError, cached, examples
from tests.helpers.selection import quick

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
@pytest.mark.parametrize("name", quick([SHARD, "dataset_info.json"], lambda name: name == SHARD))
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


def nothing_at_all(array):
    return b""


def a_header_without_its_data(array):
    return npy(array)[:-1]


def more_than_the_array(array):
    return npy(array) + b"0"


def of_another_type(array):
    return npy(array.astype(np.float32))


def of_the_other_byte_order(array):
    return npy(array.astype(">i4"))


def of_another_shape(array):
    return npy(array.reshape(3, 2))


def of_another_rank(array):
    return npy(array.reshape(-1))


def of_fewer_rows(array):
    return npy(array[:1])


def in_fortran_order(array):
    return npy(array).replace(b"'fortran_order': False", b"'fortran_order': True ")


def of_objects(array):
    return npy(array.astype(object), allow_pickle=True)


def an_archive(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (nothing_at_all, ""),
        (a_header_without_its_data, "it has 151 bytes, and such an array 152"),
        (more_than_the_array, "it has 153 bytes, and such an array 152"),
        (of_another_type, r"it is float32\[2, 3\], not int32\[2, 3\]"),
        (of_the_other_byte_order, r"it is >i4\[2, 3\], not int32\[2, 3\]"),
        (of_another_shape, r"it is int32\[3, 2\], not int32\[2, 3\]"),
        (of_another_rank, r"it is int32\[6\], not int32\[2, 3\]"),
        (of_fewer_rows, r"it is int32\[1, 3\], not int32\[2, 3\]"),
        (in_fortran_order, "it is in Fortran order, in which none is written"),
        (of_objects, r"it is object\[2, 3\], not int32\[2, 3\]"),
        (an_archive, "the magic string is not correct"),
    ],
)
def test_an_array_in_the_cache_that_is_not_the_one_asked_for_is_built_again(
    tmp_path, monkeypatch, made, why
):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    (tmp_path / "a.npy").write_bytes(made(array))
    built = []

    def read():
        return cached("a", lambda: built.append(1) or array, np.int32, (2, 3))

    with pytest.warns(UserWarning, match=rf"a\.npy in the cache cannot be read \(.*{why}"):
        assert read().tolist() == array.tolist()
    again = read()  # and no warning any more
    assert again.dtype == np.int32 and again.tolist() == array.tolist() and built == [1]


def test_what_is_built_for_the_cache_is_of_the_type_and_shape_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"was built for .*a\.npy is float64\[2\], not uint8\[3\]"):
        cached("a", lambda: np.zeros(2), np.uint8, (3,))
    assert not list(tmp_path.glob("*.npy"))


def test_an_array_built_in_fortran_order_is_kept_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    for _ in range(2):
        assert cached("a", lambda: array, array.dtype, (2, 3)).tolist() == array.tolist()


def test_drawings_of_another_size_in_the_cache_of_omniglot_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    asked = []

    def cached_as_asked(name, build, dtype, shape):
        asked.append((np.dtype(dtype), shape))
        return np.zeros(shape, dtype)

    module = sys.modules["metalearn.datasets.omniglot"]
    monkeypatch.setattr(module, "cached", cached_as_asked)
    monkeypatch.setattr(module, "builder_of", lambda name, data_dir: None)
    monkeypatch.setattr(module, "check_prepared", lambda builder: None)
    monkeypatch.setattr(module, "_cache_name", lambda builder: "omniglot")
    omniglot("test", rotations=False)
    assert asked == [(np.dtype(np.uint8), (1623, 20, 28, 28, 1))]


# What a folder could name for TFDS to import.

TFDS = "tensorflow_datasets.core.features"
MARK = "import pathlib; pathlib.Path(__file__).with_name('ran').write_text('')\n"


def text_feature(name):
    return {"pythonClassName": name, "text": {}}


def dictionary(**features):
    name = f"{TFDS}.features_dict.FeaturesDict"
    return {"pythonClassName": name, "featuresDict": {"features": features}}


def sequence(feature):
    name = f"{TFDS}.sequence_feature.Sequence"
    return {"pythonClassName": name, "sequence": {"feature": feature, "length": "-1"}}


def as_json(feature):
    """A feature whose content is JSON in a text, as TFDS once wrote it."""
    name = f"{TFDS}.features_dict.FeaturesDict"
    return {"pythonClassName": name, "jsonFeature": {"json": json.dumps({"x": feature})}}


HOSTILE = {
    "at the top": text_feature("hostile.Mark"),
    "a feature": dictionary(x=text_feature("hostile.Mark")),
    "in a sequence": dictionary(x=sequence(sequence(text_feature("hostile.Mark")))),
    "in JSON in a text": as_json(text_feature("hostile.Mark")),
    "as TFDS once wrote it": {"type": "hostile.Mark", "content": {}},
    "once, in a text": as_json({"type": "hostile.Mark", "content": {}}),
    "as the proto has it": dictionary(x={"python_class_name": "hostile.Mark", "text": {}}),
    "a namesake": dictionary(x=text_feature("tensorflow_datasets_hostile.Mark")),
    "a module there is not": dictionary(x=text_feature("tensorflow_datasets.hostile.os.Mark")),
    "a way out of the folder": dictionary(x=text_feature("tensorflow_datasets...hostile.Mark")),
    "a name with a line break": dictionary(x=text_feature("hostile.Mark\ntensorflow_datasets.x.Y")),
}


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """Modules that leave a mark if they are imported: the function that says whether one was."""
    for name in ("hostile", "tensorflow_datasets_hostile"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(MARK)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sorted(path.parent.name for path in tmp_path.glob("*/ran"))
    for name in ("hostile", "tensorflow_datasets_hostile"):
        sys.modules.pop(name, None)


def described_by(root, written=None, version="1.0.0", **info):
    """A folder that TFDS opens by what is written in it: the dataset `texts`."""
    folder = root / "tfds" / "texts" / version
    folder.mkdir(parents=True)
    said = {"name": "texts", "version": version, "fileFormat": "array_record", **info}
    split = {"name": "train", "shardLengths": ["1"], "numBytes": "8"}
    said |= {"splits": [split | {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}"}]}
    (folder / "dataset_info.json").write_text(json.dumps(said))
    if written is not None:
        (folder / "features.json").write_text(json.dumps(written))
    return folder


def opened(root, name="texts"):
    open_source(name, "train", data_dir=str(root / "tfds"))


def foreign(name, file="features.json"):
    message = (
        rf"dataset .* in .* names the class '{re.escape(name)}.* in {file}, and to read it TFDS"
    )
    return pytest.raises(DamagedDatasetError, match=message + " would import that module")


@pytest.mark.parametrize("features", HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_names_a_class_of_another_module_is_refused_and_runs_nothing(
    tmp_path, marked, features
):
    described_by(tmp_path, features)
    with pytest.raises(DamagedDatasetError, match="names the class .* would import that module"):
        opened(tmp_path)
    assert marked() == []


def test_tfds_alone_would_run_that_module(tmp_path, marked):
    import tensorflow_datasets as tfds

    folder = described_by(tmp_path, HOSTILE["a feature"])
    with pytest.raises(ValueError, match="Unrecognized FeatureConnector type: hostile.Mark"):
        tfds.builder_from_directory(str(folder))
    assert marked() == ["hostile"]


def test_features_in_dataset_info_and_of_an_older_version_are_looked_at_too(tmp_path, marked):
    folder = described_by(tmp_path, HOSTILE["a feature"], "1.0.0")
    described_by(tmp_path, dictionary(x=text_feature(f"{TFDS}.text_feature.Text")), "2.0.0")
    with foreign("hostile.Mark"):
        opened(tmp_path)
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_name("2.0.0"))
    described_by(tmp_path, features=HOSTILE["a feature"])
    with foreign("hostile.Mark", "dataset_info.json"):
        opened(tmp_path)
    with foreign("hostile.Mark", "dataset_info.json"):
        opened(tmp_path, "Texts:1.0.0")
    assert marked() == []


def test_a_class_that_is_named_twice_is_seen_twice(tmp_path, marked):
    folder = described_by(tmp_path, {})
    tfds, other = (f'"pythonClassName": "{c}"' for c in (f"{TFDS}.x.Y", "hostile.Mark"))
    for pair in ((tfds, other), (other, tfds)):
        (folder / "features.json").write_text("{" + ", ".join(pair) + "}")
        with pytest.raises(DamagedDatasetError, match="names the class"):
            opened(tmp_path)
    assert marked() == []


def test_the_features_of_tfds_are_opened(tmp_path):
    described_by(tmp_path, dictionary(x=sequence(text_feature(f"{TFDS}.text_feature.Text"))))
    with pytest.raises(DamagedDatasetError, match="there is no such file"):  # a shard
        opened(tmp_path)


def test_descriptions_nested_without_end_are_refused(tmp_path):
    folder = described_by(tmp_path, {})
    (folder / "features.json").write_text("[" * 100_000)
    with pytest.raises(DamagedDatasetError, match="'texts' in .* is damaged: .* cannot be read"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["kaggle:texts", "huggingface:texts", "texts/..:1.0.0"])
def test_names_that_lead_elsewhere_than_to_this_folder_are_refused(tmp_path, name):
    described_by(tmp_path, HOSTILE["a feature"])
    with pytest.raises(ValueError, match=f"TFDS has no dataset called {re.escape(repr(name))}"):
        opened(tmp_path, name)


@pytest.mark.parametrize("features", [3, [], "x", {"pythonClassName": 3}, {"type": ["a.b"]}, {}])
def test_descriptions_of_something_else_are_damage(tmp_path, features):
    described_by(tmp_path, features)
    with pytest.raises(DamagedDatasetError, match="tfds build texts"):
        opened(tmp_path)
