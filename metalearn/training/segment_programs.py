"""The programs of an outer step that is cut into segments, as the host calls them.

`metalearn.training.segmented_unroll` says what they compute. Here they are compiled, with the keys
of the tasks, the layout over devices and the outer update of a trainer. Two of them are large,
`advance` and `pull_back`, and a third, `last`, if the last segment is shorter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn.tasks import Read, Reads, Tasks
from metalearn.train_state import TrainState
from metalearn.training.replay_schedule import Position
from metalearn.training.segmented_unroll import PartialUnroll, SegmentedUnroll, Segments


class Programs(NamedTuple):
    """The compiled programs of a segmented outer step; see `compiled`."""

    start: Callable[..., PartialUnroll]
    advance: Callable[..., tuple[PartialUnroll, jax.Array]]
    outer_loss: Callable[..., PartialUnroll]
    pull_back: Callable[..., tuple[PartialUnroll, jax.Array]]
    last: Callable[..., tuple[PartialUnroll, jax.Array]]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


class Hooks(NamedTuple):
    """What the programs need of a trainer.

    Args:
      compiled: a function (state or eta, tasks, ...) and options of `jax.jit` -> compiled.
      keys: key of the run, outer step -> the keys [tasks] of its tasks.
      constrained: train state -> the same, laid out over the devices.
      updated: train state, meta-gradient, metrics -> (the next train state, metrics).
    """

    compiled: Callable[..., Any]
    keys: Callable[[jax.Array, Any], jax.Array]
    constrained: Callable[[TrainState], TrainState]
    updated: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


def compiled(unrolls: SegmentedUnroll, hooks: Hooks) -> Programs:
    """Return the programs; each is compiled when it is first called.

    The buffers of a state are those of the state after it, and cotangents likewise: device memory
    does not grow with the number of segments.
    """
    keys = hooks.keys

    def laid_out(eta: Any, key: jax.Array, step: jax.Array, run: PartialUnroll) -> PartialUnroll:
        return hooks.constrained(TrainState(step, eta, (), key, run)).inner

    def start(eta: Any, tasks: Tasks, key: Any, step: Any, steps: int) -> PartialUnroll:
        return laid_out(eta, key, step, unrolls.start(eta, tasks, keys(key, step), steps))

    def advance(
        eta: Any,
        tasks: Tasks,
        key: Any,
        step: Any,
        stream: Any,
        inner: Any,
        first: Any,
        steps: int,
        until: int | None,
    ) -> tuple[PartialUnroll, jax.Array]:
        inputs = eta, tasks, keys(key, step), stream, inner, first, steps, until
        run, loss = unrolls.advance(*inputs)
        return laid_out(eta, key, step, run), loss

    def outer_loss(eta: Any, tasks: Tasks, key: Any, step: Any, stream: Any) -> PartialUnroll:
        return laid_out(eta, key, step, unrolls.outer_loss(eta, tasks, keys(key, step), stream))

    def pull_back(
        eta: Any,
        tasks: Tasks,
        key: Any,
        step: Any,
        stream: Any,
        gradients: Any,
        cotangents: Any,
        first: Any,
        steps: int,
    ) -> tuple[PartialUnroll, jax.Array]:
        after = stream, gradients, cotangents
        run = unrolls.pull_back(eta, tasks, keys(key, step), *after, first, steps)
        return laid_out(eta, key, step, run), first + steps

    def last(
        eta: Any, tasks: Tasks, key: Any, step: Any, stream: Any, inner: Any, first: Any, steps: int
    ) -> tuple[PartialUnroll, jax.Array]:
        shared = eta, tasks, keys(key, step)
        ahead, loss = unrolls.advance(*shared, stream, inner, first, steps, None)
        run = unrolls.outer_loss(*shared, ahead.stream)
        after = stream, ahead.gradients, run.cotangents
        pulled = unrolls.pull_back(*shared, *after, first, steps)
        run = dataclasses.replace(run, inner=ahead.inner, cotangents=pulled.cotangents)
        return laid_out(eta, key, step, run), loss

    def update(state: TrainState, tasks: Tasks, run: PartialUnroll) -> Any:
        keys_now = keys(state.key, state.step)
        return hooks.updated(state, *unrolls.meta_gradient(state.eta, tasks, keys_now, run))

    static = ("steps", "until")
    return Programs(
        hooks.compiled(start, static_argnames="steps"),
        hooks.compiled(advance, static_argnames=static, donate_argnums=(4, 5)),
        hooks.compiled(outer_loss),
        hooks.compiled(pull_back, static_argnames="steps", donate_argnums=6),
        hooks.compiled(last, static_argnames="steps", donate_argnums=5),
        hooks.compiled(update),
    )


class Inputs:
    """What the programs of one call of `SegmentRun.take_reading` get.

    Attributes:
      state: the train state, without what is between two programs.
      latest: the tasks that were read last.
    """

    def __init__(self, state: TrainState, read: Read):
        """Make the inputs; `read`: what a program reads -> tasks that have it."""
        self.state, self._read = state, read
        self.latest: Any = None
        self._has: Reads | None = None

    def tasks(self, reads: Reads) -> Tasks:
        """Return tasks that have what a program reads."""
        if self._has != reads:
            self._has, self.latest = reads, self._read(reads)
        return self.latest

    def shared(self, reads: Reads) -> tuple[Any, ...]:
        """Return (eta, tasks, key, step)."""
        return self.state.eta, self.tasks(reads), self.state.key, self.state.step


def shapes(
    programs: Programs,
    state: TrainState,
    shared: Any,
    segments: Segments,
    position: Position,
    gradients: bool = False,
) -> TrainState:
    """Return the shapes of a train state at a position of an outer step.

    Args:
      programs: of the outer step.
      state: the shapes of a train state between two outer steps.
      shared: the shapes of (eta, tasks, key, step).
      segments: of an outer step.
      position: of the outer step.
      gradients: with the inner gradients of the first segment, which are in no train state.
    """
    begun = jax.eval_shape(lambda shared: programs.start(*shared, steps=segments.steps), shared)
    run = PartialUnroll(inner=begun.inner, position=position)
    if position.live is not None:
        run = dataclasses.replace(run, stream=begun.stream)
    if position.target < segments.count - 1:
        ended = outer_loss_shapes(programs, shared, begun)
        run = dataclasses.replace(run, outer_loss=ended.outer_loss, cotangents=ended.cotangents)
    if gradients:
        advance = functools.partial(
            programs.advance, steps=segments.steps_of(0), until=segments.until(0)
        )
        first = jax.ShapeDtypeStruct((), jnp.int32)
        ahead, _ = jax.eval_shape(advance, *shared, begun.stream, begun.inner, first)
        run = dataclasses.replace(run, gradients=ahead.gradients)
    return dataclasses.replace(state, inner=run)


def outer_loss_shapes(programs: Programs, shared: Any, begun: PartialUnroll) -> PartialUnroll:
    """Return the shapes of the outer losses and cotangents, from those of `Programs.start`."""
    return jax.eval_shape(lambda *args: programs.outer_loss(*args), *shared, begun.stream)
