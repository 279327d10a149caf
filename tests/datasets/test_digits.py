"""scikit-learn's digits, prepared on the spot."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from metalearn.datasets import digits, rotate
from metalearn.datasets.digits import DIGITS

ONE_RUN = (
    "from metalearn.datasets import digits; index = digits(); import sys;"
    "assert 'tensorflow' not in sys.modules; print(index.examples.sum())"
)


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("digits") / "cache"
        patch.setenv("METALEARN_CACHE", str(path))
        yield path


def test_digits_are_prepared_in_a_fresh_cache_quietly_and_leave_nothing_else(fresh_cache, capfd):
    index = digits("train", rotations=False)
    assert capfd.readouterr() == ("", "")
    assert index.examples.shape == (5, 183, 8, 8, 1) and index.examples.dtype == np.uint8
    assert index.examples.min() == 0 and index.examples.max() == 255
    assert [p.name for p in (fresh_cache / "tfds").iterdir()] == ["sklearn_digits"]
    assert [p.name for p in (fresh_cache / "tfds" / "sklearn_digits").iterdir()] == ["1.0.0"]


def test_the_images_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    index = digits("train", rotations=False)
    for c, digit in enumerate(DIGITS["train"]):
        ours = index.examples[c, : index.counts[c], ..., 0].reshape(-1, 64).astype(int)
        theirs = data.images[data.target == digit].reshape(-1, 64).astype(int) * 255 // 16
        assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_no_digit_is_in_two_splits_and_six_and_nine_are_together():
    every = [digit for split in DIGITS.values() for digit in split]
    assert sorted(every) == list(range(10))
    assert {6, 9} <= set(DIGITS["train"])


@pytest.mark.parametrize(("split", "classes"), [("train", 20), ("validation", 8), ("test", 12)])
def test_rotations_make_four_classes_of_each_digit(split, classes):
    index = digits(split)
    assert len(index.examples) == len(index.counts) == classes
    assert (index.examples == rotate(digits(split, rotations=False)).examples).all()


def test_an_unknown_split_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="^No split is called 'val'.*There are: test, train, validation"
    ):
        digits("val")


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(tmp_path):
    env = {**os.environ, "METALEARN_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ONE_RUN]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe) for _ in range(2)]
    results = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert results[0] == results[1]
    assert results[0] == (f"{digits().examples.sum()}\n".encode(), b"", 0)


def test_a_process_that_comes_second_keeps_what_the_first_has_made(tmp_path):
    from metalearn.datasets import digits_builder

    target = pathlib.Path(digits_builder.prepared(tmp_path).data_dir)
    before = target.stat().st_ino
    digits_builder._prepare(tmp_path, target)
    assert target.stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["sklearn_digits"]


def test_a_cache_directory_that_cannot_be_made_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="cannot be made.*Set the environment variable METALEARN"):
        digits()
