"""Reading the tasks of the next programs in a thread."""

import threading

import jax
import jax.numpy as jnp
import pytest

from metalearn.training.prefetch import DEPTH, Prefetch, prefetching


def test_steps_are_fetched_once_each_in_order_and_a_bounded_number_ahead():
    calls, enough = [], threading.Semaphore(0)

    def fetch(step):
        calls.append(step)
        enough.release()
        return step

    with prefetching(fetch, last=5) as at:
        assert at(1) == 1
        for _ in range(1 + DEPTH):
            enough.acquire(timeout=10)
        assert calls == [1, 2, 3]
        assert [at(step) for step in range(2, 6)] == [2, 3, 4, 5]
    assert calls == [1, 2, 3, 4, 5]


def test_a_run_that_jumps_back_gets_the_steps_from_there():
    prefetch = Prefetch(lambda step: step, last=9)
    assert [prefetch.at(step) for step in (4, 5, 2, 3, 4, 9)] == [4, 5, 2, 3, 4, 9]
    prefetch.close()


def test_an_error_is_raised_at_its_step_and_the_thread_ends():
    def fetch(step):
        if step == 3:
            raise OSError("unreadable")
        return step

    with pytest.raises(OSError, match="unreadable"), prefetching(fetch, 9) as at:
        assert (at(1), at(2)) == (1, 2)
        at(3)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("wide", [False, True])
def test_the_thread_computes_in_the_precision_of_the_run(wide):
    with jax.enable_x64(wide):
        prefetch = Prefetch(lambda step: jnp.asarray(1.0, float).dtype, last=1)
        assert prefetch.at(1) == jnp.asarray(1.0, float).dtype
        prefetch.close()
