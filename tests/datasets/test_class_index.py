"""Ordering examples by class, choosing classes, and turning them."""

import numpy as np
import pytest

from metalearn.datasets import ClassIndex, from_labels, rotate, select


def test_from_labels_orders_by_class_keeps_the_order_within_and_pads_with_zeros():
    images = np.arange(1, 7, dtype=np.uint8).reshape(6, 1, 1, 1)
    index = from_labels(images, np.array([7, 2, 7, 7, 2, 30]))
    assert index.examples.dtype == np.uint8 and index.counts.dtype == np.int32
    assert index.examples[..., 0, 0, 0].tolist() == [[2, 5, 0], [1, 3, 4], [6, 0, 0]]
    assert index.counts.tolist() == [2, 3, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.bool_])
def test_from_labels_keeps_the_type_of_the_inputs(dtype):
    inputs = np.array([[0], [1], [0]], dtype)
    index = from_labels(inputs, [1, 0, 0])
    assert index.examples.dtype == dtype and index.examples[..., 0].tolist() == [[1, 0], [0, 0]]


def test_from_labels_orders_every_array_of_an_example():
    inputs = {"image": np.arange(3.0)[:, None], "size": np.arange(3)}
    index = from_labels(inputs, ["b", "a", "b"])
    assert index.examples["image"][..., 0].tolist() == [[1, 0], [0, 2]]
    assert index.examples["size"].tolist() == [[1, 0], [0, 2]]
    assert select(index, [1]).examples["size"].tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((4, 2)), r"got 4 inputs and labels of shape \[3\], but every example has one"),
        ({"a": np.zeros((3, 1)), "b": np.zeros(2)}, r"unequal length \(\['a'\]: 3, \['b'\]: 2\)"),
    ],
)
def test_from_labels_refuses_unequal_lengths(inputs, message):
    with pytest.raises(ValueError, match=message):
        from_labels(inputs, np.zeros(3, int))


def test_select_keeps_the_given_classes_in_the_given_order():
    index = ClassIndex(np.arange(4, dtype=np.uint8)[:, None], np.arange(4, dtype=np.int32))
    chosen = select(index, [3, 1])
    assert chosen.examples.tolist() == [[3], [1]] and chosen.counts.tolist() == [3, 1]


def test_rotations_are_quarter_turns_and_make_four_classes_of_each():
    image = np.array([[1, 2], [3, 4]], np.uint8)[None, None, :, :, None]
    index = ClassIndex(np.concatenate([image, 10 * image]), np.array([1, 1], np.int32))
    turned = rotate(index)
    assert turned.examples.shape == (8, 1, 2, 2, 1) and turned.counts.tolist() == [1] * 8
    assert turned.examples[::2, 0, ..., 0].tolist() == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]
    assert (turned.examples[1::2] == 10 * turned.examples[::2]).all()


def test_rotate_refuses_images_that_are_not_square():
    index = ClassIndex(np.zeros((2, 3, 28, 20, 1), np.uint8), np.array([3, 3], np.int32))
    with pytest.raises(ValueError, match=r"got examples of shape \[28, 20, 1\].*Crop or pad"):
        rotate(index)
