"""Being asked to stop: by a scheduler that wants the machine (SIGTERM), or a hand (SIGINT).

The signal is noted, the outer step that is under way ends, the run saves and leaves. A second
signal is not held back. Of several processes any one may be asked, and all must stop after
the same step: there JAX's own service for pre-emption agrees on it (SIGTERM alone).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[int], str | None]]:
    """Give a function of the outer step that says by what a stop was asked for, or None.

    For the main thread, as all that handles signals.
    """
    if jax.process_count() > 1:  # whose SIGTERM JAX listens for, if nobody else does
        yield _agreed
        return
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        restore()

    before = {number: signal.signal(number, hear) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked(step: int) -> str | None:
        return signal.Signals(heard[0]).name if heard else None

    try:
        yield asked
    finally:
        restore()


def _agreed(step: int) -> str | None:
    """Say whether all processes are to stop after this step, since one was asked to."""
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
