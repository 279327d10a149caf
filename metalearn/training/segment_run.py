"""An outer step of several programs: the host runs segments forward, and then backward.

    forward    every segment once; states between segments are kept, as many as there is room for
    last       the outer loss of the last state, and the backward pass through the last segment
    backward   for each segment before it, the last one first: its first state is read, or replayed
               from the nearest kept one, and cotangents are pulled back through the segment
    update     the meta-gradient, and the outer update

An engine whose backward pass reads inner gradients (`metalearn.engines.segments`) gets those that
were kept; those of other segments are computed by `advance`, once more. It is the same program that
computes them either way, so that the meta-gradient is the same to the last bit.

Here is the order in which the host calls the programs. Beside it, in `metalearn.training`,

    segmented_unroll       what a program computes
    segment_programs       the programs, compiled
    segment_plan           what they read and cost, and how far an outer step has come
    replay_schedule        which states are kept
    kept_states            where they are kept, within the budgets of `replay`
    segment_checkpoints    what a checkpoint between two programs holds

Between any two programs a `PartialUnroll` holds all there is. `Forward` has no backward pass: the
update follows the last segment.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.checkpoints.state_files import DamagedStateError
from metalearn.cost import Cost
from metalearn.sharding.distributed import say
from metalearn.sharding.host_copies import copied, device_bytes, process_bytes
from metalearn.tasks import Read, Reads, Tasks
from metalearn.train_state import TrainState
from metalearn.training import replay_schedule as schedule
from metalearn.training import segment_checkpoints, segment_plan
from metalearn.training.kept_states import KeptStates, ReleasedError
from metalearn.training.replay import Capacity, Replay, capacity
from metalearn.training.replay_schedule import Position
from metalearn.training.segment_plan import OUTER_LOSS, Progress, SegmentPlan, reads_of
from metalearn.training.segment_programs import Inputs, Programs
from metalearn.training.segmented_unroll import PartialUnroll, Segments


class SegmentRun:
    """Drives the programs of the outer steps of one trainer, on tasks of the same shapes.

    Attributes:
      segments: of an outer step.
      latest: () of the program that was started last, ready when it is complete; of a forward
        program the mean last inner loss.
      complete: the same of the program before it, which is complete.
    """

    def __init__(
        self,
        segments: Segments,
        programs: Programs,
        replay: Replay,
        shapes: Callable[..., TrainState],
        folder: pathlib.Path | None = None,
    ):
        """Make the driver.

        Args:
          segments: of an outer step.
          programs: compiled.
          replay: where states are kept.
          shapes: position -> the shapes of a train state there; see `segment_programs.shapes`.
          folder: for states on disk; None: a temporary one, or that of `replay`.
        """
        self.segments, self._programs = segments, programs
        self._replay, self._shapes, self._folder = replay, shapes, folder
        self._opened: KeptStates | None = None
        self.latest: Any = None
        self.complete: Any = None
        self._compiling: Future[Any] | None = None

    # The programs.

    def take(self, state: TrainState, tasks: Tasks) -> tuple[TrainState, Any]:
        """Run the next program of an outer step: (state, metrics), None if more follow."""
        return self.take_reading(state, lambda reads: tasks)

    def take_reading(self, state: TrainState, read: Read) -> tuple[TrainState, Any]:
        """Run the next program of an outer step, whose tasks are read as it needs them.

        Returns when the program before it is complete: one that waits for its turn holds its
        inputs and results beside those of the one that runs.

        Args:
          state: between two programs.
          read: what a program reads -> tasks that have it; called in the order of `reads`.
        """
        run, state = state.inner, dataclasses.replace(state, inner=())
        if not isinstance(run, PartialUnroll):
            run = PartialUnroll(position=self._beginning(state)._replace(live=None))
        if any(map(_is_deleted, jax.tree.leaves(run))):
            raise ReleasedError
        if self.segments.has_backward_pass:
            self._states(state)  # a state inside an outer step may come from a closed run
        inputs = Inputs(state, read)
        if run.programs == 0:
            self._compile_pull_back(inputs)
        before = self.latest
        run = self._next(inputs, run)
        self.complete = jax.block_until_ready(before)
        if not self._is_done(run):
            return dataclasses.replace(state, inner=run), None
        done = dataclasses.replace(run, position=None, programs=0, kept=(), kept_gradients=())
        backward = self.segments.has_backward_pass
        tasks = inputs.latest if backward else inputs.tasks(OUTER_LOSS)
        return self._programs.update(state, tasks, done)

    def reads(self) -> list[list[Reads]]:
        """Return what the programs of an outer step read, program by program, as it is planned."""
        return segment_plan.reads(self.segments, self.planned)

    def _compile_pull_back(self, inputs: Inputs) -> None:
        """Compile `pull_back` in a thread, beside the compilation and the run of `advance`.

        On CPUs alone: the compiler of other devices times kernels on them, and one of several
        processes may not run ahead of the others.
        """
        last, alone = self.segments.count - 1, jax.process_count() == 1
        has_several = self.segments.has_backward_pass and last > 0
        if self._compiling or not has_several or not alone or jax.default_backend() != "cpu":
            return
        run = self._shapes(Position(last - 1, 0, 0), gradients=True).inner
        program: Any = self._programs.pull_back
        lowered = program.lower(
            *inputs.shared(reads_of(self.segments, 0)),
            *(run.stream, run.gradients, run.cotangents, jax.ShapeDtypeStruct((), jnp.int32)),
            steps=self.segments.length,
        )
        thread = ThreadPoolExecutor(1, "compile")
        self._compiling = thread.submit(lowered.compile)
        thread.shutdown(wait=False)

    def _next(self, inputs: Inputs, run: PartialUnroll) -> PartialUnroll:
        if run.position is not None and run.position.live is None:
            run = self._with_state(inputs, run)
        position = run.position
        assert position is not None and position.live is not None
        run = dataclasses.replace(run, programs=run.programs + 1)
        shared = inputs.shared(reads_of(self.segments, position.live))
        if position.live != position.target:
            return self._advanced(inputs.state, shared, run, position)
        is_last = not jax.tree.leaves(run.cotangents)
        run = self._through_last_segment(inputs, run) if is_last else self._pulled_back(shared, run)
        return dataclasses.replace(run, stream=(), position=schedule.pulled_back(position))

    def _advanced(
        self, state: TrainState, shared: Any, run: PartialUnroll, position: Position
    ) -> PartialUnroll:
        """Advance the live state by a segment, and keep what is to be kept."""
        assert position.live is not None
        ahead, self.latest = self._advance(shared, run, position.live)
        if self._opened is not None:
            self._opened.settle()  # copies of the segment before, while the device is at this one
        run = dataclasses.replace(run, stream=ahead.stream, inner=ahead.inner)
        run = self._keep_gradients(run, position, ahead.gradients)
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

    def _keep_gradients(
        self, run: PartialUnroll, position: Position, gradients: Any
    ) -> PartialUnroll:
        """Keep the inner gradients of the segment that a position is before, if they are to be."""
        if not jax.tree.leaves(gradients):
            return run
        assert self._opened is not None and position.live is not None
        kept, most = run.kept_gradients, self._opened.capacity.gradients
        if not schedule.keeps_gradients(position, most, [each.segment for each in kept]):
            return run
        new = self._opened.keep_gradients(position.live, gradients, kept)
        return dataclasses.replace(run, kept_gradients=(*kept, new))

    def _advance(self, shared: Any, run: PartialUnroll, segment: int) -> Any:
        return self._programs.advance(
            *(*shared, run.stream, run.inner, self._first(segment)),
            steps=self.segments.steps_of(segment),
            until=self.segments.until(segment),
        )

    def _through_last_segment(self, inputs: Inputs, run: PartialUnroll) -> PartialUnroll:
        """Take the last segment, the outer loss, and the backward pass through the segment."""
        segment = self.segments.count - 1
        first, steps = self._first(segment), self.segments.steps_of(segment)
        shared = inputs.shared(reads_of(self.segments, segment))
        if not self.segments.last_is_full:
            ended, self.latest = self._programs.last(
                *shared, run.stream, run.inner, first, steps=steps
            )
            return dataclasses.replace(
                run, inner=ended.inner, outer_loss=ended.outer_loss, cotangents=ended.cotangents
            )
        before = run.stream
        ahead, _ = self._advance(shared, dataclasses.replace(run, stream=copied(before)), segment)
        outer = self._programs.outer_loss(*inputs.shared(OUTER_LOSS), ahead.stream)
        pulled, self.latest = self._pull_back(
            *shared, before, ahead.gradients, outer.cotangents, first, steps=steps
        )
        return dataclasses.replace(
            run, inner=ahead.inner, outer_loss=outer.outer_loss, cotangents=pulled.cotangents
        )

    def _pulled_back(self, shared: Any, run: PartialUnroll) -> PartialUnroll:
        assert run.position is not None
        segment = run.position.target
        run = self._with_inner_gradients(shared, run, segment)
        pulled, self.latest = self._pull_back(
            *(*shared, run.stream, run.gradients, run.cotangents, self._first(segment)),
            steps=self.segments.steps_of(segment),
        )
        return dataclasses.replace(run, gradients=(), cotangents=pulled.cotangents)

    def _pull_back(self, *args: Any, steps: int) -> Any:
        if self._compiling is not None:
            self._compiling.exception()  # waits; the call has the same program, or the same error
        return self._programs.pull_back(*args, steps=steps)

    def _with_inner_gradients(self, shared: Any, run: PartialUnroll, segment: int) -> PartialUnroll:
        """Read the inner gradients of the segment before which a run stands, or compute them."""
        if not process_bytes(self._gradient_shapes):
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
    def _begun(self) -> PartialUnroll:
        """The shapes of an outer step before its first segment."""
        return self._shapes(Position(self.segments.count - 1, 0, 0)).inner

    @functools.cached_property
    def _gradient_shapes(self) -> Any:
        """The shapes of the inner gradients of a segment; none if `pull_back` reads none."""
        if not self.segments.has_backward_pass or self.segments.count == 1:
            return ()
        return self._shapes(Position(self.segments.count - 1, 0, 0), gradients=True).inner.gradients

    def _first(self, segment: int) -> Any:
        return np.int32(segment * self.segments.length)

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
        if not self.segments.has_backward_pass:
            return Position(self.segments.count, 0, self.segments.count)
        self._states(state)
        return schedule.beginning(self.segments.count, self._most(0))

    def _is_done(self, run: PartialUnroll) -> bool:
        position = run.position
        assert position is not None
        if not self.segments.has_backward_pass:
            return position.live == self.segments.count
        return position.target < 0

    def _with_state(self, inputs: Inputs, run: PartialUnroll) -> PartialUnroll:
        """Read the nearest state before the target, or compute theta_0."""
        assert run.position is not None
        position, kept = run.position, run.kept
        while kept:
            assert self._opened is not None
            try:
                if kept[-1].place == "disk":  # memory is scarce: not beside a program that runs
                    jax.block_until_ready(self.latest)
                stream = self._opened.read(kept[-1])
                break
            except DamagedStateError as error:
                say(f"A kept state is lost ({error}): its segments are run again.")
                self._opened.drop(kept[-1])
                kept = kept[:-1]
                position = position._replace(kept=position.kept[:-1])
        else:
            shared = inputs.shared(reads_of(self.segments, 0))
            begun = self._programs.start(*shared, steps=self.segments.steps)
            stream = begun.stream
            if not jax.tree.leaves(run.inner):  # of the first program
                run = dataclasses.replace(run, inner=begun.inner)
        if not self.segments.has_backward_pass:
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
            run = f"run {key}"
            if self._replay.folder and self._folder:  # runs of the same seed may share it
                place = os.path.abspath(self._folder)
                run += f", saved in {hashlib.blake2b(place.encode()).hexdigest()[:32]}"
            inputs = self._replay, self._begun.stream, self.segments.count, run
            self._opened = KeptStates(*inputs, self._folder, self._gradient_shapes)
        return self._opened

    # What it costs, and where it stands.

    @functools.cached_property
    def planned(self) -> SegmentPlan:
        """What an outer step keeps, and which segments it runs again."""
        state, gradients, kept = self._begun.stream, self._gradient_shapes, Capacity(0, 0, 0)
        if self.segments.has_backward_pass:
            kept = capacity(self._replay, state, self.segments.count, gradients)
        sizes = process_bytes(state), process_bytes(gradients)
        return segment_plan.planned(self.segments, kept, *sizes)

    @property
    def programs_in_all(self) -> int:
        """How many programs an outer step has, as was known before the first."""
        return self.planned.programs

    def costs(
        self, state: TrainState, tasks: Tasks, known: dict[str, Cost] | None = None
    ) -> dict[str, Cost]:
        """Return the cost of one call of each program, by name; see `segment_plan.costs`."""
        begun = dataclasses.replace(self._begun, gradients=self._gradient_shapes)
        return segment_plan.costs(self._programs, self.segments, begun, state, tasks, known)

    def cost(self, state: TrainState, tasks: Tasks, known: dict[str, Cost] | None = None) -> Cost:
        """Return the cost of an outer step; see `segment_plan.total`."""
        costs = self.costs(state, tasks, known)
        sizes = device_bytes(self._begun.stream), device_bytes(self._gradient_shapes)
        return segment_plan.total(costs, self.segments, self.planned, *sizes)

    def progress(self, state: TrainState) -> Progress:
        """Return where the outer step of a state stands."""
        run = state.inner if isinstance(state.inner, PartialUnroll) else None
        if not self.segments.has_backward_pass:
            position = None if run is None else run.position
            return segment_plan.streaming_progress(position, self.segments)
        states = self._states(state).most if run is None or self._opened else 0
        if run is None:
            position = schedule.beginning(self.segments.count, states)
            run = PartialUnroll(position=position)
        return segment_plan.progress(run, self.segments, states)

    def newest_step(self, state: TrainState) -> int | None:
        """Return the inner step that the last program has reached for the first time, or None."""
        run = state.inner
        if not isinstance(run, PartialUnroll) or jax.tree.leaves(run.cotangents):
            return None
        assert run.position is not None and run.position.live is not None
        return min(run.position.live * self.segments.length, self.segments.steps)

    # Checkpoints.

    def arrays(self, state: TrainState) -> TrainState:
        """Return a copy of a state for a checkpoint; see `segment_checkpoints.arrays`."""
        return segment_checkpoints.arrays(state)

    def saved(self, state: TrainState) -> dict[str, Any]:
        """Write the kept states of a state to disk; return a record (JSON) for `restored_shapes`.

        DiskError if the disk refuses.
        """
        kept = self._states(state).written(state.inner.kept) if state.inner.kept else []
        return segment_checkpoints.record(state.inner, self.segments, kept)

    def checkpointed(self, record: dict[str, Any] | None) -> None:
        """Delete files that are not needed any more, after a checkpoint with a record was saved."""
        if self._opened is not None:
            self._opened.checkpointed(record["kept"] if record else [])

    def restored_shapes(self, record: dict[str, Any]) -> TrainState:
        """Return the shapes of the train state of a checkpoint."""
        return segment_checkpoints.shapes(record, self.segments, self._shapes)

    def restored(self, state: TrainState, record: dict[str, Any] | None) -> TrainState:
        """Return the train state of a checkpoint with its kept states."""
        if isinstance(state.inner, PartialUnroll):
            state = segment_checkpoints.with_empty(state, self._shapes)
        if not self.segments.has_backward_pass:
            return state
        kept = self._states(state).restored(record["kept"] if record else [])
        if record is None or not isinstance(state.inner, PartialUnroll):
            return state
        if lost := len(record["kept"]) - len(kept):
            say(f"{lost} of the kept states are lost: their segments are run again.")
        return segment_checkpoints.with_kept(state, kept)


def _is_deleted(leaf: Any) -> bool:
    """Return whether a program has used the buffers of an array for its own results."""
    return not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
