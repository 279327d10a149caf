"""What `eval_every` and `checkpoint_best` of the packaged configs see: never what is trained on."""

import json
import re

import jax
import numpy as np
import pytest

from metalearn.datasets import Images
from metalearn.datasets.text import Windows
from metalearn.experiments import build
from metalearn.experiments.build import datasets
from metalearn.experiments.build.datasets import training_examples
from metalearn.experiments.cli import arguments
from metalearn.experiments.commands import run
from metalearn.trainer import EVALUATION
from tests.helpers.selection import quick
from tests.helpers.small_configs import skip_without, small

KEY = jax.random.key(0)


def numbered(name, split, data_dir=None):
    """Images whose pixels are their number, so that a row is known wherever it went."""
    first, count = {"train": (0, 100), "test": (100, 40)}[split]
    numbers = np.arange(first, first + count)
    return Images(numbers.astype(np.uint8).reshape(-1, 1, 1, 1), numbers.astype(np.int32) % 4)


@pytest.fixture(params=["fds", "learned_optimizer"])
def data(request, monkeypatch):
    """The splits of a packaged config of each kind; the images are numbered 0..99 and 100..139."""
    monkeypatch.setattr(datasets, "read_images", numbered)
    config = build.to_json(small(f"{request.param}_digits", **{"dataset.validation": 8}))
    return build.splits(config["dataset"])


def rows(tasks, sides=("support", "query")):
    """The numbers of the images that the episodes of some tasks hand out, on these sides."""
    found = set()
    for key in jax.random.split(KEY, 3):
        episode = tasks.sample(key)
        for side in sides:
            inputs, _, chosen = getattr(episode, side)
            found |= set(np.asarray(inputs)[np.asarray(chosen)].ravel().tolist())
    return found


def test_validation_runs_are_judged_by_images_that_no_run_of_training_ever_sees(data):
    trained, judged = rows(data.train), rows(data.validation, ["query"])
    assert trained and judged and not trained & judged
    everything = set(np.asarray(data.train.inputs).ravel().tolist())  # whatever is drawn
    assert not everything & judged and everything | judged <= set(range(100))


def test_no_image_of_the_test_split_is_in_what_is_trained_on_or_chosen_by(data):
    tested = rows(data.test, ["query"])
    assert tested and min(tested) >= 100
    assert max(rows(data.train) | rows(data.validation)) < 100


def test_a_learned_optimizer_is_validated_by_training_on_images_it_has_not_seen(monkeypatch):
    monkeypatch.setattr(datasets, "read_images", numbered)
    config = build.to_json(small("learned_optimizer_digits", **{"dataset.validation": 8}))
    data = build.splits(config["dataset"])
    assert rows(data.train) == set(range(80)) and rows(data.validation) == set(range(80, 100))
    config["dataset"]["most"] = 15
    data = build.splits(config["dataset"])
    assert rows(data.train) == set(range(15)) and rows(data.validation) == set(range(80, 95))


def test_a_schedule_is_validated_as_it_is_tested_and_the_final_run_has_all_the_images(monkeypatch):
    monkeypatch.setattr(datasets, "read_images", numbered)
    config = build.to_json(small("fds_digits", **{"dataset.validation": 8}))["dataset"]
    data = build.splits(config)
    assert rows(data.train) == rows(data.validation, ["support"]) == set(range(90))
    assert rows(data.test, ["support"]) == set(range(100))
    told = data.validation.sample(KEY).support[1], data.validation.sample(KEY).query[1]
    np.testing.assert_array_equal(told[0], data.train.training_targets)  # with their noise
    np.testing.assert_array_equal(told[1], np.arange(90, 100) % 4)  # right ones judge


def test_runs_of_before_have_no_held_out_images_and_train_on_all(monkeypatch):
    monkeypatch.setattr(datasets, "read_images", numbered)
    config = build.to_json(small("fds_digits", **{"dataset.validation": 8}))["dataset"]
    del config["held_out"]
    data = build.splits(config)
    assert data.validation is None and rows(data.train) == set(range(100))


def test_text_that_a_learned_optimizer_is_validated_on_is_none_of_its_training(monkeypatch):
    texts = {"train": "a" * 900 + "b" * 100, "validation": "c" * 900 + "d" * 100, "test": "e" * 999}
    monkeypatch.setattr(datasets, "read_text", lambda name, split, feature: texts[split])
    expected = {
        "learned_optimizer_shakespeare": "ab cd e",
        "learning_rates_shakespeare": "ab acd ae",
    }
    for name, letters in expected.items():
        data = build.splits(build.to_json(small(name))["dataset"])
        found = ["".join(sorted(_letters(tasks))) for tasks in data[:3]]
        assert " ".join(found) == letters


def _letters(tasks):
    episode = tasks.sample(KEY)
    return {chr(i) for x in (episode.support.inputs, episode.query.inputs) for i in np.ravel(x)}


@pytest.mark.parametrize("name", quick(arguments.packaged(), lambda name: name == "fds_digits"))
def test_a_packaged_config_validates_on_other_tasks_than_it_trains_on(name):
    config = small(name)
    skip_without(config.dataset.name, config.dataset.get("tfds"))
    if config.dataset.name == "text":
        config.dataset.length = 64  # a window that is in two texts by chance is short
    data = build.splits(build.to_json(config)["dataset"])
    assert data.validation is not None
    evaluation = jax.random.fold_in(KEY, EVALUATION)  # waves, which never repeat, differ by key
    ours, theirs = _queries(data.train, KEY), _queries(data.validation, evaluation)
    assert not ours & theirs


def _queries(tasks, key):
    """What the outer loss reads of two tasks, example by example; corrupted text left out."""
    found = set()
    for each in jax.random.split(key, 2):
        query = jax.device_get(tasks.sample(each).query)
        inputs = query[0]
        if isinstance(query, Windows):
            inputs = inputs if query.corrupted is None else inputs[~query.corrupted]
        elif len(query) == 3:  # all images, and the rows that are read
            inputs = inputs[query[2]]
        found |= {example.tobytes() for example in np.asarray(inputs)}
    return found


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), 0.001, 0.999])
def test_a_share_that_holds_out_none_or_all_is_refused(share):
    with pytest.raises(
        ValueError, match=re.escape(f"dataset.held_out={share} ") + ".* such as 0.1"
    ):
        training_examples(100, share)
    assert (training_examples(100, 0), training_examples(100, 0.25)) == (100, 75)


def test_evaluations_on_the_way_without_held_out_images_are_refused(tmp_path):
    config = small("fds_digits", **{"eval_every": 1, "dataset.held_out": 0.0, "health": False})
    with pytest.raises(ValueError, match="eval_every=1 evaluates on .*held_out=0 leaves none"):
        run.train(config, tmp_path / "run", progress=False)


def test_the_best_checkpoint_of_fds_is_chosen_by_the_held_out_images(tmp_path):
    config = small("fds_digits", **{"eval_every": 1, "eval_tasks": 2, "health": False})
    config.update({"steps": 2, "checkpoint_best": "min eval/loss", "pictures": ()})
    config.update({"test_tasks": 2, "wandb": {"mode": "disabled"}})
    run.train(config, tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [1, 2]
