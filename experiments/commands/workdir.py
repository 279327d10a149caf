"""A run's own directory: made, written to, and held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Make a workdir and hold it. The system lets go of it however the process ends.

    Raises:
      ValueError: where it cannot be written to, or another run is being trained in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("w")
    except OSError as error:
        raise ValueError(
            f"The run is to live in {workdir}, which cannot be written to ({error.strerror}). "
            "Name another place: --workdir=runs/my_run."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is training in {workdir}. Wait until it has ended, or name "
                "another workdir."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
