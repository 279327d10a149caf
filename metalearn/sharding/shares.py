"""How the tasks of an outer step divide among devices, and each device's share into chunks."""

from __future__ import annotations

import math

from metalearn._utils.checks import is_integer
from metalearn.sharding.mesh import counted
from metalearn.sizes import MOST_TASKS

SHOWN = 16  # of the numbers that fit


def check_tasks(tasks_per_step: int, chunk: int | None) -> None:
    """Raise ValueError for what is no number of tasks, or of those that are unrolled at once."""
    for name, value in (("tasks_per_step", tasks_per_step), ("chunk", chunk)):
        if not is_integer(value) and not (name == "chunk" and value is None):
            raise ValueError(f"{name}={value!s:.80}: it is a number of tasks, an integer.")
    if tasks_per_step < 1:
        raise ValueError(f"An outer step takes at least one task, not {tasks_per_step}.")
    if tasks_per_step > MOST_TASKS:
        raise ValueError(
            f"An outer step takes {MOST_TASKS:,} tasks at most, not {tasks_per_step:,}: take "
            "fewer, and more outer steps."
        )
    if chunk is not None and (chunk < 1 or tasks_per_step % chunk):
        raise ValueError(
            f"tasks_per_step={tasks_per_step} does not divide into chunks of {chunk}. Chunks "
            f"that fit: {divisors(tasks_per_step)}."
        )


def divisors(number: int) -> str:
    """Return the numbers that divide one, as a text; where they are many, those at the ends.

    >>> divisors(12), divisors(10**6)[:32]
    ('1, 2, 3, 4, 6, 12', '1, 2, 4, 5, 8, 10, 16, 20, ..., ')
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    found = [*low, *(number // n for n in reversed(low) if n * n != number)]
    if len(found) <= SHOWN:
        return ", ".join(map(str, found))
    half = SHOWN // 2
    return f"{', '.join(map(str, found[:half]))}, ..., {', '.join(map(str, found[-half:]))}"


def check_shares(tasks_per_step: int, devices: int, chunk: int | None) -> None:
    """Raise ValueError where tasks do not divide among devices, or a share into chunks."""
    share, surplus = divmod(tasks_per_step, devices)
    if surplus:
        near = [str(size) for size in (share * devices, (share + 1) * devices) if size]
        fitting = f"sizes that do are {' and '.join(near)}" if share else f"size is {near[0]}"
        raise ValueError(
            f"tasks_per_step={tasks_per_step} does not divide by the {counted(devices)} that take "
            f"tasks. The nearest {fitting}."
        )
    if not _in_chunks(share, chunk):
        raise ValueError(
            f"tasks_per_step={tasks_per_step} on {counted(devices)} is {share} tasks on each, "
            f"which do not divide into chunks of {chunk}. Chunks that fit: {divisors(share)}."
        )


def most_devices(tasks_per_step: int, chunk: int | None, there: int, processes: int = 1) -> int:
    """Return the most devices that tasks divide among, as many of each process; 0: none.

    >>> most_devices(16, None, 8), most_devices(10, None, 8), most_devices(9, None, 8, processes=2)
    (8, 5, 0)
    >>> most_devices(24, 4, 4)  # 6 tasks on each of 4 devices are no whole chunks of 4
    3
    """
    fitting = [
        count
        for count in range(processes, there + 1, processes)
        if tasks_per_step % count == 0 and _in_chunks(tasks_per_step // count, chunk)
    ]
    return max(fitting, default=0)


def at_once(share: int, chunk: int | None) -> int:
    """Return how many tasks of a device's share are unrolled at once."""
    return share if chunk is None else min(share, chunk)


def _in_chunks(share: int, chunk: int | None) -> bool:
    return share % at_once(share, chunk) == 0
