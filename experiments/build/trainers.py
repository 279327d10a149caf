"""From a config to a trainer: engine, outer optimizer, truncation, and the layout over devices.

    mesh.tasks     devices that take tasks of their own; None: as many as tasks_per_step divides by
    mesh.data      devices that share the inner run of a task, for fewer tasks than devices
    mesh.model     pieces that eta is cut into, by `mesh.rules`
    mesh.tangents  devices that share the tangents of the engine "forward"
    mesh.rules     (pattern, axis or None, ...), ...: how an array of eta, or of an inner state, is
                   cut, axis by axis

The mesh does not change the results: a run can be resumed on another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn import (
    ES,
    Algorithm,
    InverseVariance,
    Layout,
    MetaGradient,
    Replay,
    Trainer,
    Truncated,
    Truncation,
    make_mesh,
)
from metalearn._utils.checks import above, at_least, counts, is_integer, nearest, pick
from metalearn.experiments.build.algorithms import algorithm, sized_for, takes_model
from metalearn.experiments.build.datasets import Sizes, Splits
from metalearn.experiments.build.models import model, wrapped
from metalearn.experiments.build.registry import (
    ENGINES,
    SCHEDULES,
    as_tuple,
    check_call,
    check_kind,
    find,
    optimizer,
    optimizer_function,
    parameters,
    without_unset,
)
from metalearn.experiments.configs import _common
from metalearn.loggers import WandbLogger
from metalearn.model import Model
from metalearn.optimizers.averaged import averaged
from metalearn.optimizers.master_weights import master_weights
from metalearn.sharding.batched_means import check_tasks, most_devices
from metalearn.sharding.mesh import AXES, DATA, MODEL, TANGENTS, TASKS, format_devices, remaining
from metalearn.sharding.partition import check_rules
from metalearn.training.faults import Faults


def trainer(
    config: Mapping[str, Any], sizes: Sizes | Splits, layout: Layout | None = None
) -> Trainer:
    """Build the trainer that a config describes, with what `engine="auto"` chose if it did.

    Args:
      config: of a run.
      sizes: of the data, which the network is sized by; the data are not needed.
      layout: of the trainer.
    """
    added = {
        "truncation": {"steps": None},
        "isolate": False,
        "segment": None,
        "replay": {},
        "precision": {},
        "lora": {},
    }  # that configs did not always have
    config = {**added, **config, **config.get("auto", {})}
    master = config["precision"].get("master_weights", False)
    network = _network(config, sizes)
    learner = algorithm(config["algorithm"], network, master, sizes.outputs)
    options = {**config.get("engine_options", {}), **_tangent_options(layout)}
    return Trainer(
        learner,
        engine(config["engine"], options),
        outer_optimizer(config["optimizer"], config["steps"], learner, master),
        tasks_per_step=config["tasks_per_step"],
        chunk=config["chunk"],
        truncation=truncation(config["truncation"]),
        isolate=config["isolate"],
        layout=layout,
        segment="auto" if config["segment"] == 0 else config["segment"],
        replay=replay(config["replay"], config["segment"]),
    )


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise ValueError for keys of a config file that nothing reads.

    The command line refuses them by itself. At the top level a config may have keys of its own: one
    that is almost a known one is refused.
    """
    known = [*_common.maml(), "dataset", "model", "steps", "eval_every", "checkpoint_every"]
    for key in config:
        if key not in (*known, "auto") and (hint := nearest(key, known)):
            raise ValueError(f"The config has a key {key!r}, which nothing reads.{hint}")
    check_call("section faults", config["faults"], Faults)
    named = {key: value for key, value in config["wandb"].items() if key != "name"}
    check_call("section wandb", named, WandbLogger, filled=("directory",))


def _network(config: Mapping[str, Any], sizes: Sizes | Splits) -> Model | None:
    """Build the model of a config; None where there is none and the algorithm takes none."""
    name = config["algorithm"]["name"]
    if config.get("model"):
        alone = sizes.sizes if isinstance(sizes, Splits) else sizes
        sized = sized_for(config["algorithm"], alone)
        return wrapped(model(config["model"], sized), config["lora"], config["precision"])
    if takes_model(name):
        raise ValueError(
            f"The algorithm {name!r} takes a model, and this config has none. Set config.model, "
            'such as {"name": "mlp", "library": "linen", "hidden": (32, 32)}.'
        )
    return None


def truncation(config: Mapping[str, Any]) -> Truncation | None:
    """Build a truncation; None, full unrolls, where its number of steps is not set."""
    options = without_unset(config)
    check_call("section truncation", {"steps": 0, **options}, Truncation)
    if "steps" in options:
        if "transform" in options:
            options["transform"] = optimizer({"name": options["transform"]})
        return Truncation(**options)
    for key in ("shortest", "transform"):
        if key in options:
            raise ValueError(
                f"truncation.{key}={options[key]} is of truncated unrolls, but unrolls are full: "
                "truncation.steps is not set. Set it, or leave both."
            )
    return None


