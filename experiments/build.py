"""From a config to objects: literal tables from name to class, and nothing clever.

Config objects stop here; what these functions return takes plain arguments. A name
that is in no table is refused with the names that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn import (
    ES,
    PES,
    Algorithm,
    Forward,
    InverseVariance,
    Layout,
    MetaGradient,
    MixedFlow,
    Reverse,
    Tasks,
    Trainer,
    Truncation,
)
from metalearn._utils import strict_json
from metalearn._utils.checks import above, pick
from metalearn.algorithms import (
    FDS,
    MAML,
    LearningRates,
    LossWeights,
    cross_entropy,
    fds_rule,
    in_ranges,
    squared_error,
)
from metalearn.datasets import ClassIndex, FewShot, Sinusoid, digits, omniglot
from metalearn.experiments import devices, keys, language, learned_optimizers, training_runs
from metalearn.experiments.cli import values
from metalearn.models import (
    NNX,
    Architecture,
    Haiku,
    Linen,
    Model,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)
from metalearn.optimizers import reversible

ENGINES = {
    "reverse": Reverse,
    "forward": Forward,
    "mixed_flow": MixedFlow,
    "es": ES,
    "pes": PES,
    "inverse_variance": InverseVariance,  # of the pathwise derivative and "es"
}
OPTIMIZERS = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "reversible_adam": reversible.adam,  # its steps can be undone
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "lion": optax.lion,
}
SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, rate / 10, max(steps - 1, 1)),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, max(steps, 1)),
}
OBJECTIVES = {"cross_entropy": cross_entropy, "squared_error": squared_error}
NETWORKS = {
    "mlp": "MLP",
    "conv_net": "ConvNet",
    "le_net": "LeNet",
    "wide_res_net": "WideResNet",
    "transformer": "Transformer",
}


class Splits(NamedTuple):
    """Tasks to train on, to choose by, and to report; and what a model sees of them."""

    train: Tasks
    validation: Tasks | None  # disjoint from those to train on; None: there are none
    test: Tasks
    inputs: jax.ShapeDtypeStruct  # one batch of inputs, [1, ...]
    outputs: int  # of the network: ways, or the dimension of a regression


def trainer(config: Mapping[str, Any], splits: Splits, layout: Layout | None = None) -> Trainer:
    """Build the trainer that a config describes, with what `engine="auto"` chose if it did."""
    added = {
        "truncation": {"steps": None},
        "isolate": False,
        "segment": None,
    }  # that configs did not always have
    config = {**added, **config, **config.get("auto", {})}
    learner = algorithm(config["algorithm"], model(config["model"], splits))
    options = {**config.get("engine_options", {}), **devices.tangents(layout)}
    return Trainer(
        learner,
        engine(config["engine"], options),
        outer_optimizer(config["optimizer"], config["steps"], learner),
        tasks_per_step=config["tasks_per_step"],
        chunk=config["chunk"],
        truncation=truncation(config["truncation"]),
        isolate=config["isolate"],
        layout=layout,
        segment=config["segment"],
    )


def truncation(config: Mapping[str, Any]) -> Truncation | None:
    """Build a truncation; None, whole inner runs, where its number of steps is not set."""
    if config["steps"] is not None:
        return Truncation(**config)
    if config.get("shortest") is not None:
        raise ValueError(
            f"truncation.shortest={config['shortest']} is of truncated runs, but runs are whole: "
            "truncation.steps is not set. Set it, or leave both."
        )
    return None


def set_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of an engine that are set: None is not, nor is what is empty."""
    return {key: value for key, value in options.items() if value not in (None, "", (), [])}


def engine(name: str, options: Mapping[str, Any] | None = None) -> MetaGradient:
    """Build an engine by its name in `ENGINES`, with the options that are set."""
    given = {key: _plain(value) for key, value in set_options(options or {}).items()}
    build: Any = pick(ENGINES, name, "engine")
    build = _inverse_variance if build is InverseVariance else build
    try:
        keys.check_call(f"engine {name!r}", build, given)
    except ValueError as error:
        raise ValueError(
            f"{error} What a config has set for another engine is cleared by "
            "--config.engine_options.KEY= with nothing behind it."
        ) from None
    return build(**given)


