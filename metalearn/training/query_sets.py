"""Several query sets of one task: one inner loop, whose cotangents are pulled back together.

The meta-gradient of one outer loss is the pull-back of one cotangent of the last inner state. The
outer losses of Q query sets have Q cotangents of the same state,

    theta_T = inner loop(eta)                 once
    F_q     = loss(eta, theta_T; query q)     q = 1 .. Q
    dF_q    = pull back of dF_q/dtheta_T      all q at a time, by `vmap`

so that the forward pass, its residuals and their rematerialisation are shared, and what grows with
Q are Hessian products and the memory of cotangents. `vmap` finds by itself what does not depend on
the query; nothing here knows of an engine. A segmented run has its cotangents between two programs,
with an axis [Q] of their own.

The inner loop of an algorithm that reads the query set in its steps (such as a multi-step outer
loss) is another one for each set. In one program `vmap` sees that; a segmented run is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.trees import strong
from metalearn.algorithm import Algorithm
from metalearn.engines import segments
from metalearn.engines.base import Aux, MetaGradient, Streaming, check_eta, outer_loss
from metalearn.engines.inner_loop import depends, inner_loop, step_body
from metalearn.tasks import (
    ALL_STEPS,
    Reads,
    Tasks,
    WithConstants,
    draw,
    draw_task,
    fetched,
    fetches_key,
    label_range,
)
from metalearn.train_state import TrainState
from metalearn.training import segment_programs
from metalearn.training.full_unroll import FullUnroll
from metalearn.training.replay import Replay
from metalearn.training.segment_run import SegmentRun
from metalearn.training.segmented_unroll import PartialUnroll, SegmentedUnroll
from metalearn.training.task_batch import TaskBatch
from metalearn.unroll import Episode, Eta, Metrics

ONE_TASK = TaskBatch(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _QuerySets(Tasks):
    """Tasks whose episodes have one of several query sets in place of their own.

    Args:
      tasks: the distribution.
      queries: in place of `Episode.query`, leaves [Q, ...].
      number: (), int32, which of them.
    """

    tasks: Tasks
    queries: Any
    number: Any = 0

    def sample(self, key: jax.Array) -> Episode:
        """Draw one task, with the query set `number`."""
        query = jax.tree.map(lambda leaf: leaf[self.number], self.queries)
        return draw(self.tasks, key)._replace(query=query)

    def label_range(self) -> tuple[int, int] | None:
        """Return the range of the labels of the tasks."""
        return label_range(self.tasks)


def _with_query(tasks: Tasks, number: jax.Array) -> Tasks:
    """Return the tasks with the query set `number` ()."""
    if isinstance(tasks, WithConstants):
        return dataclasses.replace(tasks, tasks=_with_query(tasks.tasks, number))
    assert isinstance(tasks, _QuerySets)
    return dataclasses.replace(tasks, number=number)


def _each_query(function: Callable[..., Any], tasks: Tasks, *others: Any) -> Any:
    """Return `function(tasks, *others)` of every query set, stacked; `others` have an axis [Q]."""
    of_queries: Any = tasks.tasks if isinstance(tasks, WithConstants) else tasks
    numbers = jnp.arange(_count(of_queries.queries), dtype=jnp.int32)
    with_query = functools.partial(_with_query, tasks)
    return jax.vmap(lambda number, *rest: function(with_query(number), *rest))(numbers, *others)


def _count(queries: Any) -> int:
    """Return Q, the leading axis of the leaves of query sets."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(queries)}
    if len(lengths) != 1 or lengths in ({()}, {(0,)}):
        raise ValueError(
            "Query sets are stacked: each array of a query has an axis [Q] in front, of one length "
            f"and at least 1, not {sorted(map(list, lengths))}. A single query set: "
            "`jax.tree.map(lambda leaf: leaf[None], query)`."
        )
    return int(next(iter(lengths))[0])


