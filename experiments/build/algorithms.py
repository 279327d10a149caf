"""From a config to an algorithm around a model.

An algorithm that `metalearn.algorithms` exports is built by its constructor: the keys of a config
are its arguments. `model` is the network; an argument `optimizer`, or one whose annotation is an
optax transformation, is a config of an optimizer; an argument `objective` is the name of one.
Those that a config describes in other words have a builder of their own in `SPECIAL`.

An algorithm of the user's own, `name = "my_package.my_file:MyAlgorithm"`, is built by its
constructor in the same way; or by a function that returns one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from metalearn import Algorithm, algorithms
from metalearn._utils.checks import pick
from metalearn.algorithms import (
    FDS,
    DataRater,
    DomainWeights,
    ExampleWeights,
    HypergradientRule,
    Hyperparameter,
    LearnedOptimizer,
    LearningRates,
    LossWeights,
    MirrorDescent,
    PerParameter,
    PointwiseGRU,
    PointwiseMLP,
    Problem,
    ReciprocalRoot,
    Streamed,
    Supervised,
    TokenWeights,
    TunedRule,
    UpdateRule,
    bounded,
    cross_entropy,
    jitter,
    mean_one,
    text_rater,
    unbounded,
)
from metalearn.experiments.build.datasets import Sizes, Splits
from metalearn.experiments.build.registry import (
    MASTER,
    OBJECTIVES,
    Exports,
    as_tuple,
    check_call,
    check_kind,
    find,
    optimizer,
    optimizer_function,
    parameters,
    without_unset,
)
from metalearn.model import Model
from metalearn.optimizers.master_weights import master_weights

AUGMENTATIONS = {"none": None, "jitter": jitter}
WEIGHTINGS = {"domain": DomainWeights, "example": ExampleWeights, "token": TokenWeights}
SQUASHES = {"bounded": bounded, "unbounded": unbounded}
NORMALIZATIONS = {"none": None, "mean_one": mean_one}
RATERS: dict[str, Callable[..., Model]] = {"text": text_rater}

AnySizes = TypeVar("AnySizes", Sizes, Splits)


def algorithm(
    config: Mapping[str, Any],
    network: Model | None,
    master: bool = False,
    outputs: int | None = None,
) -> Algorithm:
    """Build an algorithm around a model.

    Args:
      config: its name and arguments.
      network: the model; None is for an algorithm that takes none.
      master: whether its inner optimizer sums updates in float32: `master_weights`.
      outputs: classes of a task, for an algorithm with a head of its own.
    """
    options = dict(config)
    if master:
        options = _with_master_weights(options)
    name = options.pop("name")
    build = find(ALGORITHMS, name, "algorithm", (Algorithm,))
    check_call(f"algorithm {name!r}", options, build, filled=filled(build))
    if has_own_head(build):
        options["ways"] = outputs
    if "outputs" in filled(build):
        options["outputs"] = outputs
    if name in SPECIAL:
        return SPECIAL[name](network, **options)
    return check_kind(construct(build, network, options), name, "algorithm", (Algorithm,))


def construct(
    build: Callable[..., Algorithm], network: Model | None, options: Mapping[str, Any]
) -> Algorithm:
    """Build an algorithm by its constructor, each value made what its argument takes."""
    takes = parameters(build)
    values = {key: _converted(takes[key], value) for key, value in options.items()}
    return build(**({"model": network} if "model" in takes else {}), **values)


def _converted(parameter: inspect.Parameter, value: Any) -> Any:
    hint = str(parameter.annotation)
    transforms = "GradientTransformation" in hint or parameter.name in INNER_OPTIMIZERS
    if isinstance(value, Mapping) and transforms:
        return partial_optimizer(value) if "Callable" in hint else optimizer(value)
    if parameter.name == "objective" or hint.rpartition(".")[2] == "Objective":
        return objective_function(value)
    return as_tuple(value)


def takes_model(name: str) -> bool:
    """Return whether an algorithm is built around a model."""
    return "model" in parameters(find(ALGORITHMS, name, "algorithm", (Algorithm,)))


def has_own_head(build: Callable[..., Any]) -> bool:
    """Return whether what builds an algorithm is a class that has `own_head`."""
    return isinstance(build, type) and issubclass(build, Algorithm) and build.own_head


def filled(build: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments of an algorithm that do not come from its section of a config."""
    if has_own_head(build):
        return ("model", "ways")
    return ("model", "outputs") if build is _data_rater else ("model",)