def _inverse_variance(pairs: int = 4, sigma: float = 0.01) -> InverseVariance:
    return InverseVariance(ES(pairs, sigma))


def optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build an optax optimizer from its name and its other arguments."""
    options = {key: value for key, value in config.items() if value is not None}
    name = options.pop("name")
    make = pick(OPTIMIZERS, name, "optimizer")
    keys.check_call(f"optimizer {name!r}", make, options)
    return make(**options)


def outer_optimizer(
    config: Mapping[str, Any], steps: int, learner: Algorithm | None = None
) -> optax.GradientTransformation:
    """Build the outer optimizer, its learning rate on a schedule over the outer steps.

    That of FDS keeps hyperparameters in their ranges, and may be "fds_rule".
    """
    options = {key: value for key, value in config.items() if value is not None}
    schedule = pick(SCHEDULES, options.pop("schedule"), "schedule")
    clip = options.pop("clip", None)
    above("optimizer", 0, clip=clip)
    hyperparameters = learner.hyperparameters if isinstance(learner, FDS) else None
    if options["name"] == "fds_rule" and hyperparameters is not None:
        del options["name"]
        if clip is not None:
            raise ValueError("`fds_rule` takes signs, which no clip changes: leave `clip` unset.")
        made = schedule(1.0, steps)
        guarded = options.pop("guarded", True)
        if not guarded:
            options["tolerance"] = None
        keys.check_call("outer optimizer 'fds_rule'", fds_rule, options, 1)
        options["schedule"] = made if callable(made) else None
        return fds_rule(hyperparameters, **options, steps=steps if guarded else None)
    if "learning_rate" not in options:
        raise ValueError(f"The outer optimizer {options['name']!r} needs a learning_rate.")
    made = optimizer({**options, "learning_rate": schedule(options["learning_rate"], steps)})
    if clip is not None:
        made = optax.chain(optax.clip_by_global_norm(clip), made)
    return made if hyperparameters is None else in_ranges(made, hyperparameters)


def algorithm(config: Mapping[str, Any], network: Model) -> Algorithm:
    """Build an algorithm around a model."""
    options = dict(config)
    name = options.pop("name")
    build = pick(ALGORITHMS, name, "algorithm")
    keys.check(f"algorithm {name!r}", options, keys.ALGORITHMS[name])
    return build(network, options)


def _loss_weights(network: Model, options: dict[str, Any]) -> LossWeights:
    return language.loss_weights(network, options, optimizer(options.pop("optimizer")))


def _maml(network: Model, options: dict[str, Any]) -> MAML:
    inner = optimizer(options.pop("optimizer"))
    objective = pick(OBJECTIVES, options.pop("objective"), "objective")
    return MAML(network, objective, inner, **options)


def _learning_rates(network: Model, options: dict[str, Any]) -> LearningRates:
    inner = optimizer({**options.pop("optimizer"), "learning_rate": 1.0})
    objective = pick(OBJECTIVES, options.pop("objective"), "objective")
    return LearningRates(network, objective, inner, **options)


ALGORITHMS = {
    "fds": training_runs.fds,
    "learned_optimizer": learned_optimizers.learned_optimizer,
    "learning_rates": _learning_rates,
    "loss_weights": _loss_weights,
    "maml": _maml,
}


def model(config: Mapping[str, Any], splits: Splits) -> Model:
    """Build a network of a library, sized for the inputs and outputs of a dataset."""
    options = {key: _plain(value) for key, value in dict(config).items()}
    library = pick(LIBRARIES, options.pop("library"), "model library")
    name = options.pop("name")
    network = pick(NETWORKS, name, "network")
    if network == "Transformer":
        keys.check_call("network 'transformer'", Architecture, options, 1)
        options = {"architecture": language.architecture(splits.outputs, options)}
    return library(network, splits, options)


def _linen(network: str, splits: Splits, options: dict[str, Any]) -> Model:
    build, sizes = getattr(linen_networks, network), _outputs(network, splits)
    keys.check_call(f"network {network!r}", build, options, len(sizes))
    return Linen(build(*sizes, **options), splits.inputs, train_flag)


def _haiku(network: str, splits: Splits, options: dict[str, Any]) -> Model:
    build, sizes = getattr(haiku_networks, network), _outputs(network, splits)
    keys.check_call(f"network {network!r}", build, options, len(sizes))

    def forward(x: jax.Array, train: bool) -> jax.Array:
        return build(*sizes, **options)(x, train)

    return Haiku(forward, splits.inputs, train_flag)


def _nnx(network: str, splits: Splits, options: dict[str, Any]) -> Model:
    shape = splits.inputs.shape[1:]
    first = splits.inputs.size if network == "MLP" else shape
    sizes = () if network == "Transformer" else (first, splits.outputs)
    build = getattr(nnx_networks, network)
    keys.check_call(f"network {network!r}", build.__init__, options, 1 + len(sizes))
    return NNX(lambda rngs: build(*sizes, **options, rngs=rngs), train_flag)


def _outputs(network: str, splits: Splits) -> tuple[int, ...]:
    """Return the number of outputs; an architecture has it already."""
    return () if network == "Transformer" else (splits.outputs,)


LIBRARIES = {"linen": _linen, "nnx": _nnx, "haiku": _haiku}


def splits(config: Mapping[str, Any]) -> Splits:
    """Read a dataset and make its three distributions over tasks."""
    options = dict(config)
    name = options.pop("name")
    read = pick(DATASETS, name, "dataset")
    keys.check(f"dataset {name!r}", options, keys.DATASETS[name])
    return read(options)


def _few_shot(read: Any, options: dict[str, Any]) -> Splits:
    shape = {"ways": options.pop("ways"), "shots": options.pop("shots")}
    queries = {"train": options.pop("queries")}
    queries["validation"] = queries["test"] = options.pop("eval_queries")
    indices = {name: read(name, **options) for name in queries}
    made = {name: _tasks(name, index, shape, queries[name]) for name, index in indices.items()}
    image = jax.ShapeDtypeStruct((1, *indices["train"].examples.shape[2:]), jnp.float32)
    return Splits(made["train"], made["validation"], made["test"], image, shape["ways"])


def _tasks(split: str, index: ClassIndex, shape: dict[str, int], queries: int) -> FewShot:
    try:
        return FewShot.create(index, **shape, queries=queries)
    except ValueError as error:
        raise ValueError(f"In the {split} split: {error}") from error


def _sinusoid(options: dict[str, Any]) -> Splits:
    evaluated = options.pop("eval_queries")
    train = Sinusoid(**options)
    held_out = Sinusoid(**{**options, "queries": evaluated})  # waves never repeat
    return Splits(train, held_out, held_out, jax.ShapeDtypeStruct((1, 1), jnp.float32), 1)


def _text(options: dict[str, Any]) -> Splits:
    made = language.texts(options)
    window = jax.ShapeDtypeStruct((1, made["train"].length), jnp.int32)
    return Splits(**made, inputs=window, outputs=made["train"].vocabulary)


def _training_run(options: dict[str, Any]) -> Splits:
    return _runs(training_runs.read(options))


def _optimizer_runs(options: dict[str, Any]) -> Splits:
    return _runs(learned_optimizers.read(options))


def _runs(made: training_runs.Runs) -> Splits:
    return Splits(*made)


DATASETS = {
    "digits": lambda options: _few_shot(digits, options),
    "omniglot": lambda options: _few_shot(omniglot, options),
    "sinusoid": _sinusoid,
    "text": _text,
    "training_run": _training_run,
    "optimizer_runs": _optimizer_runs,
}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def to_json(config: Any) -> dict[str, Any]:
    """Return an ml-collections config as plain JSON values (tuples become lists)."""
    try:
        plain = strict_json.parse(config.to_json(), "The config", nonfinite=True)
    except (TypeError, RecursionError) as error:
        raise ValueError(
            "A run keeps its config as JSON, and this one holds what JSON does not: "
            f"{str(error).partition('. Instead')[0]}. Write numbers, texts, true, false and tuples "
            "of those."
        ) from error
    values.check(plain)
    return plain
