"""A learned schedule, to take away: a plain function of the step, and JSON.

optax.sgd(learned["learning_rate"].stretched(50_000))
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.strict_json import dumps, parse, read
from metalearn.algorithms.fds.windows import check_windows, stretched, window_of

Value = float | tuple[Any, ...]  # a number, or one for each class and the like, [...]
DEEPEST = 8  # axes of a value


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Piecewise constant: an `optax.Schedule`. After the horizon the last value holds.

    Several go into one optimizer by name: `optax.inject_hyperparams(sgd)(**schedules)`.

    Raises:
      ValueError: for edges that do not rise from 0 in integers, and for values that are not one
        finite number, or one array of them, for each window; all of one shape.
    """

    edges: tuple[int, ...]  # [N + 1]: where each window begins; the horizon
    values: tuple[Value, ...]  # [N, ...]: one for each window

    def __post_init__(self) -> None:
        for field, value in (("edges", self.edges), ("values", self.values)):
            if not isinstance(value, tuple):
                raise ValueError(f"The {field} of a schedule are a tuple, not {value!r:.80}.")
        if len(self.edges) != len(self.values) + 1:
            raise ValueError(
                f"A schedule has one edge more than values, not {len(self.edges)} edges and "
                f"{len(self.values)} values."
            )
        check_windows(self.edges)
        shapes = {_shape(value) for value in self.values}
        if len(shapes) > 1:
            raise ValueError(
                f"The values of a schedule have one shape, not {', '.join(map(str, shapes))}."
            )

    @classmethod
    def of(cls, edges: tuple[int, ...], values: np.ndarray) -> Schedule:
        """Return the schedule of an array of values, [N, ...]."""
        return cls(edges, _tuples(values.tolist()))

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return the value at an inner step."""
        found = window_of(jnp.asarray(step), np.asarray(self.edges))
        return jnp.asarray(np.asarray(self.values, float))[found]

    @property
    def horizon(self) -> int:
        """Return T."""
        return self.edges[-1]

    def stretched(self, horizon: int) -> Schedule:
        """Return the same schedule over a run of another length, of one step or more.

        Step t gets what step floor(t T / horizon) had. In a run too short for all of the windows
        those that no step is in are left out, with their values.
        """
        edges = stretched(self.edges, horizon)
        held = [i for i in range(len(self.values)) if edges[i] < edges[i + 1]]
        values = tuple(self.values[i] for i in held)
        return Schedule((*(edges[i] for i in held), edges[-1]), values)

    def to_json(self) -> str:
        """Return the schedule as JSON: {"edges": [...], "values": [...]}."""
        return dumps(dataclasses.asdict(self), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Raises:
          ValueError: if that is not a schedule.
        """
        return _schedule(parse(text, "This text"))


def _schedule(found: Any) -> Schedule:
    if not isinstance(found, dict) or found.keys() != {"edges", "values"}:
        raise ValueError(
            f"A schedule has edges and values, and this JSON has not: {dumps(found):.80}"
        )
    for field, value in found.items():
        if not isinstance(value, list):
            raise ValueError(f"The {field} of a schedule are a list, not {value!r:.80}.")
    return Schedule(tuple(found["edges"]), _tuples(found["values"]))


def _plain(number: Any) -> Any:
    """Return a number of NumPy's as one of Python's, for JSON."""
    return np.asarray(number).item()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shape(value: Any, deepest: int = DEEPEST) -> tuple[int, ...]:
    """Return the shape of nested tuples of finite numbers; ValueError for anything else."""
    if isinstance(value, tuple):
        if not deepest:
            raise ValueError(f"A value of a schedule has {DEEPEST} axes at most.")
        inner = {_shape(each, deepest - 1) for each in value}
        if len(inner) != 1:
            raise ValueError(f"A value of a schedule is an array of numbers, not {value!r:.80}.")
        return (len(value), *inner.pop())
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
        raise ValueError(f"A value of a schedule is a finite number, not {value!r:.80}.")
    return ()


def _is_finite(value: Any) -> bool:
    """Say whether a number is finite as a float; an integer may be larger than any of those."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def save_schedules(path: str | os.PathLike[str], schedules: Mapping[str, Schedule]) -> None:
    """Write schedules by name, such as `FDS.schedules(eta)`, as one JSON file."""
    found = {name: dataclasses.asdict(schedule) for name, schedule in schedules.items()}
    pathlib.Path(path).write_text(dumps(found, indent=1, default=_plain) + "\n")


def load_schedules(path: str | os.PathLike[str]) -> dict[str, Schedule]:
    """Read what `save_schedules` or `metalearn export` wrote, {name: schedule}.

    Raises:
      ValueError: if these are no schedules, with the file and the name of the one that is none.
    """
    found = read(pathlib.Path(path), f"{path}")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no schedules: it is {found!r:.80}.")
    schedules = {}
    for name, each in found.items():
        try:
            schedules[name] = _schedule(each)
        except ValueError as error:
            raise ValueError(f"{path}, {name!r}: {error}") from error
    return schedules
