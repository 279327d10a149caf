"""From a config to a learned optimizer: its rule, the problem it trains on, and the runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import at_least, pick
from metalearn.algorithms import (
    HypergradientRule,
    LearnedOptimizer,
    Network,
    PerParameter,
    PointwiseGRU,
    PointwiseMLP,
    Problem,
    ReciprocalRoot,
    Streamed,
    Supervised,
    TunedRule,
    UpdateRule,
    cross_entropy,
)
from metalearn.datasets import Images, TrainingRuns, read_images
from metalearn.experiments.training_runs import Runs, hyperparameter, kept
from metalearn.model import Model

MAKES = {"sgd": optax.sgd, "adam": optax.adam, "adamw": optax.adamw, "rmsprop": optax.rmsprop}
NETWORKS: dict[str, Any] = {
    "mlp": PointwiseMLP,
    "gru": lambda hidden: _gru(hidden),
}


def _gru(hidden: tuple[int, ...]) -> PointwiseGRU:
    if len(hidden) != 1:
        raise ValueError(
            f"The network 'gru' has one hidden size, not hidden={hidden}. Take one such as (8,)."
        )
    return PointwiseGRU(*hidden)


def learned_optimizer(network: Model, options: dict[str, Any]) -> LearnedOptimizer:
    """Build the learner of an optimizer around the model that it trains."""
    made = rule(options.pop("rule"))
    problem = pick(PROBLEMS, options.pop("problem"), "problem")(network, options.pop("batch"))
    return LearnedOptimizer(problem, made, **options)


def rule(config: Mapping[str, Any]) -> UpdateRule:
    """Build an update rule by name: "per_parameter", "tuned" or "hypergradient"."""
    return pick(RULES, config["name"], "update rule")(config)


def _per_parameter(config: Mapping[str, Any]) -> PerParameter:
    network: Network = pick(NETWORKS, config["network"], "network")(tuple(config["hidden"]))
    return PerParameter(
        network=network,
        step_scale=config["step_scale"],
        magnitude_scale=config["magnitude_scale"],
        base=_tuned(config) if config["base"] else None,
        factors=(ReciprocalRoot(),) if config["preconditioned"] else (),
    )


def _tuned(config: Mapping[str, Any]) -> TunedRule:
    options = {key: value for key, value in config["base"].items() if value is not None}
    make: Any = pick(MAKES, options.pop("name"), "optimizer")
    learned = {name: hyperparameter(h) for name, h in options.pop("hyperparameters").items()}
    return TunedRule(functools.partial(make, **options) if options else make, learned)


RULES = {
    "per_parameter": _per_parameter,
    "tuned": _tuned,
    "hypergradient": lambda config: HypergradientRule(),
}


def _supervised(network: Model, batch: int) -> Problem:
    return Supervised(network, cross_entropy, batch)


PROBLEMS = {
    "supervised": _supervised,
    "streamed": lambda network, batch: Streamed(network),  # the tasks have their batches
}


def read(config: Mapping[str, Any]) -> Runs:
    """Read a dataset of images: runs on the training split, and on images never seen in those.

    What is learned is how to train, so validation and test runs train too, from fresh
    initialisations: on the last `held_out` of the training split, and on the test split.
    """
    at_least("dataset", 1, most=config["most"])

    def runs(inputs: Any, labels: Any) -> TrainingRuns:
        images = Images(inputs[: config["most"]], labels[: config["most"]])
        return TrainingRuns.create(*images, validation=config["validation"])

    images, test = (
        read_images(config["tfds"], split, data_dir=config["data_dir"])
        for split in ("train", "test")
    )
    seen = kept(len(images.labels), config.get("held_out", 0.0))
    train = runs(images.inputs[:seen], images.labels[:seen])
    unseen = images.inputs[seen:], images.labels[seen:]
    validation = runs(*unseen) if len(unseen[1]) else None
    image = jax.ShapeDtypeStruct((1, *train.inputs.shape[1:]), jnp.float32)
    return Runs(train, validation, runs(*test), image, int(images.labels.max()) + 1)