@dataclasses.dataclass(frozen=True)
class _SegmentedQueries(SegmentedUnroll):
    """One full unroll, cut into segments, whose outer losses are those of several query sets."""

    def outer_loss(self, eta: Eta, tasks: Tasks, keys: jax.Array, stream: Any) -> PartialUnroll:
        """Return the outer losses, and their cotangents of the last state: [tasks, Q, ...]."""

        def on_run(eta: Eta, tasks: Tasks, run: Any) -> Any:
            key, state = run

            def of_query(tasks: Tasks) -> PartialUnroll:
                unroll = self.draw(tasks, key).unroll
                outer, cotangents = segments.outer_cotangents(unroll, eta, state)
                return PartialUnroll(outer_loss=outer, cotangents=cotangents)

            return (), _each_query(of_query, tasks)

        return strong(self.batch.mean_and_each(on_run, (eta, tasks), (keys, stream))[1])

    def _pulled_back(self, *read: Any, cotangents: Any) -> Any:
        """Return the cotangents of all query sets before a segment."""
        pull_back = functools.partial(super()._pulled_back, *read)
        return jax.vmap(lambda cotangents: pull_back(cotangents=cotangents))(cotangents)

    def meta_gradient(self, eta: Eta, tasks: Tasks, keys: jax.Array, run: PartialUnroll) -> Any:
        """Return (meta-gradients [Q, ...], metrics [Q]); all finite or not, they are not masked."""
        (key,), run = keys, jax.tree.map(lambda leaf: leaf[0], run)

        def streamed(tasks: Tasks) -> Any:
            engine: Any = self.engine
            return engine.finish(self.draw(tasks, key).unroll, eta, run.stream, run.inner)

        def pulled(tasks: Tasks, outer: Any, cotangents: Any) -> Any:
            loss, metrics = outer
            grads = segments.through_init(self.draw(tasks, key).unroll, eta, cotangents)
            return (loss, Aux(metrics, (), run.inner)), grads

        if isinstance(self.engine, Streaming):
            return _outputs(_each_query(streamed, tasks))
        return _outputs(_each_query(pulled, tasks, run.outer_loss, run.cotangents))


def _outputs(result: Any) -> tuple[Eta, Metrics]:
    (loss, aux), grads = result
    return grads, {"loss": loss, **aux.metrics}


