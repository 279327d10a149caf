"""Changed configs for the fuzz: what a field may be set to, and what a case must do.

A case is a packaged config at a small size, and one to three of its fields set to something
else of their type. It must run, or be refused by a `raise` of this project: not by jax, optax,
flax, numpy or ml_collections, whose errors know nothing of a config.
"""

import dataclasses
import dis
import functools
import importlib
import json
import pathlib
import types
import warnings
import zlib
from typing import Any

import jax
import ml_collections

import metalearn
from metalearn import Replay
from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments import build
from metalearn.experiments.build import algorithms
from metalearn.experiments.commands.run import RHYTHM
from metalearn.experiments.main import REPORTED
from metalearn.loggers import WandbLogger
from metalearn.training.evaluation import task_metrics
from metalearn.training.faults import DIVERGED, NONFINITE, Faults
from metalearn.training.outer_loop import Fit
from tests.helpers.small_configs import SMALL, as_small

ROOT = pathlib.Path(metalearn.__file__).parent.parent
BILLION = 10**9
OURS = [ROOT / part for part in ("metalearn", "algorithms", "models", "datasets", "experiments")]

# Small enough that a case takes a second or two. Sizes go up to a few tens, then there is one of
# a billion, with which a case is never stepped, and one that no count can be.
INTEGERS = (-(10**12), -1, 0, 1, 2, 3, 7, 12, BILLION, 10**12)
FLOATS = (-1.0, 0.0, 1e-30, 0.3, 1.0, 1e30, float("nan"), float("inf"), -float("inf"))
TUPLES: tuple[tuple[Any, ...], ...] = (
    *((), (0,), (-1,), (1,), (3, 2), (1.5,), (True,), (None,), ("x_y",), ("",)),
    *(("loss",), ("source", "spread"), ("replaced",), ("repeated", "x_y"), ((1, 2),)),
    *((BILLION,), (("kernel", "model"),), (("(a+)+$", "model"),), (("kernel", ("model",)),)),
)
NONSENSE = ("", "x_y", "(", "none")
NAMES = {  # by the last part of a field
    "engine": (*build.ENGINES, "forward"),  # "auto" compiles every engine; see test_plan_cli.py
    "library": tuple(build.LIBRARIES),
    "schedule": tuple(build.SCHEDULES),
    "objective": tuple(build.OBJECTIVES),
    "remat": ("none", "step", "segments", "nested", "inexact_reconstruct", "block", "dots"),
    "store": ("device", "host", "inexact_bfloat16"),
    "batch_norm": ("transductive", "running", "frozen"),
    "adapted": ("head", ".*", "(a+)+$", "a*" * 30 + "b"),
    "mode": ("auto", "online", "offline", "disabled"),
    "project": ("a/b", "p" * 200),
    "nonfinite": NONFINITE,
    "diverged": DIVERGED,
    "checkpoint_best": ("max eval/accuracy", "min eval/loss", "max", "most eval/loss"),
    "partition": ("vinyals", "maml"),
    "problem": tuple(algorithms.PROBLEMS),
    "judge": ("training", "validation"),
    "network": tuple(algorithms.RULE_NETWORKS),
    "space": ("raw", "log", "logit"),
    "squash": tuple(algorithms.SQUASHES),
    "normalize": tuple(algorithms.NORMALIZATIONS),
    "augment": tuple(algorithms.AUGMENTATIONS),
    "tfds": ("digits", "tiny_shakespeare"),
    "feature": ("text", "image"),
    "convolution": ("auto", "patches", "lax"),
}
TABLES = {  # of `name`, by the part before it
    "algorithm": tuple(build.ALGORITHMS),
    "dataset": tuple(build.DATASETS),
    "model": tuple(build.LIBRARIES["linen"].networks),
    "rule": tuple(algorithms.RULES),
    "base": tuple(build.OPTIMIZERS),
    "weighting": tuple(algorithms.WEIGHTINGS),
    "rater": tuple(algorithms.RATERS),
    "optimizer": (*build.OPTIMIZERS, "fds_rule"),
    "wandb": ("a name",),
}
BASES: dict[str, dict[str, Any]] = {  # where SMALL is not enough, or the data is not there
    "fds_fashion_mnist": {"dataset.tfds": "digits", "model.name": "conv_net"},
}
# No case is drawn of these: their data are the user's own.
WITHOUT_DATA = {"maml_mini_imagenet", "protonet_cifar_fs", "r2d2_fc100"}
# Of the configs that compile in seconds, one case in so many takes its step. The others are traced
# alone, by the same code: what a program is refused for is found before it is compiled.
ONE_IN = 2
QUICK = ("maml_digits", "maml_sinusoid", "maml_omniglot", "fds_digits", "learned_optimizer_digits")


@dataclasses.dataclass(frozen=True)
class Case:
    """A packaged config with fields set to something else."""

    config: str
    fields: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.config}: {', '.join(f'{key}={value!r}' for key, value in self.fields)}"


