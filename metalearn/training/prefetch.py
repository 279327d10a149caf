"""Tasks on the host, fetched ahead in a thread while the device computes.

The keys of all outer steps are known before the run, so what the next programs read is fetched
while the device is busy with the current one. Programs have numbers, in the order in which they
run: of outer steps, or of the segments of outer steps, whichever direction those go in. What a
program reads depends on its number alone: nothing of the thread is saved in a checkpoint, and a
resumed run reads the same.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

import jax

from metalearn.tasks import Tasks

DEPTH = 2  # programs whose tasks are read ahead


class Prefetch:
    """Fetches the tasks of programs in a thread, up to `DEPTH` programs ahead.

    Args:
      fetch: number of a program -> its tasks. Called in the thread, one at a time.
      last: the last number of the run.
    """

    def __init__(self, fetch: Callable[[int], Tasks], last: int):
        self._fetch, self._last = fetch, last
        self._x64 = bool(jax.config.read("jax_enable_x64"))  # a context holds in one thread alone
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._futures: dict[int, concurrent.futures.Future[Tasks]] = {}

    def at(self, number: int) -> Tasks:
        """Return the tasks of a program, and begin to fetch those of the next.

        Raises:
          Exception: whatever fetching the tasks of this program raised.
        """
        if number not in self._futures:  # the first, or after a jump back
            self._cancel()
        for ahead in range(number, min(number + DEPTH, self._last) + 1):
            if ahead not in self._futures:
                self._futures[ahead] = self._pool.submit(self._fetch_in_thread, ahead)
        return self._futures.pop(number).result()

    def close(self) -> None:
        """Stop the thread, after the fetch that it is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def _fetch_in_thread(self, number: int) -> Tasks:
        with jax.enable_x64(self._x64):
            return self._fetch(number)


@contextlib.contextmanager
def prefetching(fetch: Callable[[int], Tasks], last: int) -> Iterator[Callable[[int], Tasks]]:
    """Yield a function: number -> its tasks, which are fetched ahead in a thread.

    Args:
      fetch: number of a program -> its tasks, read on the host.
      last: the last number.
    """
    prefetch = Prefetch(fetch, last)
    try:
        yield prefetch.at
    finally:
        prefetch.close()
