"""From a config to a language-modelling task, and to the parts of a learned loss weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from metalearn._utils.checks import pick
from metalearn.algorithms import (
    DomainWeights,
    ExampleWeights,
    LossWeights,
    TokenWeights,
    bounded,
    mean_one,
    unbounded,
)
from metalearn.datasets import Corruption, Text, read_text
from metalearn.experiments import keys
from metalearn.model import Model
from metalearn.models import Architecture

WEIGHTINGS = {"domain": DomainWeights, "example": ExampleWeights, "token": TokenWeights}
SQUASHES = {"bounded": bounded, "unbounded": unbounded}
NORMALIZATIONS = {"none": None, "mean_one": mean_one}


def texts(config: Mapping[str, Any]) -> dict[str, Text]:
    """Read a text dataset: tasks to train on, to choose by, and to report.

    The inner loop always reads the training split, but for its last `held_out` share: that
    is what the outer loss of training reads. Validation and test read their own split, and
    train for `eval_steps`. Where what is learned is how to train (`fresh`), they train on their
    own split too, but for its last `held_out` share, which the outer loss reads.
    """
    options = dict(config)
    fresh = options.pop("fresh", False)
    name, feature = options.pop("tfds"), options.pop("feature")
    held_out, eval_steps = options.pop("held_out"), options.pop("eval_steps")
    if not 0 < held_out < 1:
        raise ValueError(
            f"dataset.held_out={held_out} is the share of the training text that the inner loop "
            "does not read, above 0 and below 1. Take one such as 0.1."
        )
    options["corruption"] = corruption(options.pop("corruption"))
    queries = {"queries": options.pop("eval_queries"), "probes": options.pop("eval_probes")}
    read = {split: read_text(name, split, feature=feature) for split in SPLITS}
    cuts = {split: round(len(text) * (1 - held_out)) for split, text in read.items()}
    inner, judge = read["train"][: cuts["train"]], read["train"][cuts["train"] :]
    made = {"train": Text.create(inner, judge, **options)}
    options |= {**queries, "inner_steps": eval_steps}
    for split in SPLITS[1:]:
        text, cut = read[split], cuts[split]
        parts = (text[:cut], text[cut:]) if fresh else (inner, text)
        made[split] = Text.create(*parts, **options)
    return made


SPLITS = ("train", "validation", "test")


def corruption(config: Mapping[str, Any]) -> Corruption | None:
    """Build a corruption; a share of zero is none."""
    if not config["share"]:
        return None
    given: dict[str, Any] = {key: value for key, value in config.items() if value is not None}
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Corruption(**given)


def loss_weights(
    network: Model, options: dict[str, Any], inner: optax.GradientTransformation
) -> LossWeights:
    """Build the learner of loss weights around a model."""
    return LossWeights(
        network,
        weighting(options["weighting"]),
        inner,
        pick(SQUASHES, options["squash"], "squash"),
        pick(NORMALIZATIONS, options["normalize"], "normalization"),
        through_features=options["through_features"],
    )


def weighting(config: Mapping[str, Any]) -> Any:
    """Build a weighting by name, from those of its options that are set."""
    options = {key: value for key, value in dict(config).items() if value is not None}
    build: Any = pick(WEIGHTINGS, options.pop("name"), "weighting")
    keys.check_call(f"weighting {config['name']!r}", build, options)
    return build(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def architecture(vocabulary: int, options: Mapping[str, Any]) -> Architecture:
    """Build a transformer's architecture for a vocabulary."""
    return Architecture(vocabulary, **options)
