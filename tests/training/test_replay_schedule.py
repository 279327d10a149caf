"""The binomial schedule: as few replayed segments as there can be, counted by running it."""

import functools
import math

import pytest

from metalearn.training import replay_schedule as schedule
from metalearn.training.replay_schedule import advances, beginning, remaining, replays


@functools.cache
def fewest(segments, states):
    """The fewest advances of any schedule, by dynamic programming over where a state is kept."""
    if segments == 1:
        return 0
    if states == 0:
        return segments * (segments - 1) // 2
    return min(
        first + fewest(segments - first, states - 1) + fewest(first, states)
        for first in range(1, segments)
    )


def run(segments, states, fewer=None):
    """Run the schedule: (segments advanced, segments pulled back through, the most kept states).

    `fewer`: after how many programs only the states kept by then can be kept, as of a full disk.
    """
    position, counts, most, done = beginning(segments, states), {"advance": 0, "back": []}, 0, 0
    total = remaining(position, states)
    while position.target >= 0:
        if done == fewer:
            states = len(position.kept)
        if position.live is None:
            position = schedule.restored(position, states)
            continue
        done += 1
        if position.live == position.target:
            counts["back"].append(position.target)
            position = schedule.pulled_back(position)
        else:
            counts["advance"] += 1
            position = schedule.advanced(position)
            if schedule.keeps(position):
                room = len(position.kept) < states
                step = schedule.with_kept if room else schedule.without_kept
                position = step(position, states)
        most = max(most, len(position.kept))
        if fewer is None:
            assert remaining(position, states) == total - done
    return counts["advance"], counts["back"], most


@pytest.mark.parametrize("states", range(6))
def test_no_schedule_advances_fewer_segments(states):
    for segments in range(1, 30):
        assert advances(segments, states) == fewest(segments, states)


@pytest.mark.parametrize("states", [1, 2, 3, 7, 40])
def test_a_run_advances_as_many_segments_as_the_formula_says(states):
    for segments in (1, 2, 3, 10, 37, 41):
        advanced, back, most = run(segments, states)
        assert advanced == advances(segments, states)
        assert back == list(range(segments))[::-1]
        assert most <= states


@pytest.mark.parametrize("gradients", [0, 1, 2, 5, 11, 40])
@pytest.mark.parametrize("states", [1, 2, 5, 10])
def test_no_more_inner_gradients_are_kept_than_there_is_room_for(states, gradients):
    position, kept, again = beginning(12, states), set(), 0
    while position.target >= 0:
        if position.live is None:
            position = schedule.restored(position, states)
        if position.live == position.target:
            again += position.target not in kept | {11}
            kept.discard(position.target)
            position = schedule.pulled_back(position)
            continue
        if schedule.keeps_gradients(position, gradients, kept):
            kept.add(position.live)
        assert len(kept) <= gradients
        position = schedule.advanced(position)
        if schedule.keeps(position):
            position = schedule.with_kept(position, states)
    assert again == schedule.recomputed(12, states, gradients)
    assert again == max(11 - gradients, 0) or states < 10


def test_nothing_is_replayed_where_every_state_is_kept():
    assert [replays(n, n - 2) for n in (2, 3, 10, 1000)] == [0] * 4
    assert [replays(n, n - 3) for n in (3, 4, 10, 1000)] == [1] * 4


def test_with_one_state_kept_the_replays_grow_as_the_power_of_three_halves():
    assert replays(100, 1) == 746 and advances(100, 0) == 4950


def test_two_sweeps_reach_as_many_segments_as_the_square_of_the_states():
    segments = math.comb(65 + 2, 2)  # with 64 kept states and theta_0
    assert segments == 2211 and replays(segments, 64) < segments < replays(segments + 100, 64)


@pytest.mark.parametrize("fewer", range(1, 30, 3))
def test_a_run_that_can_keep_fewer_states_from_some_moment_on_goes_on(fewer):
    advanced, back, _ = run(12, 4, fewer)
    assert back == list(range(12))[::-1]
    assert advances(12, 4) <= advanced <= 66  # those of no kept state


def test_a_run_that_is_resumed_with_more_room_uses_it():
    position = beginning(20, 1)
    while position.target == 19:
        if position.live == position.target:
            position = schedule.pulled_back(position)
        else:
            position = schedule.advanced(position)
            if schedule.keeps(position):
                position = schedule.with_kept(position, 1)
    assert remaining(position, 19) < remaining(position, 1)
