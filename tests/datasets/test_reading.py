"""Reading TFDS without TensorFlow, and the errors where there is nothing to read."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from metalearn.datasets import DatasetNotPreparedError, omniglot, open_source
from metalearn.datasets.reading import PREPARED_HERE, cached, check_prepared, examples


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    from metalearn.datasets.digits_builder import prepared

    path = tmp_path_factory.mktemp("tfds")
    prepared(path)
    return path


def test_a_missing_dataset_is_refused_at_once_with_the_command_that_prepares_it(tmp_path):
    start = time.monotonic()
    with pytest.raises(DatasetNotPreparedError) as caught:
        omniglot(data_dir=str(tmp_path))
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        f"The dataset 'omniglot' is not prepared: there is no {tmp_path}/omniglot/3.0.0. Prepare "
        f"it once with: python -m metalearn.datasets.prepare omniglot --data-dir={tmp_path}; or, "
        f"if it is elsewhere, pass data_dir= or set the environment variable TFDS_DATA_DIR before "
        f"Python starts."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_that_tfds_prepares_is_refused_with_its_command(tmp_path):
    command = f"tfds build mnist --data_dir={tmp_path} --file_format=array_record"
    with pytest.raises(DatasetNotPreparedError, match=re.escape(command)):
        open_source("mnist", "train", data_dir=str(tmp_path))


def test_a_dataset_stored_as_tfrecord_is_refused_with_the_way_out(digits_dir, tmp_path):
    from metalearn.datasets.digits_builder import SklearnDigits

    stored = digits_dir / "sklearn_digits" / "1.0.0"
    copy = tmp_path / "sklearn_digits" / "1.0.0"
    copy.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json"):
        text = (stored / file).read_text().replace("array_record", "tfrecord")
        (copy / file).write_text(text)
    with pytest.raises(DatasetNotPreparedError, match="stored as tfrecord.*into another directory"):
        check_prepared(SklearnDigits(data_dir=str(tmp_path)))


def test_a_prepared_dataset_is_read_by_name_and_every_record_once(digits_dir):
    source = open_source("sklearn_digits", "train", data_dir=str(digits_dir))
    records = list(examples(source, chunk=1000))
    assert len(records) == len(source) == 1797
    assert records[1234]["label"] == source[1234]["label"]
    assert records[0]["image"].shape == (8, 8, 1)


@pytest.mark.slow
def test_importing_datasets_imports_neither_tfds_nor_sklearn_nor_pillow():
    code = (
        "import sys, metalearn.datasets;"
        "print({'tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"set()\n"


def test_cached_builds_once_and_another_name_builds_again(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return np.full(3, len(built), np.uint8)

    assert cached("a-1.0", build).tolist() == cached("a-1.0", build).tolist() == [1, 1, 1]
    assert cached("a-2.0", build).tolist() == [2, 2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.0.npy", "a-2.0.npy"]


def test_what_an_error_says_can_be_prepared_can_be():
    from metalearn.datasets.prepare import BUILDERS

    assert tuple(BUILDERS) == PREPARED_HERE


def test_preparing_an_unknown_dataset_is_refused_with_those_there_are(capsys):
    from metalearn.datasets.prepare import main

    with pytest.raises(SystemExit):
        main(["mnistt"])
    message = "No dataset to prepare is called 'mnistt'. There are: omniglot."
    assert message in capsys.readouterr().err
