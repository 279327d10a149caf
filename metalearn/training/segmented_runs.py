"""An inner run as a function of eta that is cut into segments: of any length, on data of any size.

`SegmentedRuns` is `metalearn.diagnostics.perturbed_runs.PerturbedRuns` for `Trainer(segment=K)`:
the same numbers, by programs of K inner steps that the host calls one after another.

    run        theta_T and the outer loss at eta + h v: forward, and no state is kept
    tangents   forward as well; the tangent of theta travels from program to program with theta
    pull_back  forward and backward, as an outer step is (`metalearn.training.segment_run`):
               states between segments are kept within the trainer's `replay`, or replayed

The cotangents of every inner step come with the meta-gradient here too: the probes are a part of
eta, and each program adds the norms of its own steps. Training runs on data of the host read the
rows of one segment at a time. Memory is that of one segment under `Reverse("nested")`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn._utils.trees import split
from metalearn.diagnostics.perturbed_runs import (
    Carry,
    End,
    InnerRuns,
    Pullback,
    Pushed,
    Tangents,
    ThreeRuns,
    along_directions,
    is_theta,
    metasmoothness,
    moved,
    probed,
    random_direction,
    with_arguments,
)
from metalearn.engines import Reverse
from metalearn.tasks import DrawnTask, Reads, Tasks, draw_task, fetched, fetches_key, needs_fetch
from metalearn.train_state import TrainState
from metalearn.training import segment_programs
from metalearn.training.prefetch import prefetching
from metalearn.training.segment_plan import OUTER_LOSS
from metalearn.training.segment_run import SegmentRun
from metalearn.training.segmented_unroll import SegmentedUnroll, Segments
from metalearn.training.task_batch import TaskBatch
from metalearn.unroll import Eta

_moved = jax.jit(moved)


@dataclasses.dataclass(frozen=True)
class _ProbedUnroll(SegmentedUnroll):
    """One full unroll, cut into segments, whose eta is (eta, probes [T]); see `probed`."""

    theta: tuple[bool, ...]

    def draw(self, tasks: Tasks, key: jax.Array) -> DrawnTask:
        """Return the task that `key` draws, with probes."""
        task = super().draw(tasks, key)

        def batches() -> Any:
            each = task.batches()
            return each, jnp.arange(len(jax.tree.leaves(each)[0]), dtype=jnp.int32)

        return task._replace(
            unroll=probed(task.unroll, self.theta),
            batches=batches,
            batches_at=lambda steps: (task.batches_at(steps), steps),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentedRuns(InnerRuns):
    """The inner run of one task, at any eta, in segments.

    Args:
      trainer: a `Trainer(segment=K)`; its engine is not read.
      tasks: those of the next outer step; training runs on the host are not read yet.
      state: before that outer step.
      key: (), draws the task.
    """

    trainer: Any
    tasks: Tasks
    state: TrainState
    key: jax.Array

    @classmethod
    def create(
        cls, trainer: Any, state: TrainState, tasks: Tasks, key: jax.Array | None = None
    ) -> SegmentedRuns:
        """Return the run of the task that `key` draws. Arguments as of `PerturbedRuns.create`.

        Raises:
          ValueError: for a trainer with a layout over devices.
        """
        if trainer.layout is not None:
            raise ValueError(
                "`smoothness` measures one task, whose segments run on one device, and this "
                f"trainer has segment={trainer.segment!r} and a layout over devices. Measure with "
                "a trainer without `layout` (--config.mesh.tasks=1 and no other axis), or without "
                "`segment`."
            )
        fetch = fetches_key(tasks, key)
        key = trainer.task_keys(state)[0] if key is None else key
        if fetch and not tasks.reads_steps:  # once, for all programs
            first = int(state.step) * trainer.tasks_per_step
            tasks = fetched(tasks, key[None], first, trainer.algorithm)
        return cls(trainer, tasks, dataclasses.replace(state, inner=()), key)

    @property
    def horizon(self) -> int:
        """T, the inner steps that are run."""
        return self._segments.steps

    # Forward.

    def run(self, v: Eta, h: float) -> End:
        """Return the end of the run at eta + h v."""
        segments, programs = self._segments, self._programs
        eta = _moved(self.state.eta, v, jnp.float32(h)), self._probes
        with self._reading() as tasks_of:
            tasks = tasks_of(0)
            run = programs.start(*self._shared(eta, tasks), steps=segments.steps)
            for number in range(segments.count):
                tasks = tasks_of(number) if number else tasks
                jax.block_until_ready(run)  # or the rows of all segments would wait in memory
                run, _ = programs.advance(
                    *(*self._shared(eta, tasks), run.stream, run.inner),
                    np.int32(number * segments.length),
                    steps=segments.steps_of(number),
                    until=None,
                )
            outer = programs.outer_loss(*self._shared(eta, tasks_of(segments.count)), run.stream)
        state, inner = jax.tree.map(lambda leaf: leaf[0], (run.stream, run.inner))  # of the task
        theta = split(state, self._unrolls.theta)[0]
        return End(theta, outer.outer_loss[0][0], inner.losses)

    def three(self, draw: jax.Array, h: float) -> ThreeRuns:
        """Return three runs along the random direction of a key."""
        v = jax.jit(random_direction)(self.state.eta, draw)
        ends = [self.run(v, size) for size in (0.0, h, 2 * h)]
        thetas = [np.stack(leaves) for leaves in zip(*(end.theta for end in ends), strict=True)]
        losses = jnp.stack([end.loss for end in ends])
        return ThreeRuns(jax.jit(metasmoothness)(thetas), losses)

    def tangents(self, v: Eta) -> Tangents:
        """Return the tangents of the run along v, by inner step."""
        segments, (start, advance, slope) = self._segments, self._push
        norms: list[tuple[np.ndarray, np.ndarray]] = []

        def shared(tasks: Tasks) -> tuple[Any, ...]:
            return self.state.eta, v, tasks, self.key

        with self._reading() as tasks_of:
            tasks = tasks_of(0)
            carry = start(*shared(tasks))
            for number in range(segments.count):
                tasks = tasks_of(number) if number else tasks
                first, steps = np.int32(number * segments.length), segments.steps_of(number)
                carry, of_segment = advance(*shared(tasks), carry, first, steps=steps)
                norms.append(jax.tree.map(np.asarray, of_segment))
            whole = slope(*shared(tasks_of(segments.count)), carry)
        return Tangents(whole, *(jnp.concatenate(each) for each in zip(*norms, strict=True)))

    @functools.cached_property
    def _push(self) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
        """The programs of `tangents`: of theta_0, of a segment, and of the outer loss."""

        def start(eta: Eta, v: Eta, tasks: Tasks, key: jax.Array) -> Carry:
            return Pushed(self._draw(tasks, key).unroll, eta, v).start()

        def advance(
            eta: Eta, v: Eta, tasks: Tasks, key: Any, carry: Carry, first: jax.Array, steps: int
        ) -> Any:
            task = self._draw(tasks, key)
            batches = task.batches_at(first + jnp.arange(steps, dtype=first.dtype))
            return Pushed(task.unroll, eta, v).advance(carry, batches)

        def slope(eta: Eta, v: Eta, tasks: Tasks, key: jax.Array, carry: Carry) -> jax.Array:
            return Pushed(self._draw(tasks, key).unroll, eta, v).slope(carry)

        of_segment = jax.jit(advance, static_argnames="steps", donate_argnums=4)
        return jax.jit(start), of_segment, jax.jit(slope)

    # Forward and backward.

    def pull_back(self, draws: Sequence[jax.Array], given: Sequence[Eta] = ()) -> Pullback:
        """Return the meta-gradient along directions; see `PerturbedRuns.pull_back`."""
        run = self._segment_run
        metrics: Any = None
        state = TrainState(self.state.step, (self.state.eta, self._probes), (), self.key)
        try:
            while metrics is None:
                state, metrics = run.take_reading(state, self._read)
        finally:
            run.close()
        grads, cotangents = state.optimizer
        along = jax.jit(functools.partial(along_directions, self.trainer.optimizer))
        return along(self.state, list(given), list(draws), metrics["loss"], grads, cotangents)

    @functools.cached_property
    def _segment_run(self) -> SegmentRun:
        shared = self._shared((self.state.eta, self._probes), self._arguments(self.tasks))
        state = TrainState(self.state.step, shared[0], (), self.key)
        of_step = self._programs, state, shared, self._segments

        def partway(position: Any, gradients: bool = False) -> TrainState:
            return segment_programs.shapes(*of_step, position, gradients)

        return SegmentRun(self._segments, self._programs, self.trainer.replay, partway)

    # What both have in common.

    @functools.cached_property
    def _unrolls(self) -> _ProbedUnroll:
        theta: list[bool] = []

        def trace(eta: Eta, tasks: Tasks, key: jax.Array) -> None:
            task = self._draw(tasks, key)
            theta.extend(is_theta(task.unroll, eta, task.batches_at(jnp.zeros(1, jnp.int32))))

        jax.eval_shape(trace, self.state.eta, self._arguments(self.tasks), self.key)
        fields = self.trainer.algorithm, Reverse("nested"), TaskBatch(1), False
        return _ProbedUnroll(*fields, self.trainer.segment, False, tuple(theta))

    @functools.cached_property
    def _segments(self) -> Segments:
        fields = self.trainer.algorithm, Reverse("nested"), TaskBatch(1), False
        unrolls = SegmentedUnroll(*fields, self.trainer.segment, False)
        return unrolls.segments(self.state.eta, self._arguments(self.tasks), self.key)

    @functools.cached_property
    def _probes(self) -> jax.Array:
        return jnp.zeros(self.horizon, jnp.float32)

    @functools.cached_property
    def _programs(self) -> segment_programs.Programs:
        def updated(state: TrainState, grads: Any, metrics: Any) -> Any:
            return dataclasses.replace(state, optimizer=grads), metrics

        hooks = segment_programs.Hooks(
            jax.jit, lambda key, step: key[None], lambda state: state, updated
        )
        return segment_programs.compiled(self._unrolls, hooks)

    def _draw(self, tasks: Tasks, key: jax.Array) -> DrawnTask:
        return draw_task(self.trainer.algorithm, tasks, key)

    def _shared(self, eta: Any, tasks: Tasks) -> tuple[Any, ...]:
        return eta, tasks, self.key, self.state.step

    def _arguments(self, tasks: Tasks) -> Tasks:
        return with_arguments(self.trainer, self.state, tasks)

    def _read(self, reads: Reads) -> Tasks:
        """Return the task with what a program reads."""
        tasks = fetched(self.tasks, self.key[None], 0, self.trainer.algorithm, reads)
        return self._arguments(tasks)

    def _reading(self) -> contextlib.AbstractContextManager[Callable[[int], Tasks]]:
        """Return a context of the function: segment -> the task with its rows, read ahead.

        The number after the last segment: with what the outer loss reads.
        """
        if not (needs_fetch(self.tasks) and self.tasks.reads_steps):  # others were read before
            tasks = self._arguments(self.tasks)
            return contextlib.nullcontext(lambda number: tasks)
        segments = self._segments

        def read(number: int) -> Tasks:
            if number == segments.count:
                return self._read(OUTER_LOSS)
            return self._read(Reads(number * segments.length, segments.steps_of(number), False))

        return prefetching(read, segments.count)
