"""What a config may name, and the keys of each name, read off signatures and docstrings.

`metalearn list` prints it, and the configuration reference of the documentation is made of it, so
that a new algorithm, dataset, network or optimizer appears in both by being exported:

    entries("engines")          every engine, with one line each
    described("maml")           what goes by a name, with its keys
    markdown(described("maml")) the same, for a page

Names and keys are those of `registry` and `sections`; a key's line is the first sentence of its
entry under "Args:" in a docstring. Nothing here needs a device.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from metalearn import Faults, Layout, Replay, Trainer, Truncation, algorithms, make_mesh
from metalearn._utils.checks import nearest
from metalearn._utils.readable import show
from metalearn.algorithms import FDS, Hyperparameter, PerParameter, fds_rule
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import Corruption
from metalearn.experiments.build.algorithms import ALGORITHMS, INNER_OPTIMIZERS, RATERS, WEIGHTINGS
from metalearn.experiments.build.datasets import DATASETS, few_shot
from metalearn.experiments.build.models import LIBRARIES
from metalearn.experiments.build.registry import (
    ENGINES,
    OBJECTIVES,
    OPTIMIZERS,
    parameters,
    snake_case,
)
from metalearn.experiments.build.sections import BESIDE, keys_of, type_of
from metalearn.experiments.build.trainers import engine_builder
from metalearn.experiments.cli import arguments
from metalearn.models import Architecture, LoRA, Precision

WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", tuple: "tuple"}
REQUIRED, UNSET = "required", "unset"


class Key(NamedTuple):
    """A key of a config.

    Args:
      name: dotted, below the section of its name: "inner_steps", "optimizer".
      type: in words.
      default: as text; "required" where there is none, "unset" for None.
      meaning: one sentence; "" where no docstring has one.
    """

    name: str
    type: str
    default: str
    meaning: str


class Entry(NamedTuple):
    """Something that a config may name.

    Args:
      kind: of `KINDS`, such as "algorithms".
      name: as configs write it.
      summary: one line.
      keys: that go with the name.
    """

    kind: str
    name: str
    summary: str
    keys: tuple[Key, ...] = ()


def entries(kind: str) -> list[Entry]:
    """Return all names of a kind, one of `KINDS`, with a line each and without their keys."""
    return [Entry(kind, name, KINDS[kind].summary(name)) for name in KINDS[kind].names()]


def described(name: str) -> list[Entry]:
    """Return what goes by a name, with its keys: mostly one entry, of each kind one at most.

    Raises:
      ValueError: where nothing does; the nearest names are in the message.
    """
    kinds = [kind for kind, each in KINDS.items() if name in each.names()]
    if not kinds:
        known = [known for each in KINDS.values() for known in each.names()]
        raise ValueError(
            f"Nothing in a config is called {name!r}.{nearest(name, known)} `metalearn list` shows "
            f"every name, and `metalearn list KIND` those of a kind: {', '.join(KINDS)}."
        )
    return [
        Entry(kind, name, KINDS[kind].summary(name), tuple(KINDS[kind].keys(name)))
        for kind in kinds
    ]


def markdown(described: Iterable[Entry]) -> str:
    """Return entries as Markdown: a heading, the line, and a table of keys for each."""
    parts = []
    for entry in described:
        parts += [f"### {entry.name}", _cell(entry.summary)]
        if entry.keys:
            header = "| key | type | default | meaning |\n|---|---|---|---|"
            rows = [
                f"| `{key.name}` | {key.type} | {_default(key)} | {_cell(key.meaning)} |"
                for key in entry.keys
            ]
            parts.append("\n".join([header, *rows]))
    return "\n\n".join(parts) + "\n"


def _default(key: Key) -> str:
    return key.default if key.default in (REQUIRED, UNSET) else f"`{_cell(key.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Docstrings.


def summary_of(documented: Any) -> str:
    """Return the first sentence of a docstring; "" where there is none.

    >>> summary_of(few_shot)
    'Make few-shot tasks of the classes of each split.'
    """
    text = documented if isinstance(documented, str) else inspect.getdoc(documented)
    return _sentence((text or "").split("\n\n")[0])


def _sentence(text: str) -> str:
    """Return the first sentence of a text, on one line.

    >>> _sentence("Halve it, as in Finn et al. 2017. Then add.")
    'Halve it, as in Finn et al. 2017.'
    """
    joined = " ".join(re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).split())
    match = re.match(r".*?(?<!\bal)(?<!\bi\.e)(?<!\be\.g)[.:](?= [A-Z\"`(]|$)", joined)
    return match[0] if match and match[0].endswith(".") else joined


def arguments_of(documented: Any) -> dict[str, str]:
    """Return the entries under "Args:" of a docstring, each on one line.

    >>> arguments_of(few_shot)["ways"]
    'classes in a task.'
    """
    lines = (inspect.getdoc(documented) or "").splitlines()
    if "Args:" not in lines:
        return {}
    texts: dict[str, list[str]] = {}
    name = indent = None
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        match = re.match(r"( +)\*{0,2}(\w+)(?: \([^)]*\))?: ?(.*)", line)
        if match and (indent is None or len(match[1]) == indent):
            indent, name = len(match[1]), match[2]
            texts[name] = [match[3]]
        elif name is not None:
            texts[name].append(line.strip())
    return {name: " ".join(filter(None, parts)) for name, parts in texts.items()}


def _meanings(sources: Iterable[Any]) -> dict[str, str]:
    """Return a line for each argument of functions and classes; that of the first that has one."""
    lines: dict[str, str] = {}
    for source in sources:
        lines = {name: _sentence(text) for name, text in arguments_of(source).items()} | lines
    return lines


# Keys.


def _keys(takes: Mapping[str, inspect.Parameter], sources: Sequence[Any]) -> Iterator[Key]:
    lines = _meanings(sources)
    for name, parameter in takes.items():
        if _settable(parameter):
            yield Key(name, _type(parameter), _shown(parameter), lines.get(name, ""))


def _settable(parameter: inspect.Parameter) -> bool:
    """Say whether a config can hold a value of an argument: functions it cannot, but for names."""
    hint = str(parameter.annotation)
    if parameter.name in (*INNER_OPTIMIZERS, "objective") or "GradientTransformation" in hint:
        return True
    values = re.sub(r"Callable\[.*", "", hint)
    takes_text = re.search(r"\b(str|float|int|bool|tuple|ScalarOrSchedule|Schedule)\b", values)
    return not re.search("Callable|Sharding", hint) or bool(takes_text)


def _type(parameter: inspect.Parameter) -> str:
    hint = str(parameter.annotation)
    if parameter.name in INNER_OPTIMIZERS or "GradientTransformation" in hint:
        return "an optimizer and its keys"
    if parameter.name == "objective":
        return "the name of an objective"
    if type(parameter.default) in (bool, str, tuple):
        return WORDS[type(parameter.default)]
    return "keys of its own" if "Mapping" in hint else WORDS[type_of(parameter)]


def _shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return REQUIRED
    return UNSET if default is None else _value(default)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else show(value)


def _algorithm_keys(name: str) -> Iterator[Key]:
    takes = keys_of("algorithm", name)
    assert takes is not None
    return _keys(takes, (ALGORITHMS[name], _algorithm_class(name)))


def _algorithm_class(name: str) -> Any:
    """Return the class that a config's algorithm is of."""
    exports = {snake_case(export): getattr(algorithms, export) for export in algorithms.__all__}
    return exports[name]


