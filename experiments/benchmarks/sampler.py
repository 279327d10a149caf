"""Tasks per second of the few-shot sampler, jitted and vmapped.

    python -m metalearn.experiments.benchmarks.sampler

5-way 1-shot 15-query tasks of 28 x 28, 32 at a time, from an array of the size of
Omniglot's training split with rotations (4,112 classes x 20). The content is random:
it does not matter to the time. `episodes` are float32 pixels and labels; `indices`
stop short of gathering them. Wall time is what a run sees; tasks per second of CPU time
tell as much on a machine that is busy with other things. Takes about 10 s.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metalearn.datasets import ClassIndex, FewShot

CLASSES, DRAWINGS, SIZE = 4112, 20, 28
TASKS, CALLS, REPETITIONS = 32, 50, 7


def random_index() -> ClassIndex:
    """Noise in the shape of Omniglot's training split: [4112, 20, 28, 28, 1] uint8."""
    shape = (CLASSES, DRAWINGS, SIZE, SIZE, 1)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return ClassIndex(noise, np.full(CLASSES, DRAWINGS, np.int32))


def rates(tasks: FewShot, draw: Callable[[FewShot, jax.Array], Any]) -> list[tuple[float, float]]:
    """Tasks per second of wall time and of CPU time, for each repetition of `CALLS` batches."""

    @jax.jit
    def batch(tasks: FewShot, step: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), TASKS)
        return jax.vmap(functools.partial(draw, tasks))(keys)

    def run() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(CALLS):
            out = batch(tasks, step)
        jax.block_until_ready(out)
        done = CALLS * TASKS
        return done / (time.perf_counter() - wall), done / (time.process_time() - cpu)

    jax.block_until_ready(batch(tasks, 0))  # compiles
    return [run() for _ in range(REPETITIONS)]


def main() -> None:
    """Measure and print: medians over the repetitions, and the range of the wall times."""
    tasks = FewShot.create(random_index(), ways=5, shots=1, queries=15)
    device = jax.devices()[0].device_kind
    print(f"{os.cpu_count()} cores, {device}, jax {jax.__version__}, {TASKS} tasks a call")
    for name, draw in {"episodes": FewShot.sample, "indices": FewShot.indices}.items():
        wall, cpu = zip(*rates(tasks, draw), strict=True)
        print(
            f"{name:8} {statistics.median(wall):9,.0f} tasks/s ({min(wall):,.0f} to "
            f"{max(wall):,.0f}), {statistics.median(cpu):,.0f} per CPU second"
        )


if __name__ == "__main__":
    main()
