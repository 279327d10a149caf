"""Stopping on a signal: SIGTERM from a scheduler, or SIGINT from the keyboard.

On the first signal the current outer step is finished, the run is saved and ends. A second
signal has its usual effect. Where several processes share a run, any of them may get the signal
and all must stop after the same step: JAX's pre-emption service synchronises them (SIGTERM only).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[int], str | None]]:
    """Yield a function: outer step -> the name of the signal that asks to stop, or None.

    Signal handlers can be installed from the main thread only.
    """
    if jax.process_count() > 1:  # whose SIGTERM JAX listens for, if nobody else does
        yield _agreed
        return
    with heard_signals() as heard:
        yield lambda step: signal.Signals(heard[0]).name if heard else None


@contextlib.contextmanager
def heard_signals() -> Iterator[list[int]]:
    """Yield a list that a signal which asks to stop is appended to; the next has its usual effect.

    Signal handlers can be installed from the main thread only. No device is looked for.
    """
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        restore()

    before = {number: signal.signal(number, hear) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield heard
    finally:
        restore()


def _agreed(step: int) -> str | None:
    """Return "SIGTERM" where all processes are to stop after this step, else None."""
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
