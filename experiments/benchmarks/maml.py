"""MAML on Omniglot's shapes: this framework against plain JAX and against PyTorch.

    python -m metalearn.experiments.benchmarks.maml [--torch-python=.venv-torch/bin/python]

One outer step: 16 tasks, 5-way 1-shot, 25 query images of 28 x 28, four convolutions of 64
filters with stride 2 and batch statistics, one inner step of SGD, exact second order, outer
Adam. The images are noise, drawn from the device-resident index as in training.

- `metalearn`     `Trainer.step`, reverse and mixed flow, as a user calls it: on a CPU these tasks
  are unrolled one at a time
- `metalearn, kernels not transposed`     the same with `jnp.matmul` for `times_kernel` of
  `metalearn.models.convolution`: what the transposition buys
- `metalearn, a device per core`     the same with a `Layout` over as many devices as the CPU has
  cores, in a process of its own (`docs/devices.md` says how, and what to mind)
- `metalearn, all tasks at once`     the same with `chunk=16`
- `hand-written`  the same model and tasks in plain JAX, jitted: what the framework costs
- `naive`         plain JAX as one writes it first: `vmap` over tasks, `lax.conv`
- `pytorch ...`   `pytorch_maml.py` in an environment of its own, which is set up by
                  python -m venv .venv-torch &&
                  .venv-torch/bin/pip install -r experiments/benchmarks/pytorch.lock

The contenders take turns, round by round and not always in the same order, so that a busy
moment hits them all; each row is the median over rounds, and each ratio is the median of the
ratios within rounds. Run it on an idle machine: other work hits PyTorch's threads much harder
than XLA's. About 3 minutes.

    python -m metalearn.experiments.benchmarks.maml --at-once

An outer step of 16 tasks one at a time and all at once, for networks of growing width, by mixed
flow: what decides how `Trainer` unrolls them on a CPU. "factor" is the largest factor or result of
a matrix product of one task, times 16. About 2 minutes.

    python -m metalearn.experiments.benchmarks.maml --cores [--queries=5]

The first row again: on all cores, on one alone, and in a process per core at the same time, each
with outer steps of its own. The last is what the cores give if nothing is divided among them: what
several seeds gain side by side, and a bound on what a better division of one program can gain.
Two minutes, on Linux only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn import Algorithm, Layout, MixedFlow, Reverse, Trainer, make_mesh
from metalearn.algorithms import MAML, squared_error
from metalearn.cost.jaxpr import largest_factor
from metalearn.datasets import FewShot, Sinusoid
from metalearn.experiments.benchmarks.sampler import random_index
from metalearn.models import Linen, convolution, train_flag
from metalearn.models.linen_networks import MLP, ConvNet

TASKS, QUERIES = 16, 25
IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
BASE = "metalearn, reverse"
PINNED_STEPS = 50  # a round: long against the moment by which two processes start apart
DEVICES = math.gcd(TASKS, os.cpu_count() or 1)
Contender = Callable[[int], float]  # outer steps -> tasks per second


def metalearn(
    tasks: FewShot, engine: Any, chunk: int | None = None, layout: Layout | None = None
) -> Contender:
    """`Trainer.step`, as a user calls it."""
    model = Linen(ConvNet(5), IMAGE, train_flag)
    trainer = Trainer(MAML(model), engine, optax.adam(1e-3), TASKS, chunk, layout=layout)
    state, tasks = trainer.init(jax.random.key(0)), trainer.place(tasks)
    jitted: Any = trainer.step
    step = jitted.lower(state, tasks).compile()  # now: not after what is patched has been put back
    return timed(lambda state: step(state, tasks)[0], state)


def hand_written(tasks: FewShot, convolution: str, one_by_one: bool) -> Contender:
    """MAML in plain JAX: nothing of the framework but the network and the sampler."""
    net, optimizer = ConvNet(5, convolution=convolution), optax.adam(1e-3)

    def loss(params: Any, statistics: Any, data: Any) -> jax.Array:
        variables = {"params": params, **statistics}
        logits, _ = net.apply(variables, data[0], True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    def task_loss(params: Any, tasks: FewShot, statistics: Any, key: jax.Array) -> jax.Array:
        support, query = tasks.sample(key)
        grads = jax.grad(loss)(params, statistics, support)
        adapted = jax.tree.map(lambda p, g: p - 0.4 * g, params, grads)
        return loss(adapted, statistics, query)

    @jax.jit
    def step(state: Any, tasks: FewShot) -> Any:
        count, params, moments, statistics, key = state
        keys = jax.random.split(jax.random.fold_in(key, count), TASKS)
        gradient = functools.partial(jax.grad(task_loss), params, tasks, statistics)
        if one_by_one:
            zeros = jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(
                lambda total, key: (jax.tree.map(jnp.add, total, gradient(key)), None), zeros, keys
            )
            grads = jax.tree.map(lambda g: g / TASKS, total)
        else:
            grads = jax.tree.map(lambda g: g.mean(0), jax.vmap(gradient)(keys))
        updates, moments = optimizer.update(grads, moments, params)
        return count + 1, optax.apply_updates(params, updates), moments, statistics, key

    statistics = dict(net.init(jax.random.key(0), jnp.zeros(IMAGE.shape), True))
    params = statistics.pop("params")
    start = (
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        statistics,
        jax.random.key(1),
    )
    return timed(lambda state: step(state, tasks), start)


def timed(step: Callable[[Any], Any], start: Any) -> Contender:
    """Return a function that times outer steps, after one that compiles or warms caches."""

    def run(steps: int) -> float:
        state = jax.block_until_ready(step(start))
        began = time.perf_counter()
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)
        return steps * TASKS / (time.perf_counter() - began)

    return run


def pytorch(python: str, variant: str, threads: int) -> Contender:
    """The script of the other environment; its own warm-up is not timed."""
    script = pathlib.Path(__file__).with_name("pytorch_maml.py")

    def run(steps: int) -> float:
        options = [f"--variant={variant}", f"--threads={threads}", f"--steps={steps}"]
        options += [f"--tasks={TASKS}", f"--queries={QUERIES}"]
        done = subprocess.run(
            [python, script, *options], check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout.splitlines()[-1])["tasks_per_second"]

    return run


def a_device_per_core(steps: int) -> float:
    """Time outer steps in a process with so many CPU devices; its compilation is not timed."""
    # Twice as many threads as devices: one that waits for the others at an all-reduce blocks its.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES), "NPROC": str(2 * DEVICES)}
    command = [sys.executable, "-m", __spec__.name, f"--spread={steps}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


class Pinned:
    """A process on some cores that times outer steps whenever it is asked to."""

    def __init__(self, cores: Sequence[int], queries: int):
        """Start it; it compiles while others do."""
        numbers = ",".join(map(str, cores))
        options = f"--pinned={numbers}", f"--queries={queries}"
        command = [sys.executable, "-m", __spec__.name, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def ask(self, steps: int) -> None:
        """Begin to time so many outer steps."""
        print(steps, file=self.process.stdin)

    def answer(self) -> float:
        """Return tasks per second."""
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    @staticmethod
    def serve(cores: Iterable[int], queries: int) -> None:
        """Be such a process."""
        os.sched_setaffinity(0, cores)  # before XLA counts them
        run = metalearn(random_tasks(queries), Reverse())
        for steps in sys.stdin:
            print(run(int(steps)), flush=True)


def print_cores(steps: int, rounds: int, queries: int) -> None:
    """Measure one process on all cores, on one, and a process on each; print a Markdown table."""
    cores = sorted(os.sched_getaffinity(0))
    settings = {
        "a process on all cores": [Pinned(cores, queries)],
        "a process on one core": [Pinned(cores[-1:], queries)],
        "a process per core, together": [Pinned([core], queries) for core in cores],
    }
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(rounds + 1):
        for name, processes in settings.items():
            for process in processes:
                process.ask(steps)
            together = sum(process.answer() for process in processes)
            if turn:  # the first one waits for all that compile
                rates[name].append(together)
    for process in itertools.chain(*settings.values()):
        process.process.communicate()
    kind = jax.devices()[0].device_kind
    print(f"{queries} queries, {len(cores)} cores, {kind}, jax {jax.__version__}\n")
    print("| | tasks/s | against the first |\n|---|---|---|")
    first = next(iter(rates.values()))
    for name, measured in rates.items():
        ratio = statistics.median(ours / base for ours, base in zip(measured, first, strict=True))
        print(f"| {name} | {statistics.median(measured):.1f} | {ratio:.2f}x |")


def random_tasks(queries: int = QUERIES) -> FewShot:
    """Return 5-way 1-shot tasks of noise, with so many queries of all five classes."""
    return FewShot.create(random_index(), ways=5, shots=1, queries=queries // 5)


def contenders(torch_python: str | None) -> Iterator[tuple[str, Contender]]:
    """Yield (name, contender), compiled and warm."""
    tasks = random_tasks()
    yield BASE, metalearn(tasks, Reverse())
    with unittest.mock.patch.object(convolution, "times_kernel", jnp.matmul):
        plain = metalearn(tasks, Reverse())
    yield "metalearn, kernels not transposed", plain
    if jax.default_backend() == "cpu" and DEVICES > 1:
        yield "metalearn, a device per core", a_device_per_core
    yield "hand-written", hand_written(tasks, "auto", one_by_one=True)
    yield "metalearn, mixed flow", metalearn(tasks, MixedFlow())
    yield "metalearn, all tasks at once", metalearn(tasks, Reverse(), TASKS)
    yield "naive vmap over lax.conv", hand_written(tasks, "lax", one_by_one=False)
    if torch_python is None:
        print("PyTorch is skipped: no --torch-python (see the top of this file).")
        return
    for variant in ("loop", "vmap", "torchopt"):
        for threads in sorted({1, os.cpu_count() or 1}):
            yield f"pytorch {variant}, threads={threads}", pytorch(torch_python, variant, threads)


def networks() -> Iterator[tuple[str, Algorithm, Any]]:
    """Yield (name, algorithm, tasks) of growing eta."""
    number = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    images = random_tasks()
    for width in (40, 128, 256, 512):
        model = Linen(MLP(1, hidden=(width, width)), number)
        sinusoid = MAML(model, squared_error, optax.sgd(0.01))
        yield f"sinusoids, MLP of 2 x {width}", sinusoid, Sinusoid()
    for width in (40, 128, 256, 512):
        model = Linen(MLP(5, hidden=(width, width)), IMAGE)
        yield f"images, MLP of 2 x {width}", MAML(model, optimizer=optax.sgd(0.1)), images
    for filters in (8, 16, 32, 64):
        model = Linen(ConvNet(5, filters=filters), IMAGE, train_flag)
        yield f"images, ConvNet of {filters}", MAML(model, optimizer=optax.sgd(0.4)), images


def outer_step_costs(
    trainers: Mapping[Any, Trainer], tasks: Any, rounds: int = 5
) -> dict[Any, tuple[float, float]]:
    """Return the seconds of an outer step of each trainer, and its temporaries in MiB.

    Args:
      trainers: by any names.
      tasks: of the outer steps.
      rounds: in turn, of one outer step that is not timed and five that are. After another program,
        memory is mapped anew.
    """
    steps = {}
    for name, trainer in trainers.items():
        state = trainer.init(jax.random.key(0))
        jitted: Any = trainer.step
        steps[name] = jitted.lower(state, tasks).compile(), state
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, state) in steps.items():
            state = jax.block_until_ready(step(state, tasks)[0])
            began = time.perf_counter()
            for _ in range(5):
                state = step(state, tasks)[0]
            jax.block_until_ready(state)
            times[name].append((time.perf_counter() - began) / 5)
    memory = {name: step.memory_analysis() for name, (step, _) in steps.items()}
    return {
        name: (statistics.median(times[name]), memory[name].temp_size_in_bytes / 2**20)
        for name in steps
    }


def print_at_once() -> None:
    """Measure tasks one at a time and all at once, and print a Markdown table."""
    print(f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| | factor, MiB | one at a time | all at once | ratio | MiB, one | MiB, all |")
    print("|---" * 7 + "|")
    for name, algorithm, tasks in networks():
        trainers = {
            chunk: Trainer(algorithm, MixedFlow(), optax.adam(1e-3), TASKS, chunk)
            for chunk in (1, TASKS)
        }
        traced = jax.make_jaxpr(trainers[1].step)(trainers[1].init(jax.random.key(0)), tasks)
        (one, little), (every, much) = outer_step_costs(trainers, tasks).values()
        cells = f"{1e3 * one:.2f} ms | {1e3 * every:.2f} ms | {every / one:.2f}x"
        factor = TASKS * largest_factor(traced) / 2**20
        print(f"| {name} | {factor:.1f} | {cells} | {little:.1f} | {much:.1f} |", flush=True)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", default=os.environ.get("METALEARN_TORCH_PYTHON"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="outer steps a round")
    parser.add_argument("--at-once", action="store_true", help="one at a time, and all at once")
    parser.add_argument("--cores", action="store_true", help="one process on them, and one on each")
    parser.add_argument("--queries", type=int, default=QUERIES, help="of a task, with --cores")
    parser.add_argument("--pinned", help=argparse.SUPPRESS)
    parser.add_argument("--spread", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.at_once:
        print_at_once()
        return
    if arguments.cores:
        print_cores(PINNED_STEPS, arguments.rounds, arguments.queries)
        return
    if arguments.pinned:
        Pinned.serve(map(int, arguments.pinned.split(",")), arguments.queries)
        return
    if arguments.spread:
        run = metalearn(random_tasks(), Reverse(), layout=Layout(make_mesh()))
        print(run(arguments.spread))
        return
    rows = dict(contenders(arguments.torch_python))
    load = os.getloadavg()[0]
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(arguments.rounds):
        # Nobody always runs after the same neighbour: a subprocess leaves caches cold.
        for name in random.Random(turn).sample(list(rows), len(rows)):
            rates[name].append(rows[name](arguments.steps))
    print(
        f"{os.cpu_count()} cores, load {load:.1f} before, {jax.devices()[0].device_kind}, ", end=""
    )
    print(f"jax {jax.__version__}, flax {importlib.metadata.version('flax')}\n")
    print("| | tasks/s | metalearn (reverse) against it |\n|---|---|---|")
    for name, measured in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[BASE], measured, strict=True)]
        print(f"| {name} | {statistics.median(measured):.1f} | {statistics.median(ratios):.2f}x |")


if __name__ == "__main__":
    main()