@dataclasses.dataclass(frozen=True, eq=False)
class QueryGradients:
    """Meta-gradients of one task, one of each of several query sets. `Trainer.query_gradients`.

    Args:
      algorithm: whose inner loop runs once; its outer loss reads `Episode.query`.
      engine: differentiates it.
      segment: inner steps of a program; None: all are one program. See `Trainer`.
      replay: where states between segments are kept.
      compiled: a function (eta, tasks, ...) and options of `jax.jit` -> compiled.
    """

    algorithm: Algorithm
    engine: MetaGradient
    segment: int | str | None
    replay: Replay
    compiled: Callable[..., Any] = dataclasses.field(repr=False)

    def __call__(self, eta: Eta, tasks: Tasks, key: jax.Array, queries: Any) -> tuple[Eta, Metrics]:
        """Return (meta-gradients, leaves [Q, ...], metrics by name, [Q], "loss" among them).

        Args:
          eta: the meta-parameters.
          tasks: where the task comes from; on the host or on the device.
          key: (), of the task, as `Trainer.task_gradient` takes it.
          queries: in place of the query of its episode: leaves [Q, ...].
        """
        _count(queries)
        if self.segment is None:
            reads = ALL_STEPS._replace(query=False)
            return self.program(eta, self.with_queries(tasks, key, queries, reads), key)
        return self._in_segments(eta, tasks, key, queries)

    def with_queries(
        self, tasks: Tasks, key: jax.Array, queries: Any, reads: Reads = ALL_STEPS
    ) -> Tasks:
        """Return tasks on the device with these query sets, as `program` takes them."""
        if fetches_key(tasks, key):
            tasks = fetched(tasks, key[None], 0, self.algorithm, reads._replace(query=False))
        return _QuerySets(tasks, queries)

    @functools.cached_property
    def program(self) -> Callable[..., tuple[Eta, Metrics]]:
        """The program of a run that is not cut: (eta, `with_queries(...)`, key). Compiled."""
        unrolls = FullUnroll(self.algorithm, self.engine, ONE_TASK, False)

        def gradients(eta: Eta, tasks: Tasks, key: jax.Array) -> tuple[Eta, Metrics]:
            return _each_query(lambda tasks: _outputs(unrolls.solve(eta, tasks, key)), tasks)

        return self.compiled(gradients)

    @functools.cached_property
    def losses(self) -> Callable[..., jax.Array]:
        """Train alone: (etas [R, ...], `with_queries(...)`, key) -> outer losses [R, Q]. Compiled.

        All R runs at a time.
        """

        def losses(etas: Eta, tasks: Tasks, key: jax.Array) -> jax.Array:
            def of_run(eta: Eta) -> jax.Array:
                task = draw_task(self.algorithm, tasks, key)
                state, _ = inner_loop(task.unroll, eta, task.batches())

                def of_query(tasks: Tasks) -> jax.Array:
                    unroll = draw_task(self.algorithm, tasks, key).unroll
                    return outer_loss(unroll, eta, state)[0]

                return _each_query(of_query, tasks)

            return jax.vmap(of_run)(etas)

        return self.compiled(losses)

    # In segments.

    @functools.cached_property
    def _unrolls(self) -> _SegmentedQueries:
        assert self.segment is not None
        return _SegmentedQueries(self.algorithm, self.engine, ONE_TASK, False, self.segment, True)

    @functools.cached_property
    def _programs(self) -> segment_programs.Programs:
        def updated(state: TrainState, grads: Any, metrics: Any) -> Any:
            return dataclasses.replace(state, optimizer=grads), metrics

        def keys(key: jax.Array, step: Any) -> jax.Array:
            return key[None]

        hooks = segment_programs.Hooks(self.compiled, keys, lambda state: state, updated)
        return segment_programs.compiled(self._unrolls, hooks)

    def _in_segments(
        self, eta: Eta, tasks: Tasks, key: jax.Array, queries: Any
    ) -> tuple[Eta, Metrics]:
        run = self.segments(eta, tasks, key, queries)
        state, metrics = TrainState(jnp.zeros((), jnp.int32), eta, (), key), None
        read = functools.partial(self.with_queries, tasks, key, queries)
        try:
            while metrics is None:
                state, metrics = run.take_reading(state, read)
        finally:
            run.close()
        return state.optimizer, metrics

    def segments(self, eta: Eta, tasks: Tasks, key: jax.Array, queries: Any) -> SegmentRun:
        """Return the programs of a run that is cut, for arguments of these shapes."""
        arguments = eta, _QuerySets(tasks, queries), key
        leaves, treedef = jax.tree.flatten(arguments)
        shapes = treedef, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        known = shapes, bool(jax.config.read("jax_enable_x64"))
        if known not in self._known_segments:
            check_eta(eta)
            self._check_inner_loop(*arguments)
            self._known_segments[known] = self._segment_run(*arguments)
        return self._known_segments[known]

    @functools.cached_property
    def _known_segments(self) -> dict[Any, SegmentRun]:
        return {}

    def _segment_run(self, eta: Eta, tasks: Tasks, key: jax.Array) -> SegmentRun:
        segments, step = self._unrolls.segments(eta, tasks, key), jnp.zeros((), jnp.int32)
        shared = jax.eval_shape(lambda *shared: shared, eta, tasks, key, step)
        state = TrainState(shared[3], shared[0], (), shared[2])

        def partway(position: Any, gradients: bool = False) -> TrainState:
            return segment_programs.shapes(
                self._programs, state, shared, segments, position, gradients
            )

        return SegmentRun(segments, self._programs, self.replay, partway)

    def _check_inner_loop(self, eta: Eta, tasks: Tasks, key: jax.Array) -> None:
        """Raise ValueError where the inner loop reads the query set: there is one for each then."""

        def trace(eta: Eta, tasks: _QuerySets, key: jax.Array) -> None:
            def one_step(queries: Any) -> Any:
                with_queries = dataclasses.replace(tasks, queries=queries)
                task = draw_task(self.algorithm, with_queries, key)
                batch = jax.tree.map(lambda leaf: leaf[0], task.batches_at(jnp.zeros(1, jnp.int32)))
                body = step_body(task.unroll, eta, jax.value_and_grad)
                return body(task.unroll.init(eta), batch)[0]

            if depends(one_step, tasks.queries):
                raise ValueError(
                    f"The inner loop of `{type(self.algorithm).__name__}` reads the query set, so "
                    "that each of several query sets has an inner loop of its own, and a run that "
                    "is cut into segments has one. Pass one query set at a time to "
                    "`Trainer.task_gradient`, or leave `segment`."
                )

        jax.eval_shape(trace, eta, tasks, key)
