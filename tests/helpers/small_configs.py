"""The packaged configs at a small size."""

import importlib
import os
import pathlib

import ml_collections
import pytest

SMALL = {
    "tasks_per_step": 2,
    "chunk": None,
    "dataset.queries": 2,
    "dataset.eval_queries": 2,
    "model.filters": 2,
    "model.blocks": 1,
    "model.hidden": (4,),
    "model.width": 4,
    "dataset.length": 8,
    "dataset.batch": 2,
    "dataset.inner_steps": 7,
    "dataset.eval_steps": 7,
    "truncation.steps": 7,
    "dataset.probes": 2,
    "dataset.eval_probes": 2,
    "algorithm.inner_steps": 7,
    "algorithm.batch": 2,
}


def module(name):
    return importlib.import_module(f"metalearn.experiments.configs.{name}")


def small(name, **overrides) -> ml_collections.ConfigDict:
    config = module(name).get_config()
    sizes = {key: _at(config, key) for key in SMALL}
    present = {key: as_small(SMALL[key], size) for key, size in sizes.items() if size}
    config.update_from_flattened_dict({**present, **overrides})
    return config


def as_small(small, size):
    """Return a small value of a size: for each of several, where it is a tuple of them."""
    return (small,) * len(size) if isinstance(size, tuple) and isinstance(small, int) else small


def _at(config, path):
    """Return a size of a config, or None; where it is 0 or None, what it counts is not there."""
    for key in path.split("."):
        if key not in config:
            return None
        config = config[key]
    return config


def skip_without(dataset, tfds=None):
    if dataset == "mini_imagenet" and not pathlib.Path("data/mini_imagenet").is_dir():
        pytest.skip("there is no folder data/mini_imagenet")
    where = os.environ.get("TFDS_DATA_DIR")
    folders = {"omniglot": "omniglot", "text": "tiny_shakespeare"}
    folder = (folders | dict.fromkeys(("cifar_fs", "fc100"), "cifar100")).get(dataset)
    if dataset == "training_run" and tfds != "digits":
        folder = tfds
    if folder and not (where and (pathlib.Path(where) / folder).is_dir()):
        pytest.skip(f"TFDS_DATA_DIR does not hold {folder}")