def _dataset_keys(name: str) -> Iterator[Key]:
    takes = keys_of("dataset", name)
    assert takes is not None
    return _keys(takes, (DATASETS[name], few_shot))


def _model_names() -> list[str]:
    return list(dict.fromkeys(name for library in LIBRARIES.values() for name in library.networks))


def _network(name: str) -> Any:
    return next(lib.networks[name] for lib in LIBRARIES.values() if name in lib.networks)


def _model_summary(name: str) -> str:
    libraries = [library for library, each in LIBRARIES.items() if name in each.networks]
    return f"{summary_of(_network(name))} ({', '.join(libraries)})"


def _model_keys(name: str) -> Iterator[Key]:
    library = next(lib for lib, each in LIBRARIES.items() if name in each.networks)
    takes = keys_of("model", name, library)
    assert takes is not None
    libraries = ", ".join(lib for lib, each in LIBRARIES.items() if name in each.networks)
    default = BESIDE["model"]["library"]
    yield Key("library", WORDS[str], default, f"of the network: {libraries}.")
    yield from _keys(takes, (_network(name), Architecture))


def _engine_keys(name: str) -> Iterator[Key]:
    return _keys(parameters(engine_builder(name)), (ENGINES[name], ENGINES["es"]))


OUTER_RULES = {"fds_rule": (FDS._sign_rule, fds_rule)}  # of `Algorithm.outer_rules`


