"""Names that a config may use, and the keys that go with each of them.

A table maps a name to what builds it: engines, optimizers, objectives and schedules are listed
here. Algorithms, datasets and networks are found among the exports of their packages
(`Exports`), by the name of the class in snake case, so that a new one is named nowhere else. The
keys that a name takes are the arguments of what builds it (`check_call`).

Every name may also be an import path of the user's own class or function, "my_package.my_file:Name"
(`find`), and an optimizer any of optax by its own name, "optax.contrib.muon".
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import optax

from metalearn import (
    ES,
    PES,
    SAMA,
    Forward,
    Implicit,
    InverseVariance,
    MixedFlow,
    Reverse,
    Truncated,
)
from metalearn._utils.checks import nearest, pick
from metalearn._utils.fields import is_optimizer
from metalearn.algorithms import cross_entropy, sgd, squared_error, weighted_cross_entropy
from metalearn.experiments.cli.arguments import renamed
from metalearn.experiments.cli.import_paths import is_import_path, load
from metalearn.optimizers import meta_regularized, reversible
from metalearn.optimizers.master_weights import master_weights

ENGINES = {
    "reverse": Reverse,
    "forward": Forward,
    "mixed_flow": MixedFlow,
    "es": ES,
    "pes": PES,
    "inverse_variance": InverseVariance,  # of the pathwise derivative and "es"
    "implicit": Implicit,
    "truncated": Truncated,  # through "mixed_flow"
    "sama": SAMA,
}
# Inner and outer ones. For FDS and learned optimizers they are functions of hyperparameters.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adopt": optax.contrib.adopt,
    "reversible_adam": reversible.adam,  # its steps can be undone
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "lion": optax.lion,
    "meta_regularized": meta_regularized,
}
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "cross_entropy": cross_entropy,
    "weighted_cross_entropy": weighted_cross_entropy,
    "squared_error": squared_error,
}
SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, rate / 10, max(steps - 1, 1)),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, max(steps, 1)),
}


class Exports(Mapping[str, Any]):
    """The exports of a module that are of one kind, by their names in snake case.

    They are looked up whenever they are asked for, so that an export made later is among them.
    """

    def __init__(
        self,
        module: ModuleType,
        is_one: Callable[[Any], bool],
        special: Mapping[str, Callable[..., Any]] | None = None,
    ):
        """Make the table.

        Args:
          module: with `__all__`.
          is_one: whether an export is of the kind.
          special: builders of those that a config describes by other keys than their arguments.
        """
        self._module, self._is_one, self._special = module, is_one, dict(special or {})

    def _found(self) -> dict[str, Any]:
        exports = {name: getattr(self._module, name) for name in self._module.__all__}
        chosen = {snake_case(name): x for name, x in exports.items() if self._is_one(x)}
        return {**chosen, **self._special}

    def __getitem__(self, name: str) -> Any:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


ONE_WORD = ("ProtoNet", "R2D2")  # names of methods that nobody writes with an underscore


def snake_case(name: str) -> str:
    """Return the name of a class as configs write it.

    >>> [snake_case(name) for name in ("MAML", "LearningRates", "WideResNet", "ProtoNet")]
    ['maml', 'learning_rates', 'wide_res_net', 'protonet']
    """
    if name in ONE_WORD:
        return name.lower()
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def find(
    table: Mapping[str, Callable[..., Any]], name: str, what: str, kinds: Sequence[type]
) -> Callable[..., Any]:
    """Return what builds a name: the entry of a table, or what an import path names.

    Args:
      table: of the names of this package.
      name: in it, or an import path.
      what: for messages, such as "algorithm".
      kinds: base classes; a class that an import path names is a subclass of one of them. Empty:
        of any class.

    Raises:
      ValueError: for a name that is not in the table; for an import path that cannot be imported,
        or names neither a function nor a class of the kind with all its methods.
    """
    if not is_import_path(name):
        if isinstance(name, str) and name not in table and {*".:/"} & {*name}:
            raise ValueError(
                f"No {what} is called {name!r}, and it is no import path: that is "
                "'package.module:Name', such as 'my_file:MyClass' for a class in my_file.py of the "
                f"current directory. The names of metalearn are: {', '.join(sorted(table))}."
            )
        return pick(table, name, what)
    value: Any = load(name, what)
    article = "an" if what[0] in "aeiou" else "a"
    if isinstance(value, type) and kinds:
        if not issubclass(value, tuple(kinds)):
            raise ValueError(
                f"{name!r} is no {what}: the class {value.__name__} is not a subclass of "
                f"{_either(kinds)}. Derive it from that, or name a function that builds {article} "
                f"{what}."
            )
        if lacking := ", ".join(sorted(getattr(value, "__abstractmethods__", ()))):
            raise ValueError(
                f"{name!r} is no complete {what}: the class {value.__name__} does not define "
                f"{lacking}, which every {_either(kinds)} has."
            )
    elif not callable(value):
        raise ValueError(
            f"{name!r} is no {what}, but the value {value!r:.80}. Name a class, or a function "
            "that builds one: the other keys of the config are its arguments."
        )
    return value


def check_kind(value: Any, name: str, what: str, kinds: Sequence[type]) -> Any:
    """Return what a function of the user's own has built; ValueError if it is no `what`."""
    if not isinstance(value, tuple(kinds)):
        raise ValueError(
            f"{name!r} is no {what}: it returned {value!r:.80}, which is no {_either(kinds)}."
        )
    return value


