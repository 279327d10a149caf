"""Patches and matmul against `lax.conv_general_dilated`, and the gradient for a kernel.

    python -m metalearn.experiments.benchmarks.convolution

A 3x3 convolution of 64 to 64 channels, stride 1 and 2, over images of growing side, and
its gradients for kernel and images: on one batch with one kernel, and under `vmap` with a
kernel per task, as in MAML. Prints `lax` time over `patches` time: above 1, patches win, which sets
the threshold of "auto". The time of both is the minimum over interleaved repetitions. About 2
minutes on two cores.

    python -m metalearn.experiments.benchmarks.convolution --kernel-gradient

The gradient for a kernel of 64 to 64 channels from a matrix of patches, as `jnp.matmul` has it and
as `times_kernel` has it, its transpositions included. The rows are those of MAML on Omniglot: of
the second, third and fourth convolution on 5 support and 25 query images. The time of both is the
first decile over interleaved repetitions. A few seconds; on one core (`taskset -c 0`) other work on
the machine hardly changes it.

    python -m metalearn.experiments.benchmarks.convolution --metric-learner

An outer step of ProtoNet on Omniglot's shapes with "patches" and with "lax": one task of 60
classes, with one support and five query images each, four blocks of 64 filters and max-pooling. No
task adapts a kernel. The time is the median over five interleaved rounds of five outer steps;
temporaries are those of the compiled program. Half a minute.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn import Trainer
from metalearn.algorithms import ProtoNet
from metalearn.datasets import FewShot
from metalearn.experiments.benchmarks.maml import IMAGE, outer_step_costs
from metalearn.experiments.benchmarks.sampler import random_index
from metalearn.models import Linen, train_flag
from metalearn.models.convolution import MOST_PATCHES, convolve, times_kernel
from metalearn.models.linen_networks import ConvNet

TASKS, IMAGES, CHANNELS = 4, 5, 64
SIDES = (14, 28, 56, 84, 112, 168)
REPETITIONS = 3
ROWS = {"conv_1": (245, 1225), "conv_2": (80, 400), "conv_3": (20, 100)}
COLUMNS = 9 * CHANNELS
PRODUCTS = 200  # repetitions of a product


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


def product_times(rows: int, tasks: int) -> dict[str, float]:
    """Return the seconds that the gradient for a kernel takes, [columns, features] or transposed.

    Args:
      rows: of the matrix of patches.
      tasks: of one batched product, each with its own kernel; 1: a product that is not batched.
    """

    def gradient(product: Callable[..., Any], *inputs: jax.Array) -> jax.Array:
        patches, kernel, cotangent = inputs
        return jax.vjp(lambda kernel: product(patches, kernel), kernel)[1](cotangent)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, COLUMNS), (COLUMNS, CHANNELS), (rows, CHANNELS)
    lead = (tasks,) if tasks > 1 else ()
    inputs = [jax.random.normal(k, (*lead, *s)) for k, s in zip(keys, shapes, strict=True)]
    products: dict[str, Callable[..., Any]] = {"plain": jnp.matmul, "transposed": times_kernel}
    runs = {}
    for name, product in products.items():
        each = functools.partial(gradient, product)
        runs[name] = jax.jit(jax.vmap(each) if lead else each)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(PRODUCTS + 1):
        for name, run in runs.items():
            seconds = _seconds(run, *inputs)
            if i:  # the first one compiles
                times[name].append(seconds)
    return {name: statistics.quantiles(values, n=10)[0] for name, values in times.items()}


def metric_learner(rounds: int = 5, **network: Any) -> dict[str, tuple[float, float]]:
    """Return the seconds of an outer step of ProtoNet and its temporaries in MiB, by method.

    Args:
      rounds: as for `outer_step_costs`.
      network: options of `ConvNet`.
    """
    tasks = FewShot.create(random_index(), ways=60, shots=1, queries=5)
    trainers = {}
    for method in ("patches", "lax"):
        model = Linen(ConvNet(None, pool=True, convolution=method, **network), IMAGE, train_flag)
        trainers[method] = Trainer(ProtoNet(model, 60), tasks_per_step=1)
    return outer_step_costs(trainers, tasks, rounds)


def kernel_gradients() -> None:
    """Measure the gradient for a kernel and print a Markdown table."""
    cores = len(os.sched_getaffinity(0))
    print(f"{jax.devices()[0].device_kind}, {cores} cores, jax {jax.__version__}\n")
    print("| of | rows | tasks | [columns, features] | [features, columns] | ratio |")
    print("|---|---|---|---|---|---|")
    for name, sizes in ROWS.items():
        for rows in sizes:
            for tasks in (1, 4):
                plain, ours = (1e6 * s / tasks for s in product_times(rows, tasks).values())
                row = f"{name} | {rows} | {tasks} | {plain:.0f} us | {ours:.0f} us"
                print(f"| {row} | {plain / ours:.2f}x |", flush=True)


def _seconds(run: Any, *inputs: jax.Array) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel-gradient", action="store_true")
    parser.add_argument("--metric-learner", action="store_true")
    arguments = parser.parse_args()
    if arguments.kernel_gradient:
        kernel_gradients()
        return
    if arguments.metric_learner:
        print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}\n")
        print("| convolutions | outer step | temporaries |\n|---|---|---|")
        for method, (seconds, mib) in metric_learner().items():
            print(f"| {method} | {1000 * seconds:.0f} ms | {mib:.0f} MiB |")
        return
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
