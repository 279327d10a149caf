"""Whole image datasets: TFDS's where TFDS_DATA_DIR holds them, scikit-learn's digits anywhere."""

import os
import pathlib

import numpy as np
import pytest

from metalearn.datasets import (
    DatasetNotPreparedError,
    Images,
    TrainingRuns,
    digits,
    open_source,
    read_images,
    with_label_noise,
)
from tests.helpers.refusals import refused

CLASSES = 5
FIRST_DIGITS = [4, 2, 4, 7, 8, 7, 4, 6, 6, 4, 1, 3]
LABELLED = Images(np.zeros([1000, 2, 2, 1], np.uint8), np.arange(1000, dtype=np.int32) % CLASSES)


def prepared(name, folder=""):
    """Where a dataset is; skip where it is not."""
    path = os.environ.get("TFDS_DATA_DIR")
    if not path:
        pytest.skip(f"TFDS_DATA_DIR is unset: tests of {name} need the prepared dataset")
    place = pathlib.Path(path, folder).resolve()
    if not (place / name).exists():
        pytest.skip(f"{place} holds no {name}: prepare it to run this test")
    return str(place)


# Digits, which need nothing.


@pytest.fixture(scope="module")
def digit_splits():
    return {split: read_images("digits", split) for split in ("train", "test")}


def test_digits_are_cut_into_1300_and_497(digit_splits):
    for split, count in {"train": 1300, "test": 497}.items():
        inputs, labels = digit_splits[split]
        assert inputs.shape == (count, 8, 8, 1) and inputs.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int32
        assert np.bincount(labels).min() > count / 15  # shuffled: all ten are there


