"""Which states of a segmented inner run are kept, so that the fewest segments are run again.

The backward pass through n segments needs the state at the start of each, the last one first. If
n - 2 states are kept, those between theta_0 and the last segment, no segment is run again. With
fewer kept states, a state in between is computed again from the nearest kept one before it. The
fewest such replays are those of the binomial schedule (Griewank and Walther 2000, "Algorithm 799:
Revolve"): to pull cotangents back through l segments whose first state is there, with c further
states,

    A(l, c)  =  r l - binom(c + 1 + r, c + 2)         r minimal with  l <= binom(c + 1 + r, c + 1)

segments are advanced, l - 1 of them in the first pass. theta_0 is computed from eta wherever it is
needed, and counts as no kept state. n segments and c kept states therefore take
A(n, c) - (n - 1) replays (`replays`).

`Position` says where a run stands, and `next_operation` what it does next. The next operation
depends on the position and on the number of states that can be kept, not on how the run got there:
a run whose disk is full, or that is resumed with another budget, goes on with another schedule.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Position(NamedTuple):
    """Where an inner run of n segments stands, between two programs.

    Boundary i lies before segment i; boundary 0 is theta_0, and boundary n the last state.

    Args:
      target: the segment through which cotangents are pulled back next; -1: the pass is complete.
      live: the boundary whose state is at hand; None: no state is.
      stop: the boundary to which the live state is advanced; meaningless where there is none.
      kept: the boundaries whose states are kept, ascending; not boundary 0.
    """

    target: int
    live: int | None
    stop: int
    kept: tuple[int, ...] = ()

    @property
    def base(self) -> int:
        """The nearest boundary whose state is kept or can be computed from eta."""
        return self.kept[-1] if self.kept else 0


def beginning(segments: int, states: int) -> Position:
    """Return the position before the first segment of a run.

    Args:
      segments: n, at least 1.
      states: how many can be kept at a time.
    """
    return _going_on(Position(segments - 1, 0, 0), states)


def _going_on(position: Position, states: int) -> Position:
    """Return a position with a live state, and the boundary that it is advanced to."""
    assert position.live is not None
    length, free = position.target + 1 - position.live, states - len(position.kept)
    stop = position.live + (split(length, free) if length > 1 and free > 0 else length - 1)
    return position._replace(stop=stop)


def restored(position: Position, states: int) -> Position:
    """Return the position with the nearest state before the target at hand: kept, or theta_0.

    A state that is needed for nothing but the next segment is kept no longer.
    """
    base = position.base
    kept = position.kept[:-1] if base and base == position.target else position.kept
    return _going_on(position._replace(live=base, kept=kept), states)


def keeps_gradients(position: Position, most: int, kept: Collection[int]) -> bool:
    """Return whether the inner gradients of the segment that the live state is before are kept.

    Those of the last segments before the target are: they are read first.

    Args:
      position: before the live state is advanced.
      most: of how many segments inner gradients can be kept at a time.
      kept: of which segments they are.
    """
    live, target = position.live, position.target
    assert live is not None
    return target - live <= most and len(kept) < most and live not in kept


def keeps(position: Position) -> bool:
    """Return whether the live state is at a boundary where it is kept."""
    return position.live == position.stop and position.stop < position.target


def with_kept(position: Position, states: int) -> Position:
    """Return the position after the live state was kept."""
    assert position.live is not None
    kept = (*position.kept, position.live)
    return _going_on(position._replace(kept=kept), states)


def without_kept(position: Position, states: int) -> Position:
    """Return the position after the live state could not be kept, with `states` at most."""
    return _going_on(position, states)


def advanced(position: Position) -> Position:
    """Return the position after the live state was advanced by a segment."""
    assert position.live is not None
    return position._replace(live=position.live + 1)


def pulled_back(position: Position) -> Position:
    """Return the position after cotangents were pulled back through the target."""
    return Position(position.target - 1, None, 0, position.kept)


def remaining(position: Position, states: int) -> int:
    """Return how many programs follow: a segment advanced, or pulled back through, is one."""
    if position.target < 0:
        return 0
    programs, end, free = position.target + 1, position.target + 1, states - len(position.kept)
    if position.live is not None:
        programs += position.stop - position.live
        if position.stop < position.target:
            programs += advances(end - position.stop, free - 1)
            end = position.stop
        else:
            end = position.target
    for number, start in enumerate((0, *position.kept)[::-1]):
        if end > start:
            programs += advances(end - start, free + number)
        end = start
    return programs


def operations(segments: int, states: int) -> Iterator[tuple[str, int]]:
    """Yield ("advance" or "pull_back", number of the segment) for each program, in their order."""
    position = beginning(segments, states)
    while position.target >= 0:
        if position.live is None:
            position = restored(position, states)
        if (live := position.live) == position.target or live is None:
            yield "pull_back", position.target
            position = pulled_back(position)
            continue
        yield "advance", live
        position = advanced(position)
        if keeps(position):
            position = with_kept(position, states)


def recomputed(segments: int, states: int, gradients: int) -> int:
    """Return of how many segments inner gradients are computed again for the backward pass.

    Args:
      segments: n.
      states: how many can be kept at a time.
      gradients: of how many segments inner gradients can be kept at a time.
    """
    kept: set[int] = set()
    target, again = segments - 1, 0
    for kind, segment in operations(segments, states):
        if kind == "pull_back":
            again += target < segments - 1 and segment not in kept
            kept.discard(segment)
            target -= 1
        elif keeps_gradients(Position(target, segment, 0), gradients, kept):
            kept.add(segment)
    return again


def advances(segments: int, states: int) -> int:
    """Return A(l, c): how often a segment is advanced, to pull cotangents back through l of them.

    Args:
      segments: l, at least 1; their first state is there.
      states: c, how many further ones can be kept at a time.
    """
    if states < 1:
        return segments * (segments - 1) // 2
    repeats, snapshots = _repeats(segments, states), states + 1
    return repeats * segments - math.comb(snapshots + repeats, snapshots + 1)


def replays(segments: int, states: int) -> int:
    """Return how many segments of n are run again with c kept states: the fewest there can be."""
    return advances(segments, states) - (segments - 1)


def split(segments: int, states: int) -> int:
    """Return after how many of l segments a state is kept, with c >= 1 free places; l >= 2."""
    if states >= segments - 1:
        return 1
    repeats, snapshots = _repeats(segments, states), states + 1
    first = math.comb(snapshots + repeats - 2, snapshots)
    second = segments - math.comb(snapshots + repeats - 1, snapshots - 1)
    return max(first, second, 1)


def _repeats(segments: int, states: int) -> int:
    """Return r: how often a segment is advanced at most."""
    repeats, snapshots = 0, states + 1
    while math.comb(snapshots + repeats, snapshots) < segments:
        repeats += 1
    return repeats
