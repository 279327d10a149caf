"""Segmented unrolls: a full unroll cut into several compiled programs of K inner steps each.

Forward mode saves no residuals of earlier steps, so its loop can be interrupted between any two
steps (`Forward.start`, `advance`, `finish`). Cut into segments of K inner steps, an outer step
reports its progress, can be checkpointed in mid-trajectory, and can be stopped by a signal. The
result equals that of the uncut loop, to rounding.

A segment is compiled for its length and for the number of tangents it pushes: tangents that are
still zero are skipped. There are at most six such numbers (`metalearn.engines.forward.tangents`),
and so, with the first and the last segment, at most eight programs.
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
from metalearn.tasks import DrawnTask, Reads, Tasks
from metalearn.training.full_unroll import FullUnroll
from metalearn.unroll import horizon


class Segment(NamedTuple):
    """Consecutive inner steps of one program; equal segments share a compiled program."""

    steps: int  # the length of the segment
    first: bool  # whether it is the first of the unroll
    last: bool  # whether it is the last
    until: int  # tangents of entries of eta first read at this step or later are skipped

    def reads(self, end: int) -> Reads:
        """Return what it reads of tasks on the host; `end`: inner steps taken after it."""
        return Reads(end - self.steps, self.steps, self.last)


class PartialUnroll(NamedTuple):
    """An unroll between two segments. In a train state, leaves are [tasks, ...]."""

    step: jax.Array  # (), int32: inner steps taken
    stream: Any  # the engine's state of the loop
    inner: Any  # inner losses and norms recorded so far, leaves [T, ...]


@dataclasses.dataclass(frozen=True)
class SegmentedUnroll(FullUnroll):
    """Full unrolls, cut into segments.

    segment: inner steps of a segment; the last one may be shorter.
    """

    segment: int

    def segments(self, eta: Any, tasks: Tasks, key: jax.Array) -> dict[int, Segment]:
        """Return the segments of an unroll, by the number of inner steps taken after each.

        The arguments may be shapes.
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
        """Advance every task by a segment: (outputs, what is carried to the next segment).

        `outputs` are (meta-gradient, metrics) after the last segment, else None. `carried` is
        ignored by the first segment, and `()` after the last.
        """

        def on_run(eta: Any, tasks: Tasks, run: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            return self._take(segment, eta, self.draw(tasks, run[1]), run[0])

        inputs = () if segment.first else carried, keys
        means, carried = self.batch.mean_and_each(on_run, (eta, tasks), inputs)
        return self.of_step(means) if segment.last else None, strong(carried)

    def _take(self, segment: Segment, eta: Any, task: DrawnTask, run: Any) -> tuple[Any, Any]:
        start, stream, inner = self._first(eta, task) if segment.first else run
        batches = task.batches_at(start + jnp.arange(segment.steps, dtype=start.dtype))
        stream, new = self._engine.advance(task.unroll, eta, stream, batches, segment.until)

        def written(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 0)

        inner = jax.tree.map(written, inner, new)
        if not segment.last:
            return (), PartialUnroll(start + segment.steps, stream, inner)
        return self.counted(self._engine.finish(task.unroll, eta, stream, inner)), ()

    def _first(self, eta: Any, task: DrawnTask) -> PartialUnroll:
        """Return an unroll before its first step."""
        state = self.engine.init(task.engine_key, task.unroll, eta)
        stream = self._engine.start(task.unroll, eta, state)
        shapes = jax.eval_shape(
            lambda: self._engine.advance(task.unroll, eta, stream, task.batches())[1]
        )
        inner = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return PartialUnroll(jnp.zeros((), jnp.int32), stream, inner)

    @property
    def _engine(self) -> Streaming:
        assert isinstance(self.engine, Streaming)
        return self.engine


def spread(shardings: Any, engine: Any) -> Any:
    """Return the shardings of a train state, with tangents sharded as the engine says."""
    if not isinstance(shardings.inner, PartialUnroll):
        return shardings
    own = engine.sharding.spec if isinstance(engine.sharding, NamedSharding) else ()
    stream = shardings.inner.stream

    def along(tree: Any) -> Any:
        return jax.tree.map(lambda where: NamedSharding(where.mesh, P(TASKS, *own)), tree)

    stream = stream._replace(tangents=along(stream.tangents), directions=along(stream.directions))
    return dataclasses.replace(shardings, inner=shardings.inner._replace(stream=stream))


def steps_taken(carried: Any) -> int:
    """Return how many inner steps of the current outer step a carried state has taken."""
    if not isinstance(carried, PartialUnroll):
        return 0
    return int(carried.step.addressable_shards[0].data[0])
