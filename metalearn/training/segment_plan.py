"""What an outer step in segments reads and costs, known before it runs, and where one stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from metalearn.cost import Cost, cost
from metalearn.tasks import Reads
from metalearn.train_state import TrainState
from metalearn.training import replay_schedule as schedule
from metalearn.training.replay import Capacity
from metalearn.training.replay_schedule import Position
from metalearn.training.segment_programs import Programs, outer_loss_shapes
from metalearn.training.segmented_unroll import PartialUnroll, Segments

OUTER_LOSS = Reads(0, 0)  # what a program reads that takes the outer loss alone
PULL_BACK = 3  # the time to pull cotangents back through a segment, in times to advance it


class Progress(NamedTuple):
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


def planned(
    segments: Segments, capacity: Capacity, state_bytes: int, gradient_bytes: int
) -> SegmentPlan:
    """Return the plan of an outer step.

    Args:
      segments: of the outer step.
      capacity: of the memory for states and inner gradients; of an engine without a backward pass
        0 everywhere.
      state_bytes: see `SegmentPlan`.
      gradient_bytes: see `SegmentPlan`.
    """
    count, length = segments.count, segments.length
    if not segments.has_backward_pass:
        return SegmentPlan(length, count, state_bytes, 0, 0, 0, 0, programs=count)
    states, gradients = capacity.states, capacity.gradients
    return SegmentPlan(
        *(length, count, state_bytes, capacity.device, capacity.host, capacity.disk),
        schedule.replays(count, states),
        schedule.advances(count, states) + count,
        gradient_bytes,
        *(capacity.device_gradients, capacity.host_gradients),
        schedule.recomputed(count, states, gradients) if gradient_bytes else 0,
    )


def reads(segments: Segments, plan: SegmentPlan) -> list[list[Reads]]:
    """Return what the programs of an outer step read, program by program, as it is planned."""
    if not segments.has_backward_pass:
        each = [[reads_of(segments, segment)] for segment in range(segments.count)]
        return [*each[:-1], [*each[-1], OUTER_LOSS]]
    by_program, kept = [], plan.device + plan.host + plan.disk
    for kind, segment in schedule.operations(segments.count, kept):
        is_last = kind == "pull_back" and segment == segments.count - 1
        again = [OUTER_LOSS] if is_last and segments.last_is_full else []
        by_program.append([reads_of(segments, segment), *again])
    return by_program


def reads_of(segments: Segments, segment: int) -> Reads:
    """Return what the programs of a segment read; `last` also takes the outer loss."""
    is_last = segment == segments.count - 1
    with_outer_loss = is_last and segments.has_backward_pass and not segments.last_is_full
    return Reads(segment * segments.length, segments.steps_of(segment), with_outer_loss)


def costs(
    programs: Programs,
    segments: Segments,
    begun: PartialUnroll,
    state: TrainState,
    tasks: Any,
    known: dict[str, Cost] | None = None,
) -> dict[str, Cost]:
    """Return the cost of one call of each program, by name. Compiles, and allocates nothing.

    Args:
      programs: of the outer step.
      segments: of the outer step.
      begun: the shapes of the unrolls before the first segment, with its inner gradients.
      state: a train state between two outer steps, or its shapes.
      tasks: or their shapes.
      known: costs by program text; see `metalearn.cost.cost`.
    """
    last, first = segments.count - 1, jax.ShapeDtypeStruct((), "int32")
    shared = state.eta, tasks, state.key, state.step
    calls: dict[str, tuple[Any, ...]] = {"start": (*shared, {"steps": segments.steps})}
    alone = {0} if last else set()  # a run of one segment is taken by `last`
    for segment in sorted(alone if segments.has_backward_pass else {0, last}):
        length = {"steps": segments.steps_of(segment), "until": segments.until(segment)}
        name = f"advance {length['steps']}"
        calls[name] = (*shared, begun.stream, begun.inner, first, length)
    ended = PartialUnroll(begun.stream, begun.inner)
    if segments.has_backward_pass:
        outer = outer_loss_shapes(programs, shared, begun)
        steps = {"steps": segments.steps_of(last)}
        if last:
            after = begun.stream, begun.gradients, outer.cotangents
            calls["pull_back"] = (*shared, *after, first, {"steps": segments.length})
        if segments.last_is_full:
            calls["outer_loss"] = (*shared, begun.stream, {})
        else:
            calls["last"] = (*shared, begun.stream, begun.inner, first, steps)
        ended = PartialUnroll((), begun.inner, outer.cotangents, outer.outer_loss)
    calls["update"] = (state, tasks, ended, {})
    return {
        name: cost(getattr(programs, name.split()[0]), *args, known=known, **static)
        for name, (*args, static) in calls.items()
    }


def total(
    costs: dict[str, Cost],
    segments: Segments,
    plan: SegmentPlan,
    state_bytes: int,
    gradient_bytes: int,
) -> Cost:
    """Return the cost of an outer step: the FLOPs of all calls, the memory of the largest.

    What is kept on the device counts as arguments.

    Args:
      costs: of one call of each program.
      segments: of the outer step.
      plan: of the outer step.
      state_bytes: of an inner state of all tasks, on a device.
      gradient_bytes: likewise, of the inner gradients of a segment.
    """
    calls, kept = dict.fromkeys(costs, 1), plan.device
    if not segments.has_backward_pass:
        calls[f"advance {plan.segment}"] = segments.steps // plan.segment
    elif segments.count > 1:
        full = segments.last_is_full  # the last segment is run by the programs of the others
        advanced = plan.programs - plan.segments + plan.recomputed
        calls[f"advance {plan.segment}"] = advanced + full
        calls["pull_back"] = plan.segments - 1 + full
        kept += full  # its first state, while it is advanced
    largest = max(costs.values(), key=lambda each: each.peak)
    on_device = kept * state_bytes + plan.device_gradients * gradient_bytes
    return largest._replace(
        flops=sum(calls[name] * each.flops for name, each in costs.items()),
        arguments=largest.arguments + on_device,
    )


def streaming_progress(position: Position | None, segments: Segments) -> Progress:
    """Return where an outer step without a backward pass stands; None: before its first program."""
    done = 0 if position is None or position.live is None else position.live
    step = min(done * segments.length, segments.steps)
    return Progress("forward", step, segments.steps, done, segments.count, done, segments.count)


def progress(run: PartialUnroll, segments: Segments, states: int) -> Progress:
    """Return where an outer step with a backward pass stands.

    Args:
      run: with a position.
      segments: of the outer step.
      states: how many can be kept at a time.
    """
    position = run.position
    assert position is not None
    left = schedule.remaining(position, max(states, len(position.kept)))
    back = position.target + 1  # segments that are not pulled back through yet
    work = run.programs + (PULL_BACK - 1) * (segments.count - back)
    at = position.live if position.live is not None else back
    ready = position.live == position.target or position.base == position.target
    goes_backward = bool(jax.tree.leaves(run.cotangents))
    phase = ("backward" if ready else "replay") if goes_backward else "forward"
    return Progress(
        phase,
        min(at * segments.length, segments.steps),
        segments.steps,
        run.programs,
        run.programs + left,
        work,
        work + left + (PULL_BACK - 1) * back,
    )
