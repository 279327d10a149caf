"""An outer step of several programs: the host runs segments forward, and then backward.

    forward    every segment once; states between segments are kept, as many as there is room for
    turn       the outer loss of the last state, and its cotangents, back through the last segment
    backward   for each segment before it, the last one first: its first state is read, or replayed
               from the nearest kept one, and cotangents are pulled back through the segment
    outcome    the meta-gradient, and the outer update

An engine whose backward pass reads inner gradients (`metalearn.engines.segments`) gets those that
were kept; those of other segments are computed by `advance`, once more. It is the same program that
computes them either way, so that the meta-gradient is the same to the last bit.

Which states are kept is decided by `metalearn.training.replay_schedule`, where they are kept by
`metalearn.training.kept_states`, and what a program computes by
`metalearn.training.segmented_unroll`. Two large programs are compiled, and a third if the last
segment is shorter. Between any two programs a `PartialUnroll` holds all there is: it is what a
checkpoint saves. `Forward` has no backward pass: the outcome follows the last segment.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.checkpoints.state_files import DamagedStateError
from metalearn.cost import Cost, cost
from metalearn.sharding.distributed import say
from metalearn.tasks import Read, Reads, Tasks
from metalearn.train_state import TrainState
from metalearn.training import replay_schedule as schedule
from metalearn.training.kept_states import (
    KeptState,
    KeptStates,
    ReleasedError,
    Replay,
    copied,
    device_bytes,
    places,
    state_bytes,
)
from metalearn.training.replay_schedule import Position
from metalearn.training.segmented_unroll import Cut, PartialUnroll, SegmentedUnroll

OUTER_LOSS = Reads(0, 0)  # what a program reads that takes the outer loss alone
PULL_BACK = 3  # the time to pull cotangents back through a segment, in times to advance it


class Programs(NamedTuple):
    """The compiled programs of a segmented outer step; see `compiled`."""

    start: Callable[..., PartialUnroll]
    advance: Callable[..., tuple[PartialUnroll, jax.Array]]
    judge: Callable[..., PartialUnroll]
    pull_back: Callable[..., tuple[PartialUnroll, jax.Array]]
    last: Callable[..., tuple[PartialUnroll, jax.Array]]
    outcome: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


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

    def judge(eta: Any, tasks: Tasks, key: Any, step: Any, stream: Any) -> PartialUnroll:
        return laid_out(eta, key, step, unrolls.judge(eta, tasks, keys(key, step), stream))

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
        ended, loss = unrolls.advance(*shared, stream, inner, first, steps, None)
        judged = unrolls.judge(*shared, ended.stream)
        after = stream, ended.gradients, judged.cotangents
        pulled = unrolls.pull_back(*shared, *after, first, steps)
        run = dataclasses.replace(judged, inner=ended.inner, cotangents=pulled.cotangents)
        return laid_out(eta, key, step, run), loss

    def outcome(state: TrainState, tasks: Tasks, run: PartialUnroll) -> Any:
        keys_now = keys(state.key, state.step)
        return hooks.updated(state, *unrolls.outcome(state.eta, tasks, keys_now, run))

    static = ("steps", "until")
    return Programs(
        hooks.compiled(start, static_argnames="steps"),
        hooks.compiled(advance, static_argnames=static, donate_argnums=(4, 5)),
        hooks.compiled(judge),
        hooks.compiled(pull_back, static_argnames="steps", donate_argnums=6),
        hooks.compiled(last, static_argnames="steps", donate_argnums=5),
        hooks.compiled(outcome),
    )


def shapes(
    programs: Programs,
    state: TrainState,
    shared: Any,
    cut: Cut,
    position: Position,
    gradients: bool = False,
) -> TrainState:
    """Return the shapes of a train state at a position of an outer step.

    Args:
      programs: of the outer step.
      state: the shapes of a train state between two outer steps.
      shared: the shapes of (eta, tasks, key, step).
      cut: the segments.
      position: of the outer step.
      gradients: with the inner gradients of the first segment, which are in no train state.
    """
    begun = jax.eval_shape(lambda shared: programs.start(*shared, steps=cut.steps), shared)
    run = PartialUnroll(inner=begun.inner, position=position)
    if position.live is not None:
        run = dataclasses.replace(run, stream=begun.stream)
    if position.target < cut.segments - 1:
        judged = _judged(programs, shared, begun)
        run = dataclasses.replace(run, judged=judged.judged, cotangents=judged.cotangents)
    if gradients:
        advance = functools.partial(programs.advance, steps=cut.length(0), until=cut.until(0))
        first = jax.ShapeDtypeStruct((), jnp.int32)
        ahead, _ = jax.eval_shape(advance, *shared, begun.stream, begun.inner, first)
        run = dataclasses.replace(run, gradients=ahead.gradients)
    return dataclasses.replace(state, inner=run)


def _judged(programs: Programs, shared: Any, begun: PartialUnroll) -> PartialUnroll:
    return jax.eval_shape(lambda *args: programs.judge(*args), *shared, begun.stream)


class Place(NamedTuple):
    """Where an outer step of several programs stands.

    Args:
      phase: "forward", "replay" or "backward": what the next program does.
      inner_step: at which inner step the run stands.
      steps: T.
      programs: how many programs have run.
      of: how many there are in all.
      work: the work done so far, in segments advanced.
      of_work: and in all.
    """

    phase: str
    inner_step: int
    steps: int
    programs: int
    of: int
    work: int
    of_work: int

    def __str__(self) -> str:
        way = {"forward": "", "replay": ", replaying", "backward": ", going backward"}[self.phase]
        return f"inner step {self.inner_step} of {self.steps}{way}"


class SegmentPlan(NamedTuple):
    """What an outer step of several programs takes, known before it runs.

    Args:
      segment: K, inner steps of a segment.
      segments: how many there are.
      state_bytes: of an inner state, of all tasks of the outer step in this process.
      device: states that are kept on the device.
      host: in host memory.
      disk: on disk.
      replays: segments that are run again.
      programs: how many parts the outer step has between which it can be stopped: a segment is
        advanced, or cotangents are pulled back through it.
      gradient_bytes: of the inner gradients of a segment, of all tasks of the outer step in this
        process; 0: the engine's backward pass reads none.
      device_gradients: segments whose inner gradients are kept on the device at a time.
      host_gradients: and in host memory.
      recomputed: segments whose inner gradients are computed again.
    """

    segment: int
    segments: int
    state_bytes: int
    device: int
    host: int
    disk: int
    replays: int
    programs: int
    gradient_bytes: int = 0
    device_gradients: int = 0
    host_gradients: int = 0
    recomputed: int = 0


class _Inputs:
    """What the programs of one call of `SegmentRun.take_reading` get.

    Attributes:
      state: the train state, without what is between two programs.
      latest: the tasks that were read last.
    """

    def __init__(self, state: TrainState, read: Read):
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


class SegmentRun:
    """Drives the programs of the outer steps of one trainer, on tasks of the same shapes.

    Attributes:
      mark: () of the program that was started last, ready when it is complete; of a forward
        program the mean last inner loss.
    """

    def __init__(
        self,
        unrolls: SegmentedUnroll,
        cut: Cut,
        programs: Programs,
        replay: Replay,
        shapes: Callable[..., TrainState],
        folder: pathlib.Path | None = None,
    ):
        """Make the driver.

        Args:
          unrolls: what the programs compute.
          cut: the segments.
          programs: compiled.
          replay: where states are kept.
          shapes: position -> the shapes of a train state there; see `shapes`.
          folder: for states on disk; None: a temporary one, or that of `replay`.
        """
        self.cut, self._unrolls, self._programs = cut, unrolls, programs
        self._replay, self._shapes, self._folder = replay, shapes, folder
        self._opened: KeptStates | None = None
        self.mark: Any = None

    # The programs.

    def take(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, Any]:
        """Run the next program of an outer step: (state, metrics), None if more follow."""
        return self.take_reading(state, lambda reads: tasks)

    def take_reading(self, state: TrainState, read: Read) -> tuple[TrainState, Any]:
        """Run the next program of an outer step, whose tasks are read as it needs them.

        Args:
          state: between two programs.
          read: what a program reads -> tasks that have it; called in the order of `reads`.
        """
        run, state = state.inner, dataclasses.replace(state, inner=())
        if not isinstance(run, PartialUnroll):
            run = PartialUnroll(position=self._beginning(state)._replace(live=None))
        if any(map(_is_deleted, jax.tree.leaves(run))):
            raise ReleasedError
        if self._unrolls.goes_back:
            self._states(state)  # a state inside an outer step may come from a closed run
        inputs = _Inputs(state, read)
        run = self._next(inputs, run)
        if not self._is_done(run):
            return dataclasses.replace(state, inner=run), None
        done = dataclasses.replace(run, position=None, programs=0, kept=(), kept_gradients=())
        tasks = inputs.latest if self._unrolls.goes_back else inputs.tasks(OUTER_LOSS)
        return self._programs.outcome(state, tasks, done)

    def reads(self) -> list[list[Reads]]:
        """Return what the programs of an outer step read, program by program, as it is planned."""
        if not self._unrolls.goes_back:
            each = [[self._reads(segment)] for segment in range(self.cut.segments)]
            return [*each[:-1], [*each[-1], OUTER_LOSS]]
        plan, planned = self.planned, []
        kept = plan.device + plan.host + plan.disk
        for kind, segment in schedule.operations(self.cut.segments, kept):
            turns = kind == "pull_back" and segment == self.cut.segments - 1
            again = [OUTER_LOSS] if turns and self._is_even else []
            planned.append([self._reads(segment), *again])
        return planned

    def _reads(self, segment: int) -> Reads:
        alone = self._unrolls.goes_back and segment == self.cut.segments - 1 and not self._is_even
        return Reads(segment * self.cut.segment, self.cut.length(segment), alone)

    @property
    def _is_even(self) -> bool:
        """Whether the programs of the other segments take the last one."""
        count, length = self.cut.segments, self.cut.segment
        return count > 1 and self.cut.steps == count * length

    def _next(self, inputs: _Inputs, run: PartialUnroll) -> PartialUnroll:
        if run.position is not None and run.position.live is None:
            run = self._with_state(inputs, run)
        position = run.position
        assert position is not None and position.live is not None
        run = dataclasses.replace(run, programs=run.programs + 1)
        shared = inputs.shared(self._reads(position.live))
        if position.live != position.target:
            return self._advanced(inputs.state, shared, run, position)
        turns = not jax.tree.leaves(run.cotangents)
        run = self._turned(inputs, run) if turns else self._pulled_back(shared, run)
        return dataclasses.replace(run, stream=(), position=schedule.pulled_back(position))

    def _advanced(
        self, state: TrainState, shared: Any, run: PartialUnroll, position: Position
    ) -> PartialUnroll:
        """Advance the live state by a segment, and keep what is to be kept."""
        assert position.live is not None
        ahead, self.mark = self._advance(shared, run, position.live)
        if self._opened is not None:
            self._opened.settle()  # copies of the segment before, while the device is at this one
        run = dataclasses.replace(run, stream=ahead.stream, inner=ahead.inner)
        run = self._with_gradients(run, position, ahead.gradients)
        position = schedule.advanced(position)
        if schedule.keeps(position):
            count = len(run.kept)
            if count < self._most(count):
                assert position.live is not None
                kept = self._states(state).keep(
                    position.live, run.stream, count, f"{int(state.step)}-{position.live}.state"
                )
                run = dataclasses.replace(run, kept=(*run.kept, kept))
                position = schedule.with_kept(position, self._most(count + 1))
            else:
                position = schedule.without_kept(position, count)
        return dataclasses.replace(run, position=position)

    def _with_gradients(
        self, run: PartialUnroll, position: Position, gradients: Any
    ) -> PartialUnroll:
        """Keep the inner gradients of the segment that a position is before, if they are to be."""
        if not jax.tree.leaves(gradients):
            return run
        assert self._opened is not None and position.live is not None
        kept, most = run.kept_gradients, self._opened.places.gradients
        if not schedule.keeps_gradients(position, most, [each.segment for each in kept]):
            return run
        new = self._opened.keep_gradients(position.live, gradients, kept)
        return dataclasses.replace(run, kept_gradients=(*kept, new))

    def _advance(self, shared: Any, run: PartialUnroll, segment: int) -> Any:
        return self._programs.advance(
            *(*shared, run.stream, run.inner, self._first(segment)),
            steps=self.cut.length(segment),
            until=self.cut.until(segment),
        )

    def _turned(self, inputs: _Inputs, run: PartialUnroll) -> PartialUnroll:
        """Take the last segment, the outer loss, and the backward pass through the segment."""
        segment = self.cut.segments - 1
        first, steps = self._first(segment), self.cut.length(segment)
        shared = inputs.shared(self._reads(segment))
        if not self._is_even:
            ended, self.mark = self._programs.last(
                *shared, run.stream, run.inner, first, steps=steps
            )
            return dataclasses.replace(
                run, inner=ended.inner, judged=ended.judged, cotangents=ended.cotangents
            )
        before = run.stream
        ahead, _ = self._advance(shared, dataclasses.replace(run, stream=copied(before)), segment)
        judged = self._programs.judge(*inputs.shared(OUTER_LOSS), ahead.stream)
        pulled, self.mark = self._programs.pull_back(
            *shared, before, ahead.gradients, judged.cotangents, first, steps=steps
        )
        return dataclasses.replace(
            run, inner=ahead.inner, judged=judged.judged, cotangents=pulled.cotangents
        )

    def _pulled_back(self, shared: Any, run: PartialUnroll) -> PartialUnroll:
        assert run.position is not None
        segment = run.position.target
        run = self._with_all_gradients(shared, run, segment)
        pulled, self.mark = self._programs.pull_back(
            *(*shared, run.stream, run.gradients, run.cotangents, self._first(segment)),
            steps=self.cut.length(segment),
        )
        run = dataclasses.replace(run, gradients=())
        return dataclasses.replace(run, cotangents=pulled.cotangents)

    def _with_all_gradients(self, shared: Any, run: PartialUnroll, segment: int) -> PartialUnroll:
        """Read the inner gradients of the segment before which a run stands, or compute them."""
        if not state_bytes(self._gradient_shapes):
            return run
        kept = [each for each in run.kept_gradients if each.segment == segment]
        others = tuple(each for each in run.kept_gradients if each.segment != segment)
        run = dataclasses.replace(run, kept_gradients=others)
        if kept and self._opened is not None and (read := self._opened.read_gradients(*kept)):
            return dataclasses.replace(run, gradients=read)
        live = dataclasses.replace(run, stream=copied(run.stream))
        ahead, _ = self._advance(shared, live, segment)
        return dataclasses.replace(run, inner=ahead.inner, gradients=ahead.gradients)

    @functools.cached_property
    def _gradient_shapes(self) -> Any:
        """The shapes of the inner gradients of a segment; none if `pull_back` reads none."""
        if not self._unrolls.goes_back or self.cut.segments == 1:
            return ()
        start = Position(self.cut.segments - 1, 0, 0)
        return self._shapes(start, gradients=True).inner.gradients

    def _first(self, segment: int) -> Any:
        return np.int32(segment * self.cut.segment)

    # The states.

    def close(self) -> None:
        """Let go of the kept states, and of their folder. States that checkpoints name stay."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def clear(self) -> None:
        """Delete all states on disk: no checkpoint refers to them."""
        if self._opened is not None:
            self._opened.clear()

    def _beginning(self, state: TrainState) -> Position:
        if not self._unrolls.goes_back:
            return Position(self.cut.segments, 0, self.cut.segments)
        self._states(state)
        return schedule.beginning(self.cut.segments, self._most(0))

    def _is_done(self, run: PartialUnroll) -> bool:
        position = run.position
        assert position is not None
        if not self._unrolls.goes_back:
            return position.live == self.cut.segments
        return position.target < 0

    def _with_state(self, inputs: _Inputs, run: PartialUnroll) -> PartialUnroll:
        """Read the nearest state before the target, or compute theta_0."""
        assert run.position is not None
        position, kept = run.position, run.kept
        while kept:
            assert self._opened is not None
            try:
                stream = self._opened.read(kept[-1])
                break
            except DamagedStateError as error:
                say(f"A kept state is lost ({error}): its segments are run again.")
                self._opened.drop(kept[-1])
                kept = kept[:-1]
                position = position._replace(kept=position.kept[:-1])
        else:
            shared = inputs.shared(self._reads(0))
            begun = self._programs.start(*shared, steps=self.cut.steps)
            stream = begun.stream
            if not jax.tree.leaves(run.inner):  # of the first program
                run = dataclasses.replace(run, inner=begun.inner)
        if not self._unrolls.goes_back:
            return dataclasses.replace(run, stream=stream, position=position._replace(live=0))
        position = schedule.restored(position, self._most(len(kept)))
        if len(position.kept) < len(kept):
            assert self._opened is not None
            self._opened.drop(kept[-1])
            kept = kept[:-1]
        return dataclasses.replace(run, stream=stream, position=position, kept=kept)

    def _most(self, kept: int) -> int:
        assert self._opened is not None
        return self._opened.limit(kept)

    def _states(self, state: TrainState) -> KeptStates:
        """Open the store of kept states, at the first outer step."""
        if self._opened is None:
            key = np.asarray(jax.random.key_data(state.key)).tobytes().hex()
            shapes = self._shapes(Position(self.cut.segments - 1, 0, 0)).inner.stream
            run = f"run {key}"
            if self._replay.folder and self._folder:  # runs of the same seed may share it
                place = os.path.abspath(self._folder)
                run += f", saved in {hashlib.blake2b(place.encode()).hexdigest()[:32]}"
            inputs = self._replay, shapes, self.cut.segments, run
            self._opened = KeptStates(*inputs, self._folder, self._gradient_shapes)
        return self._opened

    # What it costs.

    def costs(
        self, state: TrainState, tasks: Tasks, known: dict[str, Cost] | None = None
    ) -> dict[str, Cost]:
        """Return the cost of one call of each program, by name. Compiles, and allocates nothing.

        Args:
          state: a train state between two outer steps, or its shapes.
          tasks: or their shapes.
          known: costs by program text; see `metalearn.cost.cost`.
        """
        last, first = self.cut.segments - 1, jax.ShapeDtypeStruct((), jnp.int32)
        shared = state.eta, tasks, state.key, state.step
        begun = self._shapes(Position(last, 0, 0)).inner
        calls: dict[str, tuple[Any, ...]] = {"start": (*shared, {"steps": self.cut.steps})}
        alone = {0} if last else set()  # a run of one segment is taken by `last`
        for segment in sorted(alone if self._unrolls.goes_back else {0, last}):
            length = {"steps": self.cut.length(segment), "until": self.cut.until(segment)}
            name = f"advance {length['steps']}"
            calls[name] = (*shared, begun.stream, begun.inner, first, length)
        ended: Any = dataclasses.replace(begun, position=None)
        if self._unrolls.goes_back:
            judged = _judged(self._programs, shared, begun)
            steps = {"steps": self.cut.length(last)}
            if last:
                gradients = self._shapes(Position(last, 0, 0), gradients=True).inner.gradients
                calls["pull_back"] = (
                    *(*shared, begun.stream, gradients, judged.cotangents, first),
                    {"steps": self.cut.segment},
                )
            if last and self.cut.length(last) == self.cut.segment:
                calls["judge"] = (*shared, begun.stream, {})
            else:
                calls["last"] = (*shared, begun.stream, begun.inner, first, steps)
            ended = PartialUnroll((), begun.inner, judged.cotangents, judged.judged)
        calls["outcome"] = (state, tasks, ended, {})
        return {
            name: cost(getattr(self._programs, name.split()[0]), *args, known=known, **static)
            for name, (*args, static) in calls.items()
        }

    @functools.cached_property
    def planned(self) -> SegmentPlan:
        """What an outer step keeps, and which segments it runs again."""
        count = self.cut.segments
        shapes = self._shapes(Position(count - 1, 0, 0)).inner.stream
        each = state_bytes(shapes)
        if not self._unrolls.goes_back:
            return SegmentPlan(self.cut.segment, count, each, 0, 0, 0, 0, count)
        gradients = self._gradient_shapes
        where, of_gradients = places(self._replay, shapes, count, gradients), state_bytes(gradients)
        kept, again = where.all, schedule.replays(count, where.all)
        return SegmentPlan(
            *(self.cut.segment, count, each, where.device, where.host, where.disk),
            *(again, schedule.advances(count, kept) + count),
            *(of_gradients, where.device_gradients, where.host_gradients),
            schedule.recomputed(count, kept, where.gradients) if of_gradients else 0,
        )

    def cost(self, state: TrainState, tasks: Tasks, known: dict[str, Cost] | None = None) -> Cost:
        """Return the cost of an outer step: the FLOPs of all calls, the memory of the largest.

        What is kept on the device counts as arguments. See `costs`.
        """
        costs, plan = self.costs(state, tasks, known), self.planned
        shapes = self._shapes(Position(plan.segments - 1, 0, 0)).inner.stream
        calls = dict.fromkeys(costs, 1)
        even = "judge" in costs  # the last segment is taken by the programs of the others
        if self._unrolls.goes_back:
            advanced = plan.programs - plan.segments + plan.recomputed
            calls[f"advance {plan.segment}"] = advanced + even
            calls["pull_back"] = plan.segments - 1 + even
        else:
            calls[f"advance {plan.segment}"] = self.cut.steps // plan.segment
        largest = max(costs.values(), key=lambda each: each.peak)
        kept = (plan.device + even) * device_bytes(shapes)
        kept += plan.device_gradients * device_bytes(self._gradient_shapes)
        return largest._replace(
            flops=sum(calls[name] * each.flops for name, each in costs.items()),
            arguments=largest.arguments + kept,
        )

    # Where it stands, and checkpoints.

    @property
    def programs_in_all(self) -> int:
        """How many programs an outer step has, as was known before the first."""
        return self.planned.programs

    def arrays(self, state: TrainState) -> TrainState:
        """Return a copy of a state for a checkpoint: without the states that are kept."""
        run = state.inner
        parts = copied((run.stream, run.inner, run.cotangents, run.judged))
        return _without_empty(dataclasses.replace(state, inner=PartialUnroll(*parts)))

    def place(self, state: TrainState) -> Place:
        """Return where the outer step of a state stands."""
        run, segments = state.inner, self.cut.segments
        begun = isinstance(run, PartialUnroll)
        if not self._unrolls.goes_back:
            done = run.position.live if begun else 0
            step = min(done * self.cut.segment, self.cut.steps)
            return Place("forward", step, self.cut.steps, done, segments, done, segments)
        most = self._opened.most if self._opened else 0
        position: Position
        if not begun:
            if self._opened is None:
                most = self._states(state).most
            position, programs, turned = schedule.beginning(segments, most), 0, False
        else:
            position, programs = run.position, run.programs
            turned = bool(jax.tree.leaves(run.cotangents))
        left = schedule.remaining(position, max(most, len(position.kept)))
        back = position.target + 1
        work = programs + (PULL_BACK - 1) * (segments - back)
        at = position.live if position.live is not None else back
        ready = position.live == position.target or position.base == position.target
        phase = ("backward" if ready else "replay") if turned else "forward"
        return Place(
            phase,
            min(at * self.cut.segment, self.cut.steps),
            self.cut.steps,
            programs,
            programs + left,
            work,
            work + left + (PULL_BACK - 1) * back,
        )

    def newest_step(self, state: TrainState) -> int | None:
        """Return the inner step that the last program has reached for the first time, or None."""
        run = state.inner
        if not isinstance(run, PartialUnroll) or jax.tree.leaves(run.cotangents):
            return None
        assert run.position is not None and run.position.live is not None
        return min(run.position.live * self.cut.segment, self.cut.steps)

    def saved(self, state: TrainState) -> dict[str, Any]:
        """Write the kept states of a state to disk; return a record (JSON) for `restored_shapes`.

        DiskError if the disk refuses.
        """
        run = state.inner
        kept = self._states(state).written(run.kept) if run.kept else []
        where = list(run.position[:3])
        names = "segment", "position", "programs", "kept"
        return dict(zip(names, (self.cut.segment, where, run.programs, kept), strict=True))

    def checkpointed(self, record: dict[str, Any] | None) -> None:
        """Delete files that are not needed any more, after a checkpoint with a record was saved."""
        if self._opened is not None:
            self._opened.checkpointed(record["kept"] if record else [])

    def restored_shapes(self, record: dict[str, Any]) -> TrainState:
        """Return the shapes of the train state of a checkpoint."""
        target, live, stop = record["position"]
        if record["segment"] != self.cut.segment:
            step = (target + 1 if live is None else live) * record["segment"]
            raise ValueError(
                f"This state stands at inner step {step} of an outer step that is cut into "
                f"segments of {record['segment']}, not of {self.cut.segment}. Go on with the "
                "`segment` that it was made with."
            )
        state = self._shapes(Position(target, live, stop))
        run = dataclasses.replace(state.inner, programs=record["programs"])
        return _without_empty(dataclasses.replace(state, inner=run))

    def restored(self, state: TrainState, record: dict[str, Any] | None) -> TrainState:
        """Return the train state of a checkpoint with its kept states."""
        if isinstance(state.inner, PartialUnroll):
            assert state.inner.position is not None
            shapes = self._shapes(state.inner.position).inner
            parts = "stream", "inner", "cotangents", "judged"
            whole = {
                name: _filled(getattr(shapes, name), getattr(state.inner, name)) for name in parts
            }
            state = dataclasses.replace(state, inner=dataclasses.replace(state.inner, **whole))
        if not self._unrolls.goes_back:
            return state
        kept: list[KeptState] = self._states(state).restored(record["kept"] if record else [])
        run = state.inner
        if record is None or not isinstance(run, PartialUnroll):
            return state
        assert run.position is not None
        if lost := len(record["kept"]) - len(kept):
            say(f"{lost} of the kept states are lost: their segments are run again.")
        position = run.position._replace(kept=tuple(each.boundary for each in kept))
        return dataclasses.replace(
            state, inner=dataclasses.replace(run, position=position, kept=tuple(kept))
        )


def _is_deleted(leaf: Any) -> bool:
    """Return whether a program has used the buffers of an array for its own results."""
    return not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _without_empty(tree: Any) -> Any:
    """Return a tree without arrays of no numbers, which Orbax does not save: None for each."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _filled(shapes: Any, tree: Any) -> Any:
    """Return a tree from `_without_empty` with its empty arrays, of these shapes."""

    def fill(shape: Any, leaf: Any) -> Any:
        return jnp.zeros(shape.shape, shape.dtype) if leaf is None else leaf

    return jax.tree.map(fill, shapes, tree)