def _either(kinds: Sequence[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


MASTER = "master_weights"  # a mark in the config of an inner optimizer, set by `algorithm`
OPTAX = {"optax": optax, "optax.contrib": optax.contrib}


def optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build an optimizer from its name and its other arguments.

    An argument that is an optimizer itself, such as `base_optimizer` of
    `optax.contrib.schedule_free`, is a config of one.
    """
    options = without_unset(config)
    master, name = options.pop(MASTER, False), options.pop("name")
    make = optimizer_function(name)
    check_call(f"optimizer {name!r}", options, make)
    built = make(**{key: _nested(value) for key, value in options.items()})
    built = built if is_optimizer(built) else check_kind(built, name, "optimizer", OPTIMIZER)
    return master_weights(built) if master else built


def _nested(value: Any) -> Any:
    return optimizer(value) if isinstance(value, Mapping) and "name" in value else value


OPTIMIZER = (optax.GradientTransformation,)


def optimizer_function(name: str) -> Callable[..., Any]:
    """Return what builds an optimizer: by a name in `OPTIMIZERS`, of optax, or an import path."""
    module, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if module not in OPTAX or is_import_path(name):
        return find(OPTIMIZERS, name, "optimizer", OPTIMIZER)
    functions = {key for key, value in vars(OPTAX[module]).items() if _is_function(key, value)}
    if attribute not in functions:
        hint = nearest(attribute, functions).replace("'", f"'{module}.", 1)
        raise ValueError(
            f"optax has no optimizer {name!r}.{hint} Those of metalearn's own names are: "
            f"{', '.join(sorted(OPTIMIZERS))}."
        )
    return vars(OPTAX[module])[attribute]


def _is_function(name: str, value: Any) -> bool:
    called = inspect.isfunction(value) or isinstance(value, functools.partial)
    return called and not name.startswith("_")


def without_unset(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that are set, lists as tuples."""
    return {key: as_tuple(value) for key, value in config.items() if value is not None}


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, and any other value as it is: JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


_REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_LIBRARY = ("name", "parent", "rngs")  # arguments that a model library adds to its modules


def check_call(
    what: str,
    options: Mapping[str, Any],
    *functions: Callable[..., Any],
    filled: Collection[str] = (),
) -> None:
    """Raise ValueError where options of a config are not the arguments of what they are for.

    Changing a name alone, `--config.dataset.name=text`, leaves the keys of another dataset in
    the config. Python would answer with a TypeError about an unexpected keyword.

    Args:
      what: for the message, such as "optimizer 'adam'".
      options: the keywords.
      functions: classes or functions that take them, one or several between them.
      filled: arguments that do not come from the config.
    """
    takes = {
        name: parameter
        for function in functions
        for name, parameter in parameters(function).items()
        if name not in filled
    }
    for key in options:
        if key not in takes:
            hint = renamed(key, takes)
            raise ValueError(f"The {what} has no option {key!r}.{hint} It has: {list(takes)}.")
    needed = [name for name, p in takes.items() if p.default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(
            f"The {what} needs {', '.join(missing)}, which this config does not set. Set what has "
            "no default beside the name, or begin with a packaged config that is made for it."
        )


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a function, or of the constructor of a class."""
    if isinstance(function, type):
        init = inspect.signature(function.__init__)  # type: ignore[misc]
        arguments = list(init.parameters.values())[1:]  # without self
    else:
        arguments = list(inspect.signature(function).parameters.values())
    return {p.name: p for p in arguments if p.kind not in _REST and p.name not in _LIBRARY}
