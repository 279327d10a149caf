"""From a config to FDS, its outer rule, and the training runs that it learns from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn import Tasks
from metalearn.algorithms import (
    FDS,
    Hyperparameter,
    cross_entropy,
    jitter,
    sgd,
    weighted_cross_entropy,
)
from metalearn.datasets import HeldOut, TrainingRuns, read_images, with_label_noise
from metalearn.model import Model
from metalearn.names import pick

OPTIMIZERS = {
    "sgd": sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
    "adopt": optax.contrib.adopt,
}
OBJECTIVES = {
    "cross_entropy": cross_entropy,
    "weighted_cross_entropy": weighted_cross_entropy,
}
AUGMENTATIONS = {"none": None, "jitter": jitter}


class Runs(NamedTuple):
    """Training runs on fresh splits, and the run that is reported."""

    train: Tasks
    test: Tasks
    inputs: jax.ShapeDtypeStruct  # one batch, [1, ...]
    outputs: int


def fds(network: Model, options: dict[str, Any]) -> FDS:
    """Build FDS around a model; options of the optimizer that are not learned are fixed."""
    fixed = {k: v for k, v in dict(options.pop("optimizer")).items() if v is not None}
    inner: Any = pick(OPTIMIZERS, fixed.pop("name"), "optimizer")
    objective = pick(OBJECTIVES, options.pop("objective"), "objective")
    augment = pick(AUGMENTATIONS, options.pop("augment"), "augmentation")
    learned = {name: hyperparameter(h) for name, h in options.pop("hyperparameters").items()}
    if fixed:
        inner = functools.partial(inner, **fixed)
    return FDS(network, learned, optimizer=inner, objective=objective, augment=augment, **options)


def hyperparameter(config: Mapping[str, Any]) -> Hyperparameter:
    """Build a hyperparameter; lists become tuples."""
    given: dict[str, Any] = {key: value for key, value in config.items() if value is not None}
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Hyperparameter(**given)


def read(config: Mapping[str, Any]) -> Runs:
    """Read a dataset of images, whole, as training runs."""
    train, test = (
        read_images(config["tfds"], split, data_dir=config["data_dir"])
        for split in ("train", "test")
    )
    noisy = with_label_noise(train, config["label_noise"], config["noise_seed"]).labels
    runs = TrainingRuns.create(*train, validation=config["validation"], training_targets=noisy)
    final = HeldOut.create(train.inputs, noisy, *test)
    image = jax.ShapeDtypeStruct((1, *train.inputs.shape[1:]), jnp.float32)
    return Runs(runs, final, image, int(train.labels.max()) + 1)
