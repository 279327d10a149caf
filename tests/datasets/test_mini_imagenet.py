"""mini-ImageNet from a folder: its split is that of the lists, whatever the folder looks like."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from metalearn.datasets import mini_imagenet, read_folder
from metalearn.datasets.cifar_few_shot import class_names
from tests.helpers.command_line import call
from tests.helpers.selection import quick

SPLITS = ("train", "validation", "test")
NAMES = {split: class_names("mini_imagenet", split) for split in SPLITS}
EVERY = sorted(name for names in NAMES.values() for name in names)


def folder(root, where, each=2, suffix="JPEG", shape=(12, 10)):
    """Make images of all classes: image i of the c-th class is grey, of 2 c + i."""
    for split, names in NAMES.items():
        for name in names:
            (root / where[split] / name).mkdir(parents=True)
            for i in range(each):
                values = np.full((*shape, 3), 2 * EVERY.index(name) + i, np.uint8)
                Image.fromarray(values).save(root / where[split] / name / f"{i}.{suffix}")
    return root


def test_the_split_has_64_16_and_20_classes_and_none_twice():
    assert [len(NAMES[split]) for split in SPLITS] == [64, 16, 20]
    assert len({*EVERY}) == 100 and all(re.fullmatch(r"n\d{8}", name) for name in EVERY)
    # The first of each list of Ravi and Larochelle.
    for split, name in zip(SPLITS, ("n01532829", "n01855672", "n01930112"), strict=True):
        assert NAMES[split][0] == name


LAYOUTS = {
    "side by side": dict.fromkeys(SPLITS, ""),
    "a folder for each split": {"train": "train", "validation": "val", "test": "test"},
}


@pytest.mark.parametrize("layout", quick(LAYOUTS, lambda name: name == "side by side"))
def test_the_classes_of_each_split_are_read_and_resized(layout, tmp_path):
    folder(tmp_path, LAYOUTS[layout])
    if layout == "side by side":
        (tmp_path / "n00000000").mkdir()  # as in ImageNet, where there are others
    for split in SPLITS:
        index = mini_imagenet(split, folder=str(tmp_path), size=(6, 8))
        assert index.examples.shape == (len(NAMES[split]), 2, 6, 8, 3)
        assert index.examples.dtype == np.uint8 and (index.counts == 2).all()
        values = index.examples.reshape(len(NAMES[split]), 2, -1).astype(int)
        expected = 2 * np.array([EVERY.index(name) for name in NAMES[split]])[:, None] + [0, 1]
        assert abs(values - expected[..., None]).max() <= 1  # JPEG rounds


def test_a_folder_that_is_not_that_of_the_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`mini_imagenet` got no folder \(dataset.folder\)"):
        mini_imagenet(folder="")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        mini_imagenet(folder=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="No split is called 'val'"):
        mini_imagenet("val", folder=str(tmp_path))
    for name in NAMES["test"][:18]:
        (tmp_path / "test" / name).mkdir(parents=True)
    message = (
        f"The folder {tmp_path / 'test'} has no folder for 2 of the 20 classes in the test split "
        f"of mini-ImageNet, such as {NAMES['test'][18]}."
    )
    with pytest.raises(ValueError, match=re.escape(message) + ".*take the dataset 'image_folder'"):
        mini_imagenet("test", folder=str(tmp_path))


def test_the_subfolders_to_read_may_be_chosen(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2), len(name)).save(tmp_path / name / "0.png")
    read = read_folder(tmp_path, classes=["cat", "ant"], progress=False)
    assert read.classes == ("ant", "cat") and read.files == ("ant/0.png", "cat/0.png")
    message = "has no subfolder 'dog', and `classes` names it, as 1 others that are not there."
    with pytest.raises(ValueError, match=re.escape(message)):
        read_folder(tmp_path, classes=["ant", "dog", "eel"], progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_the_packaged_config_trains_on_a_folder(tmp_path, monkeypatch):
    """Real files of noise, read where the config looks for them; everything else is smaller."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in EVERY:
        (tmp_path / "data" / "mini_imagenet" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 18, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "mini_imagenet" / name / f"{i}.jpg")
    sizes = {"dataset.size": "(16, 16)", "dataset.queries": 2, "dataset.eval_queries": 2}
    sizes |= {"model.filters": 4, "model.blocks": 2, "algorithm.inner_steps": 2, "steps": 2}
    sizes |= {"tasks_per_step": 2, "eval_every": 2, "eval_tasks": 2, "test_tasks": 4}
    words = [f"--config.{key}={value}" for key, value in sizes.items()]
    words += ["--config.health=False", "--config.wandb.mode=disabled", "--workdir=run"]
    assert call("train", "--config=maml_mini_imagenet", *words) == 0
    score = json.loads((tmp_path / "run" / "test.json").read_text())
    assert 0 <= score["accuracy"]["mean"] <= 1 and score["accuracy"]["tasks"] == 4
