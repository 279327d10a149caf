"""Learned schedules: piecewise constant over windows of inner steps, as functions of the step.

    optax.sgd(learned["learning_rate"].stretched(50_000))

T inner steps are divided into N windows: window i holds the steps from edges[i] to edges[i + 1].
The hypergradient of a value used in a single step is too noisy to learn from. The hypergradient of
a value shared by a window of W steps is the sum over these steps (Micaelli & Storkey 2021,
arXiv:2007.07869); its error per step falls with W, until a window is longer than the time over
which the best value changes.
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
from jaxtyping import Array, Float, Int

from metalearn._utils.checks import counts, is_integer
from metalearn._utils.strict_json import dumps, parse, read

Value = float | tuple[Any, ...]  # a number, or an array of them as nested tuples
MOST_AXES = 8  # of a value


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A piecewise constant `optax.Schedule`. After the horizon the last value holds.

    Several schedules set the hyperparameters of one optimizer by name:
    `optax.inject_hyperparams(sgd)(**schedules)`.

    Args:
      edges: [N + 1], the first step of each window, and the horizon last.
      values: [N, ...], the value in each window: a number, or an array as nested tuples.

    Raises:
      ValueError: for edges that are not increasing integers from 0, and for values that are not one
        finite number, or one array of them, for each window; all of one shape.
    """

    edges: tuple[int, ...]
    values: tuple[Value, ...]

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
    def of(cls, edges: tuple[int, ...], values: Float[np.ndarray, "windows ..."]) -> Schedule:
        """Return the schedule with an array of values, [N, ...]."""
        return cls(edges, _tuples(values.tolist()))

    def __call__(self, step: jax.typing.ArrayLike) -> Float[Array, "..."]:
        """Return the value at an inner step."""
        window = window_of(jnp.asarray(step), np.asarray(self.edges))
        return jnp.asarray(np.asarray(self.values, float))[window]

    @property
    def horizon(self) -> int:
        """T, the inner steps of the run that the windows cover."""
        return self.edges[-1]

    def stretched(self, horizon: int) -> Schedule:
        """Return the same schedule over a run of `horizon` >= 1 steps.

        Step t has the value of step floor(t T / horizon) here. Windows that hold no step of a
        shorter run are left out.
        """
        edges = stretched(self.edges, horizon)
        windows = [i for i in range(len(self.values)) if edges[i] < edges[i + 1]]
        values = tuple(self.values[i] for i in windows)
        return Schedule((*(edges[i] for i in windows), edges[-1]), values)

    def to_json(self) -> str:
        """Return the schedule as JSON: {"edges": [...], "values": [...]}."""
        return dumps(dataclasses.asdict(self), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Return the schedule that `to_json` wrote.

        Raises:
          ValueError: if the text is not a schedule.
        """
        return _schedule(parse(text, "This text"))


def _schedule(parsed: Any) -> Schedule:
    """Return the schedule that parsed JSON stands for; ValueError for anything else."""
    if not isinstance(parsed, dict) or parsed.keys() != {"edges", "values"}:
        raise ValueError(
            f"A schedule has edges and values, and this JSON has not: {dumps(parsed):.80}"
        )
    for field, value in parsed.items():
        if not isinstance(value, list):
            raise ValueError(f"The {field} of a schedule are a list, not {value!r:.80}.")
    return Schedule(tuple(parsed["edges"]), _tuples(parsed["values"]))


def _plain(number: Any) -> Any:
    """Return a NumPy number as a Python number, for JSON."""
    return np.asarray(number).item()


def _tuples(value: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _shape(value: Any, axes: int = MOST_AXES) -> tuple[int, ...]:
    """Return the shape of nested tuples of finite numbers; ValueError for anything else."""
    if isinstance(value, tuple):
        if not axes:
            raise ValueError(f"A value of a schedule has {MOST_AXES} axes at most.")
        inner = {_shape(each, axes - 1) for each in value}
        if len(inner) != 1:
            raise ValueError(f"A value of a schedule is an array of numbers, not {value!r:.80}.")
        return (len(value), *inner.pop())
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
        raise ValueError(f"A value of a schedule is a finite number, not {value!r:.80}.")
    return ()


def _is_finite(value: Any) -> bool:
    """Say whether a number is finite as a float; a large integer overflows it."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def save_schedules(path: str | os.PathLike[str], schedules: Mapping[str, Schedule]) -> None:
    """Write schedules by name, such as `FDS.schedules(eta)`, as one JSON file."""
    fields = {name: dataclasses.asdict(schedule) for name, schedule in schedules.items()}
    pathlib.Path(path).write_text(dumps(fields, indent=1, default=_plain) + "\n")


def load_schedules(path: str | os.PathLike[str]) -> dict[str, Schedule]:
    """Return the schedules that `save_schedules` or `metalearn export` wrote: {name: schedule}.

    Raises:
      ValueError: if the file holds anything else, with the path and the name of the entry.
    """
    parsed = read(pathlib.Path(path), f"{path}")
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} holds no schedules: it is {parsed!r:.80}.")
    schedules = {}
    for name, entry in parsed.items():
        try:
            schedules[name] = _schedule(entry)
        except ValueError as error:
            raise ValueError(f"{path}, {name!r}: {error}") from error
    return schedules


Windows = int | tuple[int, ...]  # a number of equal windows, or their edges, from 0 to the horizon
LONGEST = 2**31 - 1  # inner steps


def edges(windows: Windows, horizon: int) -> Int[np.ndarray, " edges"]:
    """Return the first step of each window, and the horizon last: [N + 1], int.

    With equal windows, step t is in window floor(N t / T).

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
    steps = np.asarray(windows)
    if steps[-1] != horizon:
        raise ValueError(
            f"The edges of windows go from 0 to the horizon, but these go through {windows!s:.80} "
            f"and the horizon is {horizon}: they do not cover it. Write windows=(0, ..., "
            f"{horizon})."
        )
    return steps


def check_windows(windows: Any) -> None:
    """Raise ValueError unless `windows` is a number of windows, or a tuple of increasing edges.

    The bounds that depend on the horizon are checked by `edges`.
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


def stretched(edges: Sequence[int], to: int) -> tuple[int, ...]:
    """Return the edges of the same windows in a run of `to` steps, [N + 1].

    Step t of that run is in the window of step floor(t T / to) of the run of T steps. In a
    shorter run a window may be empty; its two edges are then equal.
    """
    counts("stretched", 1, horizon=to)
    horizon = int(edges[-1])
    return tuple(-(-int(edge) * int(to) // horizon) for edge in edges)


def window_of(step: Int[Array, "*steps"], edges: Int[np.ndarray, " edges"]) -> Int[Array, "*steps"]:
    """Return the number of the window that holds a step: (), int32."""
    return jnp.searchsorted(jnp.asarray(edges[1:-1], jnp.int32), step, side="right")


def shared(per_step: Any, edges: np.ndarray) -> Any:
    """Return the hypergradient of windows, leaves [N, ...], from that of steps, [T, ...].

    One backward pass through a run with a value per step thus gives the hypergradients of windows
    of any length.
    """
    return jax.tree.map(lambda leaf: jnp.add.reduceat(leaf, jnp.asarray(edges[:-1])), per_step)


def spread(per_window: Any, edges: Sequence[int] | np.ndarray) -> Any:
    """Return the value at each step, leaves [T, ...], from those of windows, [N, ...]."""
    lengths = np.diff(np.asarray(edges))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, lengths, axis=0), per_window)
