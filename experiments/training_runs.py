"""From a config to FDS, its outer rule, and the training runs that it learns from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn import Tasks
from metalearn._utils.checks import pick
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
    """Training runs on fresh splits, those to choose a checkpoint by, and the run to report."""

    train: Tasks
    validation: Tasks | None  # None where nothing is held out
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
    """Read a dataset of images as training runs.

    Hyperparameters are learned on runs that never see the last `held_out` of the training split,
    neither to train on nor to judge by. A validation run is the final run in small: it trains on
    all that they see, and is judged by what is held out. The final one trains on the whole
    training split and is judged by the test split.
    """
    train, test = (
        read_images(config["tfds"], split, data_dir=config["data_dir"])
        for split in ("train", "test")
    )
    noisy = with_label_noise(train, config["label_noise"], config["noise_seed"]).labels
    seen = kept(len(noisy), config.get("held_out", 0.0))
    told = {"validation": config["validation"], "training_targets": noisy[:seen]}
    runs = TrainingRuns.create(train.inputs[:seen], train.labels[:seen], **told)
    validation = None
    if seen < len(noisy):
        unseen = train.inputs[seen:], train.labels[seen:]
        validation = HeldOut.create(train.inputs[:seen], noisy[:seen], *unseen)
    final = HeldOut.create(train.inputs, noisy, *test)
    image = jax.ShapeDtypeStruct((1, *train.inputs.shape[1:]), jnp.float32)
    return Runs(runs, validation, final, image, int(train.labels.max()) + 1)


def kept(examples: int, held_out: float) -> int:
    """Return how many of the training examples are left where a share of them is held out.

    Raises:
      ValueError: for a share that leaves none on a side; 0 holds nothing out.
    """
    if not 0 <= held_out < 1:
        raise ValueError(
            f"dataset.held_out={held_out} is the share of the training split that evaluations on "
            "the way are judged by, from 0 (none of it, and no evaluations) to below 1. Take one "
            "such as 0.1."
        )
    count = round(held_out * examples)
    if (held_out and not count) or count == examples:
        raise ValueError(
            f"dataset.held_out={held_out} of {examples} training examples is {count} of them, "
            "which leaves none on one side. Take a share such as 0.1, or 0 to hold nothing out."
        )
    return examples - count
