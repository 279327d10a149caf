"""Segmented unrolls: a full unroll cut into several compiled programs of K inner steps each.

Forward mode stores nothing of the steps behind it, so its loop can stand still between any two
of them (`Forward.start`, `advance`, `finish`). Cut into segments of K inner steps, an outer step
shows how far it is, can be checkpointed in mid-trajectory, and stops where it is asked to. The
result is that of the uncut loop, to rounding.

A segment is compiled for its length and for the tangents that it pushes: those of windows that
begin after it are left alone. There are at most six such numbers of tangents
(`metalearn.engines.forward.tangents`), and so, with the first and the last, at most eight programs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.trees import strong
from metalearn.engines.base import Streaming
from metalearn.sharding.mesh import TASKS
from metalearn.tasks import DrawnTask, Tasks
from metalearn.training.full_unroll import FullUnroll
from metalearn.unroll import horizon


class Segment(NamedTuple):
    """Some inner steps of a run, one after the other; those that are equal share a program."""

    steps: int  # how many
    first: bool  # the run begins with them
    last: bool  # the run ends with them
    until: int  # entries of eta that are first read at this step, or later, do not count yet


class PartialUnroll(NamedTuple):
    """An unroll between two segments. In a train state, leaves are [tasks, ...]."""

    step: jax.Array  # (), int32: inner steps taken
    stream: Any  # the engine's
    seen: Any  # what the loop saw until now, leaves [T, ...]


@dataclasses.dataclass(frozen=True)
class SegmentedUnroll(FullUnroll):
    """Full unrolls, cut into segments.

    segment: inner steps of a segment; the last one may be shorter.
    """

    segment: int

    def segments(self, eta: Any, tasks: Tasks, key: jax.Array) -> dict[int, Segment]:
        """Return the segments of a run by the inner steps that are behind it then.

        Shapes will do for the arguments.
        """
        segments: dict[int, Segment] = {}

        def cut(eta: Any, tasks: Tasks, key: jax.Array) -> None:
            task = self.draw(tasks, key)
            steps = horizon(jax.eval_shape(task.batches))
            if self.segment > steps:
                raise ValueError(
                    f"A segment of {self.segment} inner steps is longer than the horizon, which "
                    f"is {steps}. Take at most {steps}."
                )
            ends = self._engine.ends(task.unroll, eta, steps)
            for start in range(0, steps, self.segment):
                stop = min(start + self.segment, steps)
                until = next(end for end in ends if end >= stop)
                segments[stop] = Segment(stop - start, start == 0, stop == steps, until)

        jax.eval_shape(cut, eta, tasks, key)
        return segments

    def take(
        self, segment: Segment, eta: Any, tasks: Tasks, keys: jax.Array, carried: Any
    ) -> tuple[Any, Any]:
        """Take a segment of every run: ((meta-gradient, metrics) at the last, the runs then).

        Nothing is `carried` into the first segment, and nothing out of the last.
        """

        def on_run(eta: Any, tasks: Tasks, run: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            return self._take(segment, eta, self.draw(tasks, run[1]), run[0])

        inputs = () if segment.first else carried, keys
        means, carried = self.batch.mean_and_each(on_run, (eta, tasks), inputs)
        return self.of_step(means) if segment.last else None, strong(carried)

    def _take(self, segment: Segment, eta: Any, task: DrawnTask, run: Any) -> tuple[Any, Any]:
        start, stream, seen = self._first(eta, task) if segment.first else run
        batches = task.batches_at(start + jnp.arange(segment.steps, dtype=start.dtype))
        stream, new = self._engine.advance(task.unroll, eta, stream, batches, segment.until)

        def noted(seen: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(seen, new.astype(seen.dtype), start, 0)

        seen = jax.tree.map(noted, seen, new)
        if not segment.last:
            return (), PartialUnroll(start + segment.steps, stream, seen)
        return self.counted(self._engine.finish(task.unroll, eta, stream, seen)), ()

    def _first(self, eta: Any, task: DrawnTask) -> PartialUnroll:
        """Return an unroll before its first step."""
        state = self.engine.init(task.engine_key, task.unroll, eta)
        stream = self._engine.start(task.unroll, eta, state)
        shapes = jax.eval_shape(
            lambda: self._engine.advance(task.unroll, eta, stream, task.batches())[1]
        )
        seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return PartialUnroll(jnp.zeros((), jnp.int32), stream, seen)

    @property
    def _engine(self) -> Streaming:
        assert isinstance(self.engine, Streaming)
        return self.engine


def spread(shardings: Any, engine: Any) -> Any:
    """Return where a train state lies, its tangents as the engine spreads them."""
    if not isinstance(shardings.inner, PartialUnroll):
        return shardings
    own = engine.sharding.spec if isinstance(engine.sharding, NamedSharding) else ()
    stream = shardings.inner.stream

    def along(tree: Any) -> Any:
        return jax.tree.map(lambda where: NamedSharding(where.mesh, P(TASKS, *own)), tree)

    stream = stream._replace(tangents=along(stream.tangents), directions=along(stream.directions))
    return dataclasses.replace(shardings, inner=shardings.inner._replace(stream=stream))


def steps_taken(carried: Any) -> int:
    """Return the inner steps that the runs of a train state have taken of this outer step."""
    if not isinstance(carried, PartialUnroll):
        return 0
    return int(carried.step.addressable_shards[0].data[0])