def sized_for(config: Mapping[str, Any], sizes: AnySizes) -> AnySizes:
    """Return what the network of a config is sized by.

    It has no outputs for an algorithm with a head of its own, and more inputs than an example has
    features for one that appends to them.

    Args:
      config: of the algorithm.
      sizes: of the dataset, alone or with its splits.
    """
    build: Any = find(ALGORITHMS, config["name"], "algorithm", (Algorithm,))
    if not (isinstance(build, type) and issubclass(build, Algorithm)):
        return sizes
    if build.own_head:
        sizes = sizes._replace(outputs=None)
    if build.extra_inputs:
        default = parameters(build)[build.extra_inputs].default
        more = config.get(build.extra_inputs, default)
        shape = (*sizes.inputs.shape[:-1], sizes.inputs.shape[-1] + more)
        sizes = sizes._replace(inputs=jax.ShapeDtypeStruct(shape, sizes.inputs.dtype))
    return sizes


def _with_master_weights(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an algorithm, its inner optimizer marked to sum in float32."""
    name = options["name"]
    there = [key for key in INNER_OPTIMIZERS if isinstance(options.get(key), Mapping)]
    scaled = name == "learning_rates" or options.get("learned_rates") is not None
    if not there or scaled:
        why = (
            "multiplies the updates of its inner optimizer by learned rates, which must be the "
            "last thing that happens to them"
            if scaled
            else "has no inner optimizer in its config"
        )
        raise ValueError(
            "precision.master_weights=True lets the inner optimizer sum its updates in float32, "
            f"but the algorithm {name!r} {why}. Leave it False, and parameters in float32 "
            "(precision.params)."
        )
    return {**options, **{key: {**options[key], MASTER: True} for key in there}}


INNER_OPTIMIZERS = ("optimizer", "inner_optimizer")  # arguments, with or without an annotation


def objective_function(name: str) -> Callable[..., Any]:
    """Return an objective by its name in `OBJECTIVES`, or by the import path of a function."""
    return find(OBJECTIVES, name, "objective", ())


def _learning_rates(
    model: Model,
    optimizer: Mapping[str, Any],
    objective: str,
    initial: float = LearningRates.initial,
    mean_over_examples: bool = LearningRates.mean_over_examples,
) -> Algorithm:
    """Build `LearningRates` around a model; the optimizer's own rate is one."""
    rate = optimizer.get("learning_rate")
    if rate not in (None, 1):
        raise ValueError(
            f"`algorithm.optimizer.learning_rate={rate!r}`: the algorithm 'learning_rates' learns "
            "the rate of each parameter, and its inner optimizer has none of its own. Set this "
            f"one to 1, and `algorithm.initial`, now {initial!r}, to where the learned ones begin."
        )
    options = {
        "optimizer": {**optimizer, "learning_rate": 1.0},
        "objective": objective,
        "initial": initial,
        "mean_over_examples": mean_over_examples,
    }
    return construct(LearningRates, model, options)


def _fds(
    model: Model,
    optimizer: Mapping[str, Any],
    objective: str,
    augment: str,
    hyperparameters: Mapping[str, Any],
    inner_steps: int,
    batch: int,
    eval_steps: int | None = None,
) -> FDS:
    """Build FDS around a model; options of the optimizer that are not learned are fixed.

    Args:
      model: see `FDS`, here and below where nothing else is said.
      optimizer: the name of the inner optimizer, and those of its arguments that are fixed.
      objective: the name of the inner and of the outer loss.
      augment: of the inner batches: "none" or "jitter".
      hyperparameters: low, high, start, windows, space and shape of each, by name.
      inner_steps: T.
      batch: examples of an inner step.
      eval_steps: inner steps of an evaluation; None: `inner_steps`.
    """
    make = partial_optimizer(optimizer)
    loss = objective_function(objective)
    augmentation = pick(AUGMENTATIONS, augment, "augmentation")
    learned = {name: hyperparameter(h) for name, h in hyperparameters.items()}
    return FDS(model, learned, inner_steps, batch, make, loss, augmentation, eval_steps)


def partial_optimizer(config: Mapping[str, Any]) -> Callable[..., Any]:
    """Return an optimizer as a function of what a config of it leaves open."""
    fixed = without_unset(config)
    master = fixed.pop(MASTER, False)
    make = optimizer_function(fixed.pop("name"))
    make = functools.partial(make, **fixed) if fixed else make
    return _summed_in_float32(make) if master else make


def _summed_in_float32(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the same arguments, of the optimizer with master weights."""

    @functools.wraps(make)
    def summed(*args: Any, **options: Any) -> Any:
        return master_weights(make(*args, **options))

    summed.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    return summed


def hyperparameter(config: Mapping[str, Any]) -> Hyperparameter:
    """Build a hyperparameter; lists become tuples."""
    return Hyperparameter(**without_unset(config))


def _loss_weights(
    model: Model,
    optimizer: Mapping[str, Any],
    weighting: Mapping[str, Any],
    squash: str,
    normalize: str,
    through_features: bool,
) -> Algorithm:
    """Build `LossWeights` around a model.

    Args:
      model: the network that is trained.
      optimizer: the name of the inner optimizer, and its arguments.
      weighting: "domain", "example" or "token", and its options.
      squash: scores to weights: "bounded", which limits their ratio, or "unbounded".
      normalize: weights of a batch to weights: "mean_one" or "none".
      through_features: whether the meta-gradient includes the path from eta through theta to the
        features of an example, for one more forward pass per step.
    """
    values = {
        "optimizer": optimizer,
        "weighting": build_weighting(weighting),
        "squash": pick(SQUASHES, squash, "squash"),
        "normalize": pick(NORMALIZATIONS, normalize, "normalization"),
        "through_features": through_features,
    }
    return construct(LossWeights, model, values)


def _data_rater(
    model: Model, optimizer: Mapping[str, Any], rater: Mapping[str, Any], outputs: int
) -> Algorithm:
    """Build `DataRater` around a model.

    Args:
      model: the network that is trained.
      optimizer: the name of the inner optimizer, and its arguments.
      rater: the network that scores examples: "text", and its options.
      outputs: the number of classes, or of tokens, which the rater is sized by.
    """
    options = without_unset(rater)
    name = options.pop("name")
    build: Any = find(RATERS, name, "rater", ())
    check_call(f"rater {name!r}", options, build, filled=("vocabulary",))
    network = check_kind(build(outputs, **options), name, "rater", (Model,))
    return construct(DataRater, model, {"optimizer": optimizer, "rater": network})


def build_weighting(config: Mapping[str, Any]) -> Any:
    """Build a weighting by name, from those of its options that are set."""
    options = without_unset(config)
    build: Any = pick(WEIGHTINGS, options.pop("name"), "weighting")
    check_call(f"weighting {config['name']!r}", options, build)
    return build(**options)


def _learned_optimizer(
    model: Model,
    rule: Mapping[str, Any],
    problem: str,
    batch: int | None,
    inner_steps: int,
    judge: str = LearnedOptimizer.judge,
    cap: float | None = LearnedOptimizer.cap,
) -> LearnedOptimizer:
    """Build `LearnedOptimizer` around a model.

    Args:
      model: the network that the learned optimizer trains.
      rule: "per_parameter", "tuned", "hypergradient" or "mirror_descent", and its options.
      problem: "supervised", a whole dataset in shuffled epochs, or "streamed", batches of a text.
      batch: examples of an inner step of the problem "supervised".
      inner_steps: T.
      judge: the outer loss: "training" or "validation".
      cap: the upper bound of a training loss in the outer loss; None: no bound.
    """
    update_rule = build_rule(rule)
    trained = pick(PROBLEMS, problem, "problem")(model, batch)
    return LearnedOptimizer(trained, update_rule, inner_steps, judge, cap)


def build_rule(config: Mapping[str, Any]) -> UpdateRule:
    """Build an update rule by its name in `RULES`."""
    return pick(RULES, config["name"], "update rule")(config)


def _per_parameter(config: Mapping[str, Any]) -> PerParameter:
    network = pick(RULE_NETWORKS, config["network"], "network")(tuple(config["hidden"]))
    return PerParameter(
        network=network,
        step_scale=config["step_scale"],
        magnitude_scale=config["magnitude_scale"],
        base=_tuned(config) if config["base"] else None,
        factors=(ReciprocalRoot(),) if config["preconditioned"] else (),
    )


def _tuned(config: Mapping[str, Any]) -> TunedRule:
    base = dict(config["base"])
    learned = {name: hyperparameter(h) for name, h in base.pop("hyperparameters").items()}
    return TunedRule(partial_optimizer(base), learned)


def _gru(hidden: tuple[int, ...]) -> PointwiseGRU:
    if len(hidden) != 1:
        raise ValueError(
            f"The network 'gru' has one hidden size, not hidden={hidden}. Take one such as (8,)."
        )
    return PointwiseGRU(*hidden)


def _supervised(network: Model, batch: Any) -> Problem:
    return Supervised(network, cross_entropy, batch)


def _streamed(network: Model, batch: Any) -> Problem:
    del batch  # the tasks have their batches
    return Streamed(network)


RULES: dict[str, Callable[[Mapping[str, Any]], UpdateRule]] = {
    "per_parameter": _per_parameter,
    "tuned": _tuned,
    "hypergradient": lambda config: HypergradientRule(),
    "mirror_descent": lambda config: MirrorDescent(),
}
RULE_NETWORKS: dict[str, Callable[..., Any]] = {"mlp": PointwiseMLP, "gru": _gru}
PROBLEMS = {"supervised": _supervised, "streamed": _streamed}

SPECIAL: dict[str, Callable[..., Algorithm]] = {
    "data_rater": _data_rater,
    "fds": _fds,
    "learned_optimizer": _learned_optimizer,
    "learning_rates": _learning_rates,
    "loss_weights": _loss_weights,
}


def _is_algorithm(export: Any) -> bool:
    subclass = isinstance(export, type) and issubclass(export, Algorithm)
    return subclass and not inspect.isabstract(export)


ALGORITHMS = Exports(algorithms, _is_algorithm, SPECIAL)
