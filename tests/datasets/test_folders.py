"""Folders of images by class: what is read, what is cached, and what is refused."""

import os
import re

import jax
import numpy as np
import pytest
from PIL import Image

from metalearn.datasets import FewShot, read_folder
from metalearn.datasets import folders as module
from metalearn.experiments import build

SIZES = {"ways": 2, "shots": 1, "queries": 1}


def save(path, values, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path, **options)


def folder(root, classes=("ant", "bee", "cat"), each=2, shape=(4, 6), mode="L"):
    """Classes whose image i is all grey, of 50 * class + i."""
    for c, name in enumerate(classes):
        for i in range(each):
            save(root / name / f"{i}.png", np.full(shape, 50 * c + i), mode)
    return root


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_images_are_read_by_class_and_tasks_drawn_of_them(tmp_path):
    images, labels, classes, files = read_folder(folder(tmp_path))
    assert files[:3] == ("ant/0.png", "ant/1.png", "bee/0.png")
    assert images.shape == (6, 4, 6, 1) and images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 50, 51, 100, 101]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and classes == ("ant", "bee", "cat")
    tasks = FewShot.from_folder(tmp_path, **SIZES)
    (inputs, targets), _ = tasks.sample(jax.random.key(0))
    assert inputs.shape == (2, 4, 6, 1) and targets.tolist() == [0, 1]
    assert set((np.asarray(inputs) * 255).round().astype(int).ravel()) < set(images.ravel())


def test_what_is_not_trained_on_may_be_of_one_class_or_of_none(tmp_path):
    folder(tmp_path, ["ant"])
    (tmp_path / ".hidden").mkdir()
    one = read_folder(tmp_path, training=False)
    assert one.classes == ("ant",) and one.labels.tolist() == [0, 0]
    none = read_folder(tmp_path / "ant", training=False)
    assert none.classes == () and none.labels is None and none.files == ("0.png", "1.png")
    np.testing.assert_array_equal(one.images, none.images)
    with pytest.raises(ValueError, match=r"hidden has no image \(.*\), but it is to be read\. P"):
        read_folder(tmp_path / ".hidden", training=False)


def test_png_and_jpeg_of_any_mode_become_rgb_where_one_has_colours(tmp_path):
    save(tmp_path / "a" / "1.PNG", np.full((8, 8), 7), "1")
    save(tmp_path / "a" / "2.jpeg", np.full((8, 8), 100), "L", quality=100)
    save(tmp_path / "b" / "3.jpg", np.full((8, 8, 3), (200, 100, 0)), "RGB", quality=100)
    save(tmp_path / "b" / "4.png", np.full((8, 8, 4), (10, 20, 30, 0)), "RGBA")
    save(tmp_path / "b" / "5.png", np.full((8, 8, 3), (9, 9, 9)), "P", transparency=3)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    images = read_folder(tmp_path).images.astype(int)
    assert images.shape == (5, 8, 8, 3)
    assert abs(images[1] - 100).max() <= 1 and abs(images[2] - (200, 100, 0)).max() <= 3
    assert (images[3] == (10, 20, 30)).all()
    assert read_folder(tmp_path, channels=1).images.shape == (5, 8, 8, 1)
    assert (read_folder(tmp_path, channels=4).images[3] == (10, 20, 30, 0)).all()


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[module.ORIENTATION] = 6  # the camera was turned by a quarter
    picture = np.zeros((4, 8))
    picture[:, :4] = 255
    for name in ("a", "b"):
        save(tmp_path / name / "1.jpg", picture, exif=exif, quality=100)
    images = read_folder(tmp_path).images
    assert images.shape == (2, 8, 4, 1) and images[0, 0].min() > 200 and images[0, -1].max() < 50


def test_images_of_several_sizes_are_resized_where_a_size_is_given(tmp_path):
    folder(tmp_path)
    save(tmp_path / "cat" / "9.png", np.full((10, 3), 77))
    images = read_folder(tmp_path, size=(2, 2)).images
    assert images.shape == (7, 2, 2, 1) and (images[-1] == 77).all()


