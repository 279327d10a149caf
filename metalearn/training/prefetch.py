"""Tasks on the host, fetched ahead in a thread while the device computes.

The keys of all outer steps are known before the run, so the episodes of the next steps are read
while the device is busy with the current one. Which episodes a step sees depends on its number
alone: nothing of the thread is saved in a checkpoint, and a resumed run reads the same ones.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

import jax

from metalearn.tasks import Tasks

DEPTH = 2  # outer steps that are read ahead


class Prefetch:
    """Fetches the tasks of outer steps in a thread, up to `DEPTH` steps ahead.

    Args:
      fetch: outer step, counted from 1 -> its tasks. Called in the thread, one at a time.
      last: the last outer step of the run.
    """

    def __init__(self, fetch: Callable[[int], Tasks], last: int):
        self._fetch, self._last = fetch, last
        self._x64 = bool(jax.config.read("jax_enable_x64"))  # a context holds in one thread alone
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._futures: dict[int, concurrent.futures.Future[Tasks]] = {}

    def at(self, step: int) -> Tasks:
        """Return the tasks of a step, and begin to fetch those of the next.

        Raises:
          Exception: whatever fetching the tasks of this step raised.
        """
        if step not in self._futures:  # the first, or after a jump back
            self._cancel()
        for ahead in range(step, min(step + DEPTH, self._last) + 1):
            if ahead not in self._futures:
                self._futures[ahead] = self._pool.submit(self._fetch_in_thread, ahead)
        return self._futures.pop(step).result()

    def close(self) -> None:
        """Stop the thread, after the fetch that it is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def _fetch_in_thread(self, step: int) -> Tasks:
        with jax.enable_x64(self._x64):
            return self._fetch(step)


@contextlib.contextmanager
def tasks_of_steps(
    tasks: Tasks, fetch: Callable[[int], Tasks] | None, last: int
) -> Iterator[Callable[[int], Tasks]]:
    """Yield a function: outer step, counted from 1 -> its tasks.

    Args:
      tasks: of the run.
      fetch: outer step -> its tasks, read on the host; None: `tasks` are those of all steps.
      last: the last outer step of the run.
    """
    if fetch is None:
        yield lambda step: tasks
        return
    prefetch = Prefetch(fetch, last)
    try:
        yield prefetch.at
    finally:
        prefetch.close()
