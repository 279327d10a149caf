"""Patches and matmul against `lax.conv_general_dilated`: the best threshold of "auto".

    python -m metalearn.experiments.benchmarks.convolution

A 3x3 convolution of 64 to 64 channels, stride 1 and 2, over images of growing side, and
its gradients for kernel and images: on one batch with one kernel, and under `vmap` with a
kernel per task, as in MAML. Prints `lax` time over `patches` time: above 1, patches win. The
time of both is the minimum over interleaved repetitions. About 2 minutes on two cores.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.models.convolution import MOST_PATCHES, convolve

TASKS, IMAGES, CHANNELS = 4, 5, 64
SIDES = (14, 28, 56, 84, 112, 168)
REPETITIONS = 3


def gradients(method: str, stride: int, kernel: jax.Array, images: jax.Array) -> Any:
    """Return the gradients of a sum of squares, for the kernel and the images."""

    def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
        return jnp.square(convolve(images, kernel, (stride, stride), "SAME", method)).sum()

    return jax.grad(loss, (0, 1))(kernel, images)


def speedup(side: int, stride: int, per_task: bool) -> float:
    """Return the time of `lax` over the time of patches."""
    lead = (TASKS,) if per_task else ()
    count = IMAGES if per_task else TASKS * IMAGES
    kernel = jnp.ones((*lead, 3, 3, CHANNELS, CHANNELS))
    images = jnp.ones((*lead, count, side, side, CHANNELS))
    best = {}
    for method in ("lax", "patches"):
        run = functools.partial(gradients, method, stride)
        compiled = jax.jit(jax.vmap(run) if per_task else run)
        jax.block_until_ready(compiled(kernel, images))
        best[method] = min(_seconds(compiled, kernel, images) for _ in range(REPETITIONS))
    return best["lax"] / best["patches"]


def _seconds(run: Any, *inputs: jax.Array) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a Markdown table."""
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, jax {jax.__version__}; time of lax / of patches\n")
    print("| side | stride | one kernel | a kernel per task | auto takes |\n|---|---|---|---|---|")
    for stride in (1, 2):
        for side in SIDES:
            one, many = speedup(side, stride, False), speedup(side, stride, True)
            pixels = (-(-side // stride)) ** 2
            auto = "patches" if pixels <= MOST_PATCHES else "lax"
            print(f"| {side} | {stride} | {one:.2f}x | {many:.2f}x | {auto} |", flush=True)


if __name__ == "__main__":
    main()
