"""A learned schedule, to take away: a plain function of the step, and JSON.

optax.sgd(learned["learning_rate"].stretched(50_000))
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.algorithms.windows import stretched, window_of
from metalearn.fields import check_fields


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Piecewise constant: an `optax.Schedule`. After the horizon the last value holds.

    Several go into one optimizer by name: `optax.inject_hyperparams(sgd)(**schedules)`.
    """

    edges: tuple[int, ...]  # [N + 1]: where each window begins; the horizon
    values: tuple[float, ...] | tuple[tuple[float, ...], ...]  # one for each window

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.edges) != len(self.values) + 1:
            raise ValueError(
                f"A schedule has one edge more than values, not {len(self.edges)} edges and "
                f"{len(self.values)} values."
            )

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Return the value at an inner step."""
        found = window_of(jnp.asarray(step), np.asarray(self.edges))
        return jnp.asarray(self.values)[found]

    @property
    def horizon(self) -> int:
        """Return T."""
        return self.edges[-1]

    def stretched(self, horizon: int) -> Schedule:
        """Return the same schedule over a run of another length."""
        return dataclasses.replace(self, edges=stretched(self.edges, horizon))

    def to_json(self) -> str:
        """Return the schedule as JSON: {"edges": [...], "values": [...]}."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Raises:
          ValueError: if that is not a schedule.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or found.keys() != {"edges", "values"}:
            raise ValueError(f"A schedule has edges and values, and this JSON has not: {text[:80]}")
        values = tuple(tuple(v) if isinstance(v, list) else v for v in found["values"])
        return cls(tuple(found["edges"]), values)


def save_schedules(path: str | os.PathLike[str], schedules: Mapping[str, Schedule]) -> None:
    """Write schedules by name, such as `FDS.schedules(eta)`, as one JSON file."""
    found = {name: dataclasses.asdict(schedule) for name, schedule in schedules.items()}
    pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")


def load_schedules(path: str | os.PathLike[str]) -> dict[str, Schedule]:
    """Read what `save_schedules` or `metalearn export` wrote, {name: schedule}.

    Raises:
      ValueError: if these are no schedules.
    """
    found = json.loads(pathlib.Path(path).read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no schedules: it is {found!r:.80}.")
    return {name: Schedule.from_json(json.dumps(each)) for name, each in found.items()}
