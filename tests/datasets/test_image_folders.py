"""A folder of images becomes arrays, by class where it holds a folder for each."""

import re

import numpy as np
import pytest
from PIL import Image

from metalearn.datasets.images import read_folder


def test_a_folder_of_images_is_read_by_class_in_the_order_of_names(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 7), np.uint8)
    for i, name in enumerate(("bee/1.png", "bee/0.png", "ant/0.png", "ant/1.png")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(path)
    (tmp_path / "ant" / "notes.txt").touch()
    folder = read_folder(tmp_path)
    np.testing.assert_array_equal(folder.inputs[..., 0], pixels[[2, 3, 1, 0]])
    assert folder.classes == ("ant", "bee") and folder.labels.tolist() == [0, 0, 1, 1]
    assert folder.files == ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png")
    assert read_folder(tmp_path, channels=3).inputs.shape == (4, 8, 7, 3)
    flat = read_folder(tmp_path / "bee")
    assert flat.labels is None and flat.files == ("0.png", "1.png")


def test_a_jpeg_in_colour_is_read_and_hidden_folders_are_not(tmp_path):
    (tmp_path / ".cache").mkdir()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "red.JPG", format="jpeg")
    folder = read_folder(tmp_path)
    assert folder.inputs.shape == (1, 2, 3, 3) and folder.inputs[0, 0, 0, 0] > 250
    assert read_folder(tmp_path, channels=1).inputs.shape == (1, 2, 3, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "a").mkdir(), "The folder {}/a holds no images (.png, .jpg, .jpeg). Put"),
        (lambda p: (p / "a.png").write_text("x"), "{}/a.png cannot be read as an image (cannot"),
        (
            lambda p: [Image.new("L", (8, n)).save(p / f"{n}.png") for n in (7, 8)],
            "{0}/8.png is an image [8, 8, 1], and {0}/7.png is [7, 8, 1]: the images of a folder",
        ),
        (
            lambda p: Image.new("I;16", (8, 8)).save(p / "deep.png"),
            "{}/deep.png cannot be read as an image (its pixels are of mode I;16, and not of 8 bi",
        ),
    ],
)
def test_a_folder_that_holds_no_images_of_one_size_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(tmp_path))}"):
        read_folder(tmp_path)