def replay(config: Mapping[str, Any], segment: int | None) -> Replay:
    """Build what says where the states between segments are kept."""
    options = set_options(config)
    if options and segment is None:
        raise ValueError(
            f"replay.{min(options)}={options[min(options)]!r} says where states between segments "
            "are kept, but an outer step is one program: `segment` is not set. Set it, or leave "
            "both."
        )
    return Replay(**options)


def engine(name: str, options: Mapping[str, Any] | None = None) -> MetaGradient:
    """Build an engine by its name in `ENGINES`, or its import path, with the options set."""
    values = {key: as_tuple(value) for key, value in set_options(options or {}).items()}
    build = engine_builder(name)
    try:
        check_call(f"engine {name!r}", values, build)
    except ValueError as error:
        raise ValueError(
            f"{error} What a config has set for another engine is cleared by "
            "--config.engine_options.KEY= with nothing behind it."
        ) from None
    return check_kind(build(**values), name, "engine", (MetaGradient,))


def with_open_engine(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the default engine, for commands that try them all.

    Raises:
      ValueError: for a name of no engine.
    """
    if config["engine"] != "auto":
        engine_builder(config["engine"])
    return {**config, "engine": "mixed_flow", "engine_options": {}}


def engine_builder(name: str) -> Callable[..., MetaGradient]:
    """Return what builds an engine from the options of a config."""
    build = find(ENGINES, name, "engine", (MetaGradient,))
    own: dict[Any, Callable[..., MetaGradient]] = {
        InverseVariance: _inverse_variance,
        Truncated: _truncated,
    }
    return own.get(build, build)


def _inverse_variance(pairs: int = 4, sigma: float = 0.01) -> InverseVariance:
    """Build the mixture of `MixedFlow()` and `ES`, whose options these are; see `ES`."""
    return InverseVariance(ES(pairs, sigma))


def _truncated(last: int = 1, finite_difference: float | None = None) -> Truncated:
    """Build `Truncated` through `MixedFlow()`, with the options of a config."""
    return Truncated(last, finite_difference=finite_difference)


def set_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of an engine that are set: None is not, nor is what is empty."""
    return {key: value for key, value in options.items() if value not in (None, "", (), [])}


def outer_optimizer(
    config: Mapping[str, Any],
    steps: int,
    learner: Algorithm | None = None,
    master: bool = False,
) -> optax.GradientTransformation:
    """Build the outer optimizer, its learning rate on a schedule over the outer steps.

    It may be one that the algorithm brings (`Algorithm.outer_rules`), and goes through
    `Algorithm.outer_optimizer`. `average`: the decay of the average of eta that is what a run
    learns. `master`: whether it sums its updates in float32.
    """
    options = without_unset(config)
    schedule = pick(SCHEDULES, options.pop("schedule", "constant"), "schedule")
    clip = options.get("clip")
    above("optimizer", 0, clip=clip)
    rules = {} if learner is None else learner.outer_rules()
    if options["name"] in rules:
        name = options.pop("name")
        scale = schedule(1.0, steps)
        check_call(f"outer optimizer {name!r}", options, rules[name], filled=("schedule", "steps"))
        return rules[name](schedule=scale if callable(scale) else None, steps=steps, **options)
    options.pop("clip", None)
    average = options.pop("average", None)
    outer = optimizer(_scheduled(options, schedule, steps))
    if clip is not None:
        outer = optax.chain(optax.clip_by_global_norm(clip), outer)
    outer = master_weights(outer) if master else outer
    outer = outer if learner is None else learner.outer_optimizer(outer)
    return outer if average is None else averaged(outer, average)


def _scheduled(
    options: Mapping[str, Any], schedule: Callable[..., Any], steps: int
) -> dict[str, Any]:
    """Return the options of an optimizer, its learning rate as a schedule over the outer steps."""
    name = options["name"]
    if "learning_rate" in options:
        return {**options, "learning_rate": schedule(options["learning_rate"], steps)}
    if "learning_rate" in parameters(optimizer_function(name)):
        raise ValueError(f"The outer optimizer {name!r} needs a learning_rate.")
    if callable(schedule(1.0, steps)):
        raise ValueError(
            f"The outer optimizer {name!r} has no learning_rate, which the schedule of "
            "config.optimizer changes. Set schedule='constant', and any other in its own arguments."
        )
    return dict(options)


LARGEST_SEED = 2**63 - 1


def key_of(seed: int) -> jax.Array:
    """Return the key () of a seed, from 0 to 2^63 - 1: different seeds are different keys.

    `jax.random.key` takes the last 32 bits of an integer where JAX has no 64-bit ones, its
    default: key(2**32) is key(0), and key(-1) is key(2**32 - 1). Here both halves of a seed count.
    Below 2**32 the keys are those of `jax.random.key`.

    Raises:
      ValueError: for what is no such integer; a boolean is none.
    """
    if not is_integer(seed) or not 0 <= int(seed) <= LARGEST_SEED:
        raise ValueError(
            f"seed={seed!s:.80} is no seed: those are integers from 0 to {LARGEST_SEED}. Below 0 "
            "and above, two of them would draw the same numbers."
        )
    with jax.enable_x64(True):
        return jax.random.key(int(seed))


MESH: dict[str, Any] = {TASKS: None, DATA: 1, MODEL: 1, TANGENTS: 1, "rules": ()}


def layout(config: Mapping[str, Any]) -> Layout | None:
    """Build the layout of a config over the devices there are; None where one is enough.

    Raises:
      ValueError: for a mesh that the devices, the tasks or the engine do not fit.
    """
    config = {**config, **config.get("auto", {})}  # with the chunks that were chosen
    mesh = {**MESH, **config.get("mesh", {})}
    check_tasks(config["tasks_per_step"], config["chunk"])
    for key in mesh:
        pick(MESH, key, "axis or option of config.mesh")
    at_least("mesh", 1, **{axis: mesh[axis] for axis in AXES})
    counts("mesh", 1, **{axis: mesh[axis] for axis in (DATA, MODEL, TANGENTS)})
    _check(mesh, config)
    rules = tuple(map(_rule, mesh["rules"]))
    check_rules(rules, dict.fromkeys(AXES, 1))
    tasks = _most(mesh, config) if mesh[TASKS] is None else mesh[TASKS]
    if tasks * _inner(mesh) == 1 and jax.process_count() == 1:
        return None
    return Layout(make_mesh(tasks, mesh[MODEL], mesh[TANGENTS], mesh[DATA]), rules)


def _inner(mesh: Mapping[str, Any]) -> int:
    """Return the number of devices that share a task."""
    return math.prod(mesh[axis] for axis in (DATA, MODEL, TANGENTS))


def evaluation_layout(config: Mapping[str, Any]) -> Layout | None:
    """Build a layout to evaluate a run with, on other devices than those it was trained on."""
    mesh = {**config.get("mesh", {}), TASKS: None, TANGENTS: 1}
    if len(jax.devices()) % (mesh.get(DATA, 1) * mesh.get(MODEL, 1)):
        mesh |= {DATA: 1, MODEL: 1, "rules": ()}
    return layout({**config, "mesh": mesh})


def idle_devices(config: Mapping[str, Any], layout: Layout | None) -> str:
    """Say how many devices take no part, and why; "" where all do."""
    config = {**config, **config.get("auto", {})}
    used, total = 1 if layout is None else layout.mesh.size, len(jax.devices())
    if used == total:
        return ""
    chunks = "" if config["chunk"] is None else f" in chunks of {config['chunk']}"
    fewer = config["tasks_per_step"] < total
    shared = " config.mesh.data=N lets N devices share the inner run of a task." if fewer else ""
    return (
        f"devices: {used} of {total} take part. tasks_per_step={config['tasks_per_step']}{chunks} "
        f"does not divide among more, or config.mesh asks for no more.{shared}"
    )


def _tangent_options(layout: Layout | None) -> dict[str, Any]:
    """Return the options of the engine "forward" that spread its tangents over a layout."""
    if layout is None or layout.mesh.shape[TANGENTS] == 1:
        return {}
    return {"sharding": NamedSharding(layout.mesh, P(TANGENTS))}


def _rule(rule: Any) -> tuple[str, P]:
    words = list(rule) if isinstance(rule, list | tuple) else []
    if len(words) < 2 or not isinstance(words[0], str):
        raise ValueError(
            f"A rule of mesh.rules is a pattern and an axis or None for each axis of an array, "
            f"such as ('kernel$', None, 'model'), not {rule!r}."
        )
    axes = words[1:]
    for axis in axes:
        if axis is not None and (not isinstance(axis, str) or axes.count(axis) > 1):
            raise ValueError(
                f"In the rule {rule!r:.80} of mesh.rules each axis of an array has an axis of the "
                f"mesh of its own, or None, not {axis!r:.80}."
            )
    return words[0], P(*axes)


def _check(mesh: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if mesh[TANGENTS] > 1 and config["engine"] != "forward":
        raise ValueError(
            f"mesh.tangents={mesh[TANGENTS]} spreads the tangents of the engine 'forward', but the "
            f"engine is {config['engine']!r}, which has none. Leave mesh.tangents at 1."
        )
    if mesh[MODEL] > 1 and not mesh["rules"]:
        raise ValueError(
            f"mesh.model={mesh[MODEL]} cuts nothing without mesh.rules, which say what is cut and "
            "how, such as --config.mesh.rules=\"(('kernel$', None, 'model'),)\"."
        )


def _most(mesh: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return the most groups of devices that the tasks of a config divide among."""
    each, processes = _inner(mesh), jax.process_count()
    total = remaining(len(jax.devices()), mesh[DATA], mesh[MODEL], mesh[TANGENTS])
    step = processes // math.gcd(processes, each)  # as many devices of each process
    groups = most_devices(config["tasks_per_step"], config["chunk"], total, step)
    if not groups:
        raise ValueError(
            f"tasks_per_step={config['tasks_per_step']} does not divide among {processes} "
            f"processes with {format_devices(len(jax.devices()))} in all. Take a multiple "
            f"of {step}."
        )
    return groups