def base(name: str) -> ml_collections.ConfigDict:
    """Return a packaged config at a small size, its data such as every machine has."""
    module = importlib.import_module(f"metalearn.experiments.configs.{name}")
    config = module.get_config()
    small = {**SMALL, "tasks_per_step": 2, "model.layers": 1, "model.heads": 1}
    known = dict(fields(config))
    present = {k: as_small(v, known[k]) for k, v in small.items() if known.get(k)}
    config.update_from_flattened_dict({**present, **BASES.get(name, {})})
    return config


def fields(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every field."""
    found = []
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            found += fields(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def choices(config: ml_collections.ConfigDict, key: str) -> list[Any]:
    """Return what the fuzz may set a field to, None included where it is not set."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    kind, value = config.get_type(last), config[last]
    found: dict[type, Any] = {
        bool: (True, False),
        int: INTEGERS,
        float: FLOATS,
        tuple: TUPLES,
        str: (*_names(parents, last), *NONSENSE),
    }
    others = [other for other in dict.fromkeys(found[kind]) if repr(other) != repr(value)]
    return [None, *others] if value is None else others


def _names(parents: list[str], last: str) -> tuple[str, ...]:
    if last == "name":
        return TABLES[parents[-1]]
    return NAMES.get(last, ())


@functools.cache
def _splits(dataset: str) -> build.Splits:
    """Read the same data once."""
    return build.splits(json.loads(dataset))


def plain(case: Case) -> dict[str, Any]:
    """Return the config of a case as `metalearn train` has it."""
    config = base(case.config)
    config.update_from_flattened_dict(dict(case.fields))
    return build.to_json(config)


def construct(case: Case, workdir: pathlib.Path) -> tuple[Any, build.Splits, dict[str, Any]]:
    """Make all that a run is made of, and compile nothing."""
    config = plain(case)
    splits = _splits(json.dumps(config["dataset"]))
    layout = build.layout(config)
    assert layout is None
    trainer = build.trainer(config, splits)
    trainer.check_memory(splits.train, [tasks for tasks in splits[1:3] if tasks is not None])
    rhythm = {key: config[key] for key in RHYTHM}
    faults = Faults(**config["faults"])
    Fit(config["steps"], None, faults=faults, asked_to_stop=None, progress=False, **rhythm)
    kept = (config[f"checkpoint_{key}"] for key in ("every", "keep", "best"))
    Checkpoints(workdir, config, *kept).close()
    WandbLogger(**config["wandb"], directory=workdir)
    return trainer, splits, config


def run(case: Case, workdir: pathlib.Path, takes_a_step: bool | None = None) -> str:
    """Run a case: return "stepped", "traced", or the message it was refused with.

    Raises:
      AssertionError: if it fails in another way.
    """
    try:
        with warnings.catch_warnings(), _Unfiltered():
            warnings.simplefilter("ignore")
            return _run(case, workdir, takes_a_step)
    except Exception as error:
        assert isinstance(error, REPORTED) and raised_by_us(error), (
            f"{case} failed with a bare {type(error).__name__}: {error}"
        )
        return str(error)


class _Unfiltered:
    """Shows jax's own frames, so that its errors are not mistaken for ours."""

    def __enter__(self) -> None:
        self.before = jax.config.jax_traceback_filtering
        jax.config.update("jax_traceback_filtering", "off")

    def __exit__(self, *_: object) -> None:
        jax.config.update("jax_traceback_filtering", self.before)


def _run(case: Case, workdir: pathlib.Path, takes_a_step: bool | None) -> str:
    trainer, splits, config = construct(case, workdir)
    key = jax.random.key(config["seed"])
    if takes_a_step is None:
        drawn = zlib.crc32(str(case).encode()) % ONE_IN == 0
        takes_a_step = drawn and case.config in QUICK
    takes_a_step = takes_a_step and BILLION not in dict(case.fields).values()
    if takes_a_step:
        state = trainer.init(key, splits.train)
        jax.block_until_ready(trainer.step(state, splits.train))
    else:
        state = jax.eval_shape(trainer.init, key, splits.train)
        if segments := trainer.segments(splits.train):  # driven by the host, so not traced
            assert segments.planned.segments >= 1
            trainer = dataclasses.replace(trainer, segment=None, replay=Replay())
        jax.eval_shape(trainer.step, state, splits.train)
    evaluated = trainer.algorithm.evaluation()
    jax.eval_shape(
        lambda eta, tasks, key: task_metrics(evaluated, eta, tasks, key),
        *(state.eta, splits.test, key),
    )
    return "stepped" if takes_a_step else "traced"


def raised_by_us(error: BaseException) -> bool:
    """Say whether a `raise` statement of this project raised an error, and nothing it called."""
    at: types.TracebackType | None = error.__traceback__
    assert at is not None
    while at.tb_next is not None:
        at = at.tb_next
    code = at.tb_frame.f_code
    file = pathlib.Path(code.co_filename).resolve()
    raises = code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and any(file.is_relative_to(part) for part in OURS)
