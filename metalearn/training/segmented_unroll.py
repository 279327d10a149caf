"""Segmented unrolls: a full unroll cut into programs of K inner steps each.

An outer step that is cut into segments fits in no single program: it reports its progress, can be
saved and stopped between any two segments, and differentiates runs of any length. The result is
that of the uncut loop, to rounding. Five small functions serve every engine,

    start          eta                                       -> theta_0, and what the engine carries
    advance        eta, state, batches [K]                   -> state, inner gradients [K]
    outer_loss     eta, state                                -> outer loss, cotangents of the state
    pull_back      eta, state, batches, inner gradients [K], cotangents    -> cotangents
    meta_gradient  eta, cotangents                           -> meta-gradient

each for all tasks of an outer step. There are inner gradients only where the engine's `pull_back`
reads them (`metalearn.engines.segments`).

`Forward` saves no residuals of earlier steps: after the last segment its meta-gradient is there,
and nothing is pulled back. `Reverse` and `MixedFlow` need the state before each segment for the
backward pass; `metalearn.training.segment_run` drives these functions, and says which states and
inner gradients are kept.

A segment is compiled for its length. With `Forward`, also for the number of tangents it pushes:
those that are still zero are skipped (`metalearn.engines.forward.tangents`), at most six numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn._utils.trees import is_differentiable, strong
from metalearn.engines import segments
from metalearn.engines.base import Aux, Backward, Streaming
from metalearn.sharding.mesh import TASKS
from metalearn.tasks import DrawnTask, Tasks
from metalearn.training.full_unroll import FullUnroll
from metalearn.training.replay_schedule import Position
from metalearn.unroll import Eta, horizon


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PartialUnroll:
    """An outer step between two of its programs; `TrainState.inner`. Leaves are [tasks, ...].

    Args:
      stream: the inner states, for `Forward` with their tangents; () where none is at hand.
      inner: inner losses and norms recorded so far, leaves [tasks, T, ...].
      cotangents: `engines.segments.Cotangents`; () before the outer loss is known.
      outer_loss: (outer loss, metrics) of each task; () before they are known.
      gradients: inner gradients of the segment that `advance` has run, leaves [tasks, K, ...]; ()
        between programs.
      position: where the run stands; not an array.
      programs: how many programs the outer step has run; not an array.
      kept: the states that are kept, `kept_states.KeptState`; not arrays.
      kept_gradients: `kept_states.KeptGradients`; not arrays, and in no checkpoint.
    """

    stream: Any = ()
    inner: Any = ()
    cotangents: Any = ()
    outer_loss: Any = ()
    gradients: Any = ()
    position: Position | None = dataclasses.field(default=None, metadata={"static": True})
    programs: int = dataclasses.field(default=0, metadata={"static": True})
    kept: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    kept_gradients: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of an unroll."""

    steps: int  # T, the horizon
    length: int  # K, inner steps of a segment; the last one may be shorter
    ends: tuple[int, ...]  # of `Forward`: see `Streaming.ends`
    has_backward_pass: bool  # whether the engine pulls cotangents back through them

    @property
    def count(self) -> int:
        """The number of segments."""
        return -(-self.steps // self.length)

    @property
    def last_is_full(self) -> bool:
        """Whether the last of several segments is as long as the others."""
        return self.count > 1 and self.steps == self.count * self.length

    def steps_of(self, segment: int) -> int:
        """Return the inner steps of a segment, counted from 0."""
        return min(self.length, self.steps - segment * self.length)

    def until(self, segment: int) -> int | None:
        """Return before which step an entry of eta is first read whose tangent a segment pushes."""
        stop = min((segment + 1) * self.length, self.steps)
        return next((end for end in self.ends if end >= stop), None)


def about_square_root(steps: int) -> int:
    """Return a length of segments of T steps: about sqrt(T), a divisor of T if there is one near.

    The device then holds about as many states of one segment as there are segments.

    >>> [about_square_root(steps) for steps in (1, 10, 64, 1000, 10_007, 100_000)]
    [1, 5, 8, 25, 101, 400]
    """
    root = math.isqrt(steps - 1) + 1 if steps > 1 else 1
    near = [n for n in range(-(-root // 2), 2 * root + 1) if steps % n == 0]
    return min(near, key=lambda n: abs(math.log(n / math.sqrt(steps))), default=root)


@dataclasses.dataclass(frozen=True)
class SegmentedUnroll(FullUnroll):
    """Full unrolls, cut into segments.

    segment: inner steps of a segment, the last one may be shorter; "auto": about sqrt(T).
    gradients: whether `advance` returns the inner gradients of a segment, of all tasks, where the
      engine's `pull_back` reads them. Otherwise `pull_back` computes them, chunk by chunk of tasks.
    """

    segment: int | str
    gradients: bool

    def segments(self, eta: Eta, tasks: Tasks, key: jax.Array) -> Segments:
        """Return the segments of the unrolls of tasks. The arguments may be shapes."""
        traced: list[Segments] = []

        def trace(eta: Eta, tasks: Tasks, key: jax.Array) -> None:
            task = self.draw(tasks, key)
            steps = horizon(jax.eval_shape(task.batches))
            if not steps:
                raise ValueError(
                    f"`Trainer(segment={self.segment})` cuts inner loops into programs, but these "
                    "take no inner steps (T = 0). Leave `segment`."
                )
            segment = about_square_root(steps) if self.segment == "auto" else int(self.segment)
            if segment > steps:
                raise ValueError(
                    f"A segment of {segment} inner steps is longer than the horizon, which "
                    f"is {steps}. Take at most {steps}."
                )
            engine = self.engine
            ends = engine.ends(task.unroll, eta, steps) if isinstance(engine, Streaming) else ()
            traced.append(Segments(steps, segment, tuple(ends), self.has_backward_pass))

        jax.eval_shape(trace, eta, tasks, key)
        return traced[-1]

    @property
    def has_backward_pass(self) -> bool:
        """Whether the engine has a backward pass through the segments."""
        return not isinstance(self.engine, Streaming)

    def start(self, eta: Eta, tasks: Tasks, keys: jax.Array, steps: int) -> PartialUnroll:
        """Return the unrolls of all tasks before their first step; `steps`: T."""

        def of_task(eta: Eta, task: DrawnTask) -> PartialUnroll:
            stream = self._start(eta, task)
            shapes = jax.eval_shape(
                lambda: self._advance(eta, task, stream, jnp.zeros((), jnp.int32), 1, None)[1]
            )
            inner = jax.tree.map(
                lambda leaf: jnp.zeros((steps, *leaf.shape[1:]), leaf.dtype), shapes
            )
            return PartialUnroll(stream, inner)

        return self._each(of_task, eta, tasks, keys)

    def advance(
        self,
        eta: Eta,
        tasks: Tasks,
        keys: jax.Array,
        stream: Any,
        inner: Any,
        first: jax.Array,
        steps: int,
        until: int | None,
    ) -> tuple[PartialUnroll, jax.Array]:
        """Advance every task by a segment: (its unrolls, the mean last inner loss ()).

        Args:
          eta: the meta-parameters.
          tasks: where the tasks come from.
          keys: [tasks].
          stream: before the segment.
          inner: what was recorded so far.
          first: (), int32: the number of the segment's first step.
          steps: of the segment.
          until: for `Forward`, see `Segments.until`.
        """

        def on_run(eta: Eta, tasks: Tasks, first: jax.Array, run: Any) -> tuple[Any, Any]:
            key, stream, inner = run
            task = self.draw(tasks, key)
            stream, new, gradients = self._advance(eta, task, stream, first, steps, until)

            def written(old: jax.Array, new: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), first, 0)

            loss = new.losses[-1].mean() if new.losses.size else jnp.zeros(())
            inner = jax.tree.map(written, inner, new)
            gradients = tuple(gradients) if self.gradients else ()
            return loss, PartialUnroll(stream, inner, gradients=gradients)

        shared = eta, tasks, first
        loss, each = self.batch.mean_and_each(on_run, shared, (keys, stream, inner))
        return strong(each), loss

    def outer_loss(self, eta: Eta, tasks: Tasks, keys: jax.Array, stream: Any) -> PartialUnroll:
        """Return the outer losses, and the cotangents of the last states."""

        def of_task(eta: Eta, task: DrawnTask, state: Any) -> PartialUnroll:
            outer, cotangents = segments.outer_cotangents(task.unroll, eta, state)
            return PartialUnroll(outer_loss=outer, cotangents=cotangents)

        return self._each(of_task, eta, tasks, keys, stream)

    def pull_back(
        self,
        eta: Eta,
        tasks: Tasks,
        keys: jax.Array,
        stream: Any,
        gradients: Any,
        cotangents: Any,
        first: jax.Array,
        steps: int,
    ) -> PartialUnroll:
        """Pull the cotangents after a segment back to the states before it."""

        def on_run(eta: Eta, tasks: Tasks, first: jax.Array, run: Any) -> tuple[Any, Any]:
            key, state, gradients, cotangents = run
            task = self.draw(tasks, key)
            batches = task.batches_at(first + jnp.arange(steps, dtype=first.dtype))
            read = task.unroll, eta, state, batches, gradients
            return (), PartialUnroll(cotangents=self._pulled_back(*read, cotangents=cotangents))

        shared, runs = (eta, tasks, first), (keys, stream, gradients, cotangents)
        return strong(self.batch.mean_and_each(on_run, shared, runs)[1])

    def meta_gradient(self, eta: Eta, tasks: Tasks, keys: jax.Array, run: PartialUnroll) -> Any:
        """Return (meta-gradient, metrics) of an outer step."""

        def on_run(eta: Eta, tasks: Tasks, each: Any) -> tuple[Any, tuple[()]]:
            key, run = each
            task = self.draw(tasks, key)
            if isinstance(self.engine, Streaming):
                result = self.engine.finish(task.unroll, eta, run.stream, run.inner)
            else:
                loss, metrics = run.outer_loss
                grads = segments.through_init(task.unroll, eta, run.cotangents)
                result = (loss, Aux(metrics, (), run.inner)), grads
            return self.counted(result), ()

        return self.of_step(self.batch.mean_and_each(on_run, (eta, tasks), (keys, run))[0])

    def _each(
        self, of_task: Callable[..., Any], eta: Eta, tasks: Tasks, keys: jax.Array, *runs: Any
    ) -> Any:
        """Return what `of_task` returns for (eta, task, *runs) of each task."""

        def on_run(eta: Eta, tasks: Tasks, each: Any) -> tuple[tuple[()], Any]:
            key, *run = each
            return (), of_task(eta, self.draw(tasks, key), *run)

        return strong(self.batch.mean_and_each(on_run, (eta, tasks), (keys, *runs))[1])

    def _start(self, eta: Eta, task: DrawnTask) -> Any:
        if isinstance(self.engine, Streaming):
            state = self.engine.init(task.engine_key, task.unroll, eta)
            return self.engine.start(task.unroll, eta, state)
        return jax.tree.map(jnp.asarray, task.unroll.init(eta))  # a state may hold Python's numbers

    def _advance(
        self,
        eta: Eta,
        task: DrawnTask,
        stream: Any,
        first: jax.Array,
        steps: int,
        until: int | None,
    ) -> tuple[Any, Any, Any]:
        batches = task.batches_at(first + jnp.arange(steps, dtype=first.dtype))
        if isinstance(self.engine, Streaming):
            return *self.engine.advance(task.unroll, eta, stream, batches, until), []
        return self._backward.advance(task.unroll, eta, stream, batches)

    def _pulled_back(self, *read: Any, cotangents: Any) -> Any:
        """Return the cotangents before a segment; `read`: the arguments of `Backward.pull_back`."""
        pull_back: Callable[..., Any] = self._backward.pull_back
        return pull_back(*read, cotangents)

    @property
    def _backward(self) -> Backward:
        assert isinstance(self.engine, Backward)
        return self.engine


def spread(shardings: Any, engine: Any, inner: Any) -> Any:
    """Return the shardings of a train state whose outer step is cut into segments.

    Tangents are sharded as the engine says, and inner gradients as the leaves of the inner state
    that have their shape.

    Args:
      shardings: of a train state.
      engine: of the trainer.
      inner: `TrainState.inner`, or its shapes.
    """
    run = shardings.inner
    if not isinstance(run, PartialUnroll) or not jax.tree.leaves(run.stream):
        return shardings
    if not isinstance(engine, Streaming):
        run = dataclasses.replace(run, gradients=_like_state(run, inner))
        return dataclasses.replace(shardings, inner=run)
    sharding = getattr(engine, "sharding", None)
    own = sharding.spec if isinstance(sharding, NamedSharding) else ()
    leading = P(TASKS, *(tuple(own) or (None,)))  # of tasks and tangents

    def along(tree: Any) -> Any:
        return jax.tree.map(lambda where: NamedSharding(where.mesh, leading), tree)

    # A tangent is sharded as the leaf of the state that it is of.
    stream, leaves = run.stream, jax.tree.leaves(run.stream.state)
    of_state = [is_differentiable(leaf) for leaf in jax.tree.leaves(inner.stream.state)]
    tangents = [
        NamedSharding(where.mesh, P(*leading, *where.spec[1:]))
        for where, has_tangent in zip(leaves, of_state, strict=True)
        if has_tangent
    ]
    stream = stream._replace(tangents=tangents, directions=along(stream.directions))
    return dataclasses.replace(shardings, inner=dataclasses.replace(run, stream=stream))


def _like_state(shardings: PartialUnroll, inner: PartialUnroll) -> Any:
    """Return the shardings of inner gradients: those of the leaves of the state of their shape."""
    specs: dict[tuple[int, ...], set[tuple[Any, ...]]] = {}
    leaves = zip(jax.tree.leaves(shardings.stream), jax.tree.leaves(inner.stream), strict=True)
    for where, leaf in leaves:
        specs.setdefault(leaf.shape[1:], set()).add(tuple(where.spec)[1:])

    def of_gradient(where: NamedSharding, leaf: Any) -> NamedSharding:  # [tasks, K, ...]
        same = specs.get(leaf.shape[2:], set())
        spec = next(iter(same)) if len(same) == 1 else ()
        return NamedSharding(where.mesh, P(TASKS, None, *spec))

    return jax.tree.map(of_gradient, shardings.gradients, inner.gradients)
