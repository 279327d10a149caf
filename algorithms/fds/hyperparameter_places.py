"""Where a hyperparameter goes, by name: the optimizer, the objective or the augmentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metalearn._utils.checks import nearest

_REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD  # *args, **kwargs
GIVEN = {"optimizer": 0, "objective": 2, "augment": 2}  # arguments that are no hyperparameters


def place(names: Iterable[str], takers: Mapping[str, Callable[..., Any] | None]) -> dict[str, str]:
    """Return {hyperparameter: "optimizer" | "objective" | "augment"}.

    Raises:
      ValueError: for a name that none of them takes, with those that they take.
    """
    known = {what: numeric(taker, GIVEN[what]) for what, taker in takers.items() if taker}
    return {name: _place(name, known) for name in names}


def check_required(optimizer: Callable[..., Any], names: Iterable[str]) -> None:
    """Raise ValueError where an optimizer needs an argument that is not among the names."""
    found = inspect.signature(optimizer).parameters.values()
    empty, kinds = inspect.Parameter.empty, _REST
    missing = [p.name for p in found if p.default is empty and p.kind not in kinds]
    missing = [name for name in missing if name not in names]
    if missing:
        raise ValueError(
            f"The optimizer needs {', '.join(missing)}, which is not learned. Fix it, such as by "
            f"`functools.partial(optax.adamw, {missing[0]}=...)`, or learn it."
        )


def numeric(function: Callable[..., Any], skipped: int = 0) -> list[str]:
    """Return the arguments of a function that a number can be passed for, by their name."""
    found = list(inspect.signature(function).parameters.values())[skipped:]
    return [p.name for p in found if p.kind not in _REST and _is_numeric(p)]


def _is_numeric(parameter: inspect.Parameter) -> bool:
    default, hint = parameter.default, str(parameter.annotation)
    if "mask" in parameter.name:
        return False
    if default is inspect.Parameter.empty or default is None:
        return any(word in hint for word in ("float", "Scalar", "Array", "Numeric", "_empty"))
    return isinstance(default, int | float) and not isinstance(default, bool)


def _place(name: str, known: Mapping[str, list[str]]) -> str:
    for what, names in known.items():
        if name in names:
            return what
    listed = "; ".join(
        f"the {what} has {', '.join(names) or 'none'}" for what, names in known.items()
    )
    hint = nearest(name, [name for names in known.values() for name in names])
    raise ValueError(f"No hyperparameter is called {name!r}.{hint} There are: {listed}.")
