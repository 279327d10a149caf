"""The progress bars: what they say while a program is compiled, and their rates."""

import io
import time

import pytest
import tqdm.std

from metalearn.training import progress
from metalearn.training.progress import bars
from metalearn.training.segment_plan import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock of the bars that the test moves: `clock(5)` is five seconds later."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def later(seconds):
        now[0] += seconds

    return later


def stands(work):
    """Return what says of a state that so many of 40 segments have been advanced."""
    return lambda state: Progress("forward", work, 40, work, 40, work, 40)


def rate(bar):
    """Return the steps a second that a bar shows; None: none yet."""
    shown = bar.format_dict
    if shown["rate"] is not None:
        return shown["rate"]
    return (shown["n"] - shown["initial"]) / shown["elapsed"] if shown["elapsed"] else None


def test_the_rate_of_a_bar_leaves_out_the_compiled_step(clock, capfd):
    with bars(100, 0, 16) as both:
        outer = both._outer
        clock(600.0)
        both.step_done(1.0)
        assert outer.n == 1 and not rate(outer)
        for _ in range(20):
            clock(0.5)
            both.step_done(1.0)
        assert outer.n == 21
        assert rate(outer) == pytest.approx(2.0, rel=0.05)
    assert "compiling the first step" in capfd.readouterr().err


def test_the_rate_of_a_resumed_run_leaves_out_the_compiled_step(clock):
    with bars(100, 50, 16, shown=True) as both:
        clock(600.0)
        both.step_done(1.0)
        clock(4.0)
        both.step_done(1.0)
        clock(4.0)
        both.step_done(1.0)
        assert both._outer.n == 53
        assert rate(both._outer) == pytest.approx(0.25, rel=0.05)


def test_the_rate_of_inner_steps_leaves_out_the_compiled_segment(clock):
    with bars(3, 0, 2, segmented=True) as both:
        both.stands_at(stands(0), None)
        clock(600.0)
        both.stands_at(stands(8), None)
        for done in (16, 24, 32):
            clock(6.0)
            both.stands_at(stands(done), None)
        assert both._inner.n == 32
        assert rate(both._inner) == pytest.approx(8 / 6, rel=0.05)


def test_bars_that_are_not_shown_take_steps_too(capfd):
    with bars(3, 1, 2, segmented=True, shown=False) as both:
        both.stands_at(stands(8), None)
        both.step_done(1.0)
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_how_long_it_compiles(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", screen)
    with bars(3, 0, 2):
        end = time.monotonic() + 30
        while "[00:01<" not in screen.getvalue() and time.monotonic() < end:
            time.sleep(0.1)
    assert "[00:01<" in screen.getvalue()
