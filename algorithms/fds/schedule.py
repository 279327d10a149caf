"""Learned schedules: constant over windows of inner steps, as plain functions of the step.

    optax.sgd(learned["learning_rate"].stretched(50_000))

T inner steps in N windows: window i holds the steps from edges[i] to edges[i + 1]. A
hyperparameter of each step on its own has a hypergradient so noisy that it cannot be
learned from; shared over a window of W steps, the hypergradient is the sum of those of its
steps (Micaelli & Storkey 2021, arXiv:2007.07869), whose error per step falls until the
window is longer than what the hyperparameter should vary over.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.checks import counts, is_integer
from metalearn._utils.strict_json import dumps, parse, read

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
                raise ValueError(
                    f"`Schedule({field}=...)`: The {field} of a schedule are a tuple, not "
                    f"{value!r:.80}."
                )
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


Windows = int | tuple[int, ...]  # so many equal ones, or their edges: from 0 to the horizon
LONGEST = 2**31 - 1  # inner steps


def edges(windows: Windows, horizon: int) -> np.ndarray:
    """Return where the windows begin, and the horizon last: [N + 1], int.

    Of equal windows, step t is in number floor(N t / T).

    Raises:
      ValueError: if the windows do not cover the horizon, or one of them is empty.
    """
    counts("edges", 1, horizon=horizon)
    if is_integer(windows):
        if not 1 <= windows <= horizon:
            raise ValueError(
                f"windows={windows}, but a horizon of {horizon} inner steps has at least one "
                f"window and at most {horizon}, one a step."
            )
        return -(-np.arange(windows + 1) * horizon // windows)
    check_windows(windows)
    given = np.asarray(windows)
    if given[-1] != horizon:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {windows!s:.80} "
            f"and the horizon is {horizon}: they do not cover it. Write windows=(0, ..., "
            f"{horizon})."
        )
    return given


def check_windows(windows: Any) -> None:
    """Raise ValueError unless these are windows of some horizon: a number of them, or edges.

    How many there may be is said where the horizon is known, by `edges`.
    """
    if is_integer(windows):
        return
    if not isinstance(windows, tuple):
        raise ValueError(
            f"windows={windows!s:.80} is neither a number of windows nor a tuple of their edges, "
            "such as windows=7 or windows=(0, 50, 100)."
        )
    shown = f"{windows!s:.80}"
    for edge in windows:
        if not is_integer(edge):
            raise ValueError(
                f"Edges of windows are inner steps, integers, not {edge!r:.80} in {shown}. Write "
                "windows=(0, ..., horizon)."
            )
    if len(windows) < 2 or windows[0] != 0:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {shown}: they "
            "do not cover it. Write windows=(0, ..., horizon)."
        )
    if any(after <= before for before, after in itertools.pairwise(windows)):
        raise ValueError(f"Edges of windows rise, each window holding a step; not {shown}.")
    if windows[-1] > LONGEST:
        raise ValueError(
            f"Inner steps are counted in 32 bits, up to {LONGEST}, but edges of windows go to "
            f"{windows[-1]}. Take a shorter run."
        )


def stretched(found: Sequence[int], to: int) -> tuple[int, ...]:
    """Return the edges of the same windows of a run of `to` steps, [N + 1].

    Step t of that run is in the window of step floor(t T / to) of the run of T steps. In a
    shorter run a window may hold no step: it then ends where it begins.
    """
    counts("stretched", 1, horizon=to)
    horizon = int(found[-1])
    return tuple(-(-int(edge) * int(to) // horizon) for edge in found)


def window_of(step: jax.Array, found: np.ndarray) -> jax.Array:
    """Return the number of the window that a step is in: (), int32."""
    return jnp.searchsorted(jnp.asarray(found[1:-1], jnp.int32), step, side="right")


def shared(per_step: Any, found: np.ndarray) -> Any:
    """Return the hypergradient of windows, leaves [N, ...], from that of steps, [T, ...].

    One reverse pass through an unshared run thus gives every window size at once.
    """
    return jax.tree.map(lambda leaf: jnp.add.reduceat(leaf, jnp.asarray(found[:-1])), per_step)


def spread(per_window: Any, found: Sequence[int] | np.ndarray) -> Any:
    """Return each step's value, leaves [T, ...], from those of windows, [N, ...]."""
    lengths = np.diff(np.asarray(found))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, lengths, axis=0), per_window)
