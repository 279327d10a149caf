"""Names that a config may use, and the keys that go with each of them.

A table maps a name to what builds it: engines, optimizers, objectives and schedules are listed
here. Algorithms, datasets and networks are found among the exports of their packages
(`Exports`), by the name of the class in snake case, so that a new one is named nowhere else. The
keys that a name takes are the arguments of what builds it (`check_call`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import optax

from metalearn import ES, PES, Forward, InverseVariance, MixedFlow, Reverse
from metalearn._utils.checks import pick
from metalearn.algorithms import cross_entropy, sgd, squared_error, weighted_cross_entropy
from metalearn.experiments.cli.arguments import renamed
from metalearn.optimizers import reversible

ENGINES = {
    "reverse": Reverse,
    "forward": Forward,
    "mixed_flow": MixedFlow,
    "es": ES,
    "pes": PES,
    "inverse_variance": InverseVariance,  # of the pathwise derivative and "es"
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


def snake_case(name: str) -> str:
    """Return the name of a class as configs write it.

    >>> [snake_case(name) for name in ("MAML", "LearningRates", "WideResNet", "digits")]
    ['maml', 'learning_rates', 'wide_res_net', 'digits']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build an optimizer from its name and its other arguments."""
    options = without_unset(config)
    name = options.pop("name")
    make = pick(OPTIMIZERS, name, "optimizer")
    check_call(f"optimizer {name!r}", options, make)
    return make(**options)


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
            f"The {what} needs {', '.join(missing)}, which this config does not set. Begin with a "
            "packaged config that is made for it."
        )


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a function, or of the constructor of a class."""
    if isinstance(function, type):
        init = inspect.signature(function.__init__)  # type: ignore[misc]
        arguments = list(init.parameters.values())[1:]  # without self
    else:
        arguments = list(inspect.signature(function).parameters.values())
    return {p.name: p for p in arguments if p.kind not in _REST and p.name not in _LIBRARY}
