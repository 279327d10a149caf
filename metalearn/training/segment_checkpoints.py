"""An outer step between two of its programs, as a checkpoint holds it: arrays, and a record (JSON).

The arrays are those of a `PartialUnroll`, without the states that are kept: these are files of
their own (`metalearn.training.kept_states`), which the record names. Kept inner gradients are in
no checkpoint: a run that is resumed computes them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.sharding.host_copies import copied
from metalearn.train_state import TrainState
from metalearn.training.kept_states import KeptState
from metalearn.training.replay_schedule import Position
from metalearn.training.segmented_unroll import PartialUnroll, Segments

PARTS = "stream", "inner", "cotangents", "outer_loss"  # the fields of a `PartialUnroll` with arrays

Shapes = Callable[[Position], TrainState]  # position -> the shapes of a train state there


def arrays(state: TrainState) -> TrainState:
    """Return a copy of the arrays of a state, which programs may not donate."""
    parts = copied({name: getattr(state.inner, name) for name in PARTS})
    return _without_empty(dataclasses.replace(state, inner=PartialUnroll(**parts)))


def record(
    run: PartialUnroll, segments: Segments, kept: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the record of a run; `kept`: that of its kept states."""
    assert run.position is not None
    return {
        "segment": segments.length,
        "position": list(run.position[:3]),
        "programs": run.programs,
        "kept": list(kept),
    }


def shapes(record: dict[str, Any], segments: Segments, shapes: Shapes) -> TrainState:
    """Return the shapes of the arrays of a checkpoint.

    Raises:
      ValueError: if it is of segments of another length.
    """
    target, live, stop = record["position"]
    if record["segment"] != segments.length:
        step = (target + 1 if live is None else live) * record["segment"]
        raise ValueError(
            f"This state stands at inner step {step} of an outer step that is cut into "
            f"segments of {record['segment']}, not of {segments.length}. Go on with the "
            "`segment` that it was made with."
        )
    state = shapes(Position(target, live, stop))
    run = dataclasses.replace(state.inner, programs=record["programs"])
    return _without_empty(dataclasses.replace(state, inner=run))


def with_empty(state: TrainState, shapes: Shapes) -> TrainState:
    """Return a restored state with its arrays of no numbers."""
    run = state.inner
    wanted = shapes(run.position).inner

    def fill(shape: Any, leaf: Any) -> Any:
        return jnp.zeros(shape.shape, shape.dtype) if leaf is None else leaf

    parts = {name: jax.tree.map(fill, getattr(wanted, name), getattr(run, name)) for name in PARTS}
    return dataclasses.replace(state, inner=dataclasses.replace(run, **parts))


def with_kept(state: TrainState, kept: Sequence[KeptState]) -> TrainState:
    """Return a restored state with the kept states that are still there."""
    position = state.inner.position._replace(kept=tuple(each.boundary for each in kept))
    run = dataclasses.replace(state.inner, position=position, kept=tuple(kept))
    return dataclasses.replace(state, inner=run)


def _without_empty(tree: Any) -> Any:
    """Return a tree without arrays of no numbers, which Orbax does not save: None for each."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