def _outer_keys(name: str) -> Iterator[Key]:
    rule, documented = OUTER_RULES[name]
    takes = parameters(rule)
    for filled in ("self", "schedule", "steps"):
        takes.pop(filled, None)
    return _keys(takes, (rule, documented))


def _config_keys(name: str) -> Iterator[Key]:
    module = importlib.import_module(f"metalearn.experiments.configs.{name}")
    config = module.get_config()
    for key in arguments.keys(config):
        kind, value = _at(config, key)
        default = UNSET if value is None else _value(value)
        yield Key(key, WORDS.get(kind, "text"), default, _meaning(config, key))


def _config_summary(name: str) -> str:
    tree = ast.parse((arguments.CONFIGS / f"{name}.py").read_text(encoding="utf-8"))
    return summary_of(ast.get_docstring(tree) or "")


def _at(config: Any, key: str) -> tuple[type, Any]:
    """Return (type, value) of a dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last), config[last]


# What the keys of a run mean that are no arguments of the section's name: a sentence, or a function
# or class and the argument of it that they are.
RUN: dict[str, Any] = {
    "seed": "the seed of the run: it draws the initial eta and all tasks.",
    "engine": 'how the meta-gradient is computed: an engine, or "auto", the choice of `plan`.',
    "steps": (Trainer.fit, "steps"),
    "tasks_per_step": (Trainer, "tasks_per_step"),
    "chunk": (Trainer, "chunk"),
    "isolate": (Trainer, "isolate"),
    "segment": (Trainer, "segment"),
    "health": "check one meta-gradient for NaN before training, and whether it predicts anything.",
    "log_every": (Trainer.fit, "log_every"),
    "eval_every": (Trainer.fit, "eval_every"),
    "eval_tasks": (Trainer.fit, "eval_tasks"),
    "check_every": (Trainer.fit, "check_every"),
    "test_tasks": "test tasks of the evaluation at the end.",
    "pictures": "kinds of pictures of what was learned to draw at the end.",
    "checkpoint_every": (Checkpoints.__init__, "every"),
    "checkpoint_keep": (Checkpoints.__init__, "keep"),
    "checkpoint_best": (Checkpoints.__init__, "best"),
    "checkpoint_within": (Checkpoints.__init__, "within"),
    "mesh.rules": (Layout, "rules"),
    "wandb.mode": '"online", "offline", "disabled", or "auto": online where you are logged in.',
    "wandb.project": "the project that the run is logged to.",
    "wandb.name": 'of the run in W&B; "": chosen by W&B.',
    "wandb.group": 'of runs that W&B shows together; "": none.',
    "optimizer.schedule": "of the learning rate over the outer steps: constant, linear, cosine.",
    "optimizer.clip": "the largest norm of a meta-gradient; None: no bound.",
    "optimizer.average": "of the eta that is learned, the decay of a moving average of the "
    "iterates, such as 0.999; None: the last iterate.",
    "algorithm.optimizer.learning_rate": "of the inner optimizer.",
    "algorithm.rule.network": 'of the rule "per_parameter": "mlp" or "gru".',
    "algorithm.rule.hidden": "the widths of the hidden layers of the rule's network.",
    "precision.master_weights": "sum the updates of inner and outer optimizer in float32.",
    "algorithm.rule.preconditioned": "divide the network's step by the root of v, as in Adam.",
}
# Sections whose keys are arguments of one function or class each, the first that has it.
PARTS: dict[str, Sequence[Any]] = {
    r"truncation": (Truncation,),
    r"faults": (Faults,),
    r"mesh": (make_mesh,),
    r"precision": (Precision,),
    r"lora": (LoRA,),
    r"replay": (Replay,),
    r"engine_options": tuple(ENGINES.values()),
    r"algorithm\.(rule\.base\.)?hyperparameters\.\w+": (Hyperparameter,),
    r"algorithm\.weighting": tuple(WEIGHTINGS.values()),
    r"algorithm\.rater": tuple(RATERS.values()),
    r"algorithm\.rule": (PerParameter,),
    r"dataset\.corruption": (Corruption,),
}
NAMED: dict[str, str] = {  # sections with a name, and the kind of it
    "algorithm": "algorithms",
    "dataset": "datasets",
    "model": "models",
    "optimizer": "optimizers",
    "algorithm.optimizer": "optimizers",
    "algorithm.rule.base": "optimizers",
}


def _meaning(config: Any, key: str) -> str:
    """Return what a dotted key of a config means: one sentence, or "" where none is known."""
    section, _, last = key.rpartition(".")
    if key in RUN:
        line = RUN[key]
        return line if isinstance(line, str) else _meanings(line[:1]).get(line[1], "")
    for pattern, sources in PARTS.items():
        if re.fullmatch(pattern, section):
            if last == "name":
                return f"which {section.rpartition('.')[2].replace('_', ' ')} it is."
            return _meanings(sources).get(last, "")
    if section not in NAMED:
        return ""
    if last == "name":
        return f"one of `metalearn list {NAMED[section]}`."
    name = _at(config, f"{section}.name")[1]
    kinds = [NAMED[section], "outer optimizers"]
    known = [k for kind in kinds if name in KINDS[kind].names() for k in KINDS[kind].keys(name)]
    if section.endswith("optimizer"):  # of others: `eps_root` is unset beside "sgd"
        known += KINDS["optimizers"].keys("adam")
    return next((key.meaning for key in known if key.name == last), "")


class Kind(NamedTuple):
    """A kind of names.

    Args:
      names: returns all of them.
      summary: of a name, one line.
      keys: of a name.
    """

    names: Callable[[], Iterable[str]]
    summary: Callable[[str], str]
    keys: Callable[[str], Iterable[Key]]


def _of_table(table: Mapping[str, Any], keys: Callable[[str], Iterable[Key]]) -> Kind:
    return Kind(lambda: sorted(table), lambda name: summary_of(table[name]), keys)


KINDS: dict[str, Kind] = {
    "algorithms": Kind(
        lambda: sorted(ALGORITHMS), lambda name: summary_of(_algorithm_class(name)), _algorithm_keys
    ),
    "engines": _of_table(ENGINES, _engine_keys),
    "models": Kind(lambda: sorted(_model_names()), _model_summary, _model_keys),
    "datasets": _of_table(DATASETS, _dataset_keys),
    "configs": Kind(arguments.packaged, _config_summary, _config_keys),
    "optimizers": _of_table(
        OPTIMIZERS,
        lambda name: _keys(parameters(OPTIMIZERS[name]), (OPTIMIZERS[name],)),
    ),
    "outer optimizers": Kind(
        lambda: sorted(OUTER_RULES), lambda name: summary_of(OUTER_RULES[name][1]), _outer_keys
    ),
    "objectives": _of_table(OBJECTIVES, lambda name: ()),
}