def test_the_two_splits_of_the_digits_are_all_of_them_with_their_labels(digit_splits):
    from sklearn.datasets import load_digits

    def rows(images, labels):
        return sorted(zip(images.reshape(-1, 64).tolist(), labels.tolist(), strict=True))

    inputs, labels = map(np.concatenate, zip(*digit_splits.values(), strict=True))
    data = load_digits()
    assert rows(inputs, labels) == rows(data.images.astype(int) * 255 // 16, data.target)


def test_the_split_of_the_digits_never_changes(digit_splits):
    again = read_images("digits", "train")
    assert (again.inputs == digit_splits["train"].inputs).all()
    assert digit_splits["train"].labels[:12].tolist() == FIRST_DIGITS


def test_digits_by_class_are_the_same_images():
    index = digits("validation", rotations=False)  # of 2 and 5
    both = [read_images("digits", split) for split in ("train", "test")]
    twos = np.concatenate([x[labels == 2] for x, labels in both])
    assert sorted(twos.tolist()) == sorted(index.examples[0, : index.counts[0]].tolist())


def test_an_unknown_split_of_the_digits_is_refused_with_those_there_are():
    with refused("No split of the digits is called 'validation'. There are: test, train."):
        read_images("digits", "validation")


# Datasets of TFDS.


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_pillow_decodes_what_tfds_does(name):
    data_dir = prepared(name)
    inputs, labels = read_images(name, "test[:200]", data_dir=data_dir)
    assert inputs.shape == (200, 28, 28, 1) and inputs.dtype == np.uint8
    assert labels.shape == (200,) and labels.dtype == np.int32
    records = open_source(name, "test[:200]", data_dir=data_dir)
    assert (inputs == np.stack([record["image"] for record in records])).all()
    assert labels.tolist() == [record["label"] for record in records]


def test_the_whole_test_split_of_mnist_has_ten_thousand():
    inputs, labels = read_images("mnist", "test", data_dir=prepared("mnist"))
    assert inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert TrainingRuns.create(inputs, labels, validation=0.1).validation == 1000


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_colour_images_and_further_features_are_read_by_the_same_function(name, classes):
    data_dir = prepared(name, "../tfds_subset")  # a part of CIFAR, in a directory of its own
    inputs, labels = read_images(name, "test", data_dir=data_dir)
    assert inputs.shape == (len(labels), 32, 32, 3)
    assert set(labels.tolist()) == set(range(classes))
    record = open_source(name, "test", data_dir=data_dir)[7]
    assert (inputs[7] == record["image"]).all() and labels[7] == record["label"]


def test_images_stored_as_plain_arrays_are_read_too(tmp_path):
    from metalearn.datasets import digits_builder

    digits_builder.prepared(tmp_path)
    inputs, labels = read_images("sklearn_digits", "train[:5]", data_dir=str(tmp_path))
    assert inputs.shape == (5, 8, 8, 1) and inputs.max() == 16 and labels.shape == (5,)


def test_a_dataset_without_images_is_refused_with_the_features_it_has():
    message = (
        "The dataset 'tiny_shakespeare' is not one of labelled images: `read_images` reads the "
        "features 'image' and 'label', and it has text. Read it with `open_source` and make "
        "`Images(inputs, labels)` of what it holds."
    )
    with refused(message):
        read_images("tiny_shakespeare", data_dir=prepared("tiny_shakespeare"))


@pytest.mark.parametrize("shape", [(None, None, 3), (8, 8, 2), (8, 8)], ids=str)
def test_images_that_make_no_array_are_refused_with_their_shape(shape):
    import tensorflow_datasets as tfds

    from metalearn.datasets.images import _check

    features = {
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    message = (
        f"The dataset 'pictures' has images uint8{list(shape)} with labels of shape [], but "
        "`read_images` makes one array of uint8 images, all of one size [h, w, c] with 1, 3 or 4 "
        "channels, with one label each. Read it with `open_source`, resize, and make "
        "`Images(inputs, labels)` of it."
    )
    with refused(message):
        _check("pictures", features)


def test_a_dataset_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(DatasetNotPreparedError, match="^The dataset 'cifar10' is not prepared"):
        read_images("cifar10", data_dir=str(tmp_path))


# Label noise.


@pytest.mark.parametrize(("share", "replaced"), [(0, 0), (0.25, 250), (1, 1000)])
def test_a_share_of_the_labels_is_replaced_and_never_by_itself(share, replaced):
    noisy = with_label_noise(LABELLED, share, seed=0)
    assert (noisy.labels != LABELLED.labels).sum() == replaced
    assert noisy.inputs is LABELLED.inputs and noisy.labels.dtype == np.int32
    assert 0 <= noisy.labels.min() and noisy.labels.max() < CLASSES
    assert (LABELLED.labels == np.arange(1000) % CLASSES).all()  # left as they were


def test_every_other_class_is_equally_likely():
    many = Images(LABELLED.inputs, np.full(20_000, 2, np.int32))
    drawn = np.bincount(with_label_noise(many, 1, seed=1, classes=CLASSES).labels)
    expected = np.array([5000, 5000, 0, 5000, 5000])
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(20_000 * 0.25 * 0.75)


def test_the_seed_decides_which_labels_and_by_what():
    once, again, other = (with_label_noise(LABELLED, 0.5, seed=s).labels for s in (3, 3, 4))
    assert (once == again).all()
    assert ((once != LABELLED.labels) != (other != LABELLED.labels)).any()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    message = (
        f"`with_label_noise` got share={share}, but a share of the labels is between 0 and 1. "
        "Pass 0.25 for a quarter of them."
    )
    with refused(message):
        with_label_noise(LABELLED, share, seed=0)


@pytest.mark.parametrize(
    ("labels", "classes", "found"),
    [
        ([0, 0], None, "from 0 to 0 with classes=1"),
        ([0, 4], 3, "from 0 to 4 with classes=3"),
        ([-1, 1], None, "from -1 to 1 with classes=2"),
        ([], None, "none with classes=0"),
    ],
)
def test_labels_without_another_class_are_refused(labels, classes, found):
    message = (
        f"`with_label_noise` got labels {found}, but a wrong label is another of at least two "
        "classes, 0 .. classes - 1. Pass classes=, the number of all."
    )
    images = Images(np.zeros((len(labels), 1, 1, 1), np.uint8), np.array(labels, np.int32))
    with refused(message):
        with_label_noise(images, 0.5, seed=0, classes=classes)