def test_decoded_images_are_cached_until_a_file_or_an_option_changes(
    tmp_path, no_cache, monkeypatch, capfd
):
    folder(tmp_path / "data")
    first = read_folder(tmp_path / "data").images
    assert "reading" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(module, "_decoded", None)  # nothing can be decoded
        assert (read_folder(tmp_path / "data").images == first).all()
    assert not capfd.readouterr().err
    smaller = read_folder(tmp_path / "data", size=(1, 1), progress=False).images
    assert smaller.shape == (6, 1, 1, 1) and not capfd.readouterr().err
    path = tmp_path / "data" / "bee" / "0.png"
    save(path, np.full((4, 6), 200))
    os.utime(path, ns=(1, 1))
    assert read_folder(tmp_path / "data").images[2, 0, 0, 0] == 200


def without(root, name):
    for path in (root / name).iterdir():
        path.unlink()
    return root


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda root: root / "nowhere", {}, "There is no folder .*nowhere .looked for from /"),
        (
            lambda root: folder(root, ["ant"]),
            {},
            "a subfolder of images for each class, at least two, but has one, 'ant'. Order the",
        ),
        (lambda root: folder(root) / "ant", {}, "at least two, but has none. Order the images"),
        (
            lambda root: without(folder(root), "bee"),
            {},
            r"bee has no image \(.png, .jpg, .jpeg\), but its name is that of a class. Put",
        ),
        (
            lambda root: folder(root, each=2),
            {"queries": 5},
            r"1 \+ 5 = 6, but the class 'ant' has 2 examples .*3 smaller ones: move their folders",
        ),
        (lambda root: folder(root), {"size": 28}, r"`size=28`: it is \(height, width\) in pixels"),
        (lambda root: folder(root), {"size": (0, 4)}, r"`size=\(0, 4\)`: it is \(height, width\)"),
        (
            lambda root: folder(root),
            {"channels": 2},
            "No number of channels is called '2'.*1, 3, 4",
        ),
        (lambda root: folder(root), {"shots": 1.0}, r"`FewShot\(shots=1.0\)`: it is an integer"),
    ],
)
def test_a_folder_that_makes_no_tasks_is_refused(make, options, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FewShot.from_folder(make(tmp_path), **{**SIZES, **options}, progress=False)


def test_an_image_of_another_size_is_named(tmp_path):
    save(folder(tmp_path) / "bee" / "9.png", np.zeros((7, 5)))
    message = (
        f"several sizes: {tmp_path}/ant/0.png is 4 x 6 and {tmp_path}/bee/9.png is 7 x 5 (height x "
        "width), but they become one array. Pass size=(4, 6) or another to resize all of them."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read_folder(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_image_that_cannot_be_read_is_named(damage, tmp_path):
    path = folder(tmp_path, shape=(60, 60)) / "cat" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60))
    save(path, noise)
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)  # None: truncated
    with pytest.raises(ValueError, match=rf"The image {path} cannot be read \(.*It is damaged"):
        read_folder(tmp_path, progress=False)


def test_an_image_of_more_than_8_bits_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(folder(tmp_path) / "ant" / "7.png")
    with pytest.raises(ValueError, match="7.png has pixels of Pillow's mode 'I;16', which do not"):
        read_folder(tmp_path)


def test_a_config_names_a_folder_for_each_split(tmp_path):
    splits = ("train", "validation", "test")
    paths = {split: str(folder(tmp_path / split, each=5)) for split in splits}
    config = {"name": "image_folder", "ways": 2, "shots": 1, "queries": 2, "eval_queries": 4}
    made = build.splits({**config, **paths, "size": [3, 3]})
    assert made.inputs.shape == (1, 3, 3, 1) and made.inputs.dtype == np.float32
    assert (made.outputs, made.train.queries, made.test.queries) == (2, 2, 4)
    with pytest.raises(ValueError, match=r"no folder for its test split \(dataset.test\)"):
        build.splits({**config, **paths, "test": None})
    with pytest.raises(ValueError, match="The dataset 'image_folder' needs validation"):
        build.splits({**config, "train": "a", "test": "b"})
