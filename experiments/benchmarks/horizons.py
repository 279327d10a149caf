"""Memory and time of hypergradients through long training runs, by engine.

    python -m metalearn.experiments.benchmarks.horizons [--T 1000 10000 100000]
    python -m metalearn.experiments.benchmarks.horizons --seconds 7 [--N 3 5 9 17 33]

The training run of `--config=fds_digits`: an MLP 64-64-10 on scikit-learn's digits, batch 64,
SGD. N hyperparameters are learned: N - 2 windows of the learning rate, momentum and weight decay.
In theory, with T inner steps, |theta| parameters and |state| = 2 |theta|, as SGD has a momentum:

    engine                 memory                               time
    plain training         |state|                              1
    Forward()              (1 + N) |state|, flat in T           grows with N
    Reverse("segments")    sqrt(T) (|activations| + 2 |state|)  flat in N
    Reverse("nested")      2 sqrt(T) |state|                    flat in N, and more
    MixedFlow("segments")  sqrt(T) (|theta| + 2 |state|)        flat in N
    MixedFlow("nested")    T |theta| + 2 sqrt(T) |state|        flat in N, and less

Memory is the temporaries of the compiled program and FLOPs are its matrix products, loop trip
counts included: both are deterministic, and nothing is allocated. One argument of all programs
grows with T, the int32 indices of the examples that each step reads. Its size is printed
separately: memory that grows only by a copy of these indices counts as flat.

Seconds only with `--seconds ROUNDS`: at the first T, for each N, every round runs all engines and
plain training; a cell is the median over rounds of the time relative to plain training.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from metalearn import Episode, Forward, MetaGradient, MixedFlow, Reverse, Tasks
from metalearn.algorithms import FDS
from metalearn.cost import Cost, cost
from metalearn.engines.inner_loop import rollout
from metalearn.experiments import build
from metalearn.experiments.configs import fds_digits

PLAIN = "plain training"
ENGINES: dict[str, MetaGradient | None] = {
    PLAIN: None,
    "Forward()": Forward(),
    'Reverse("segments")': Reverse("segments"),
    'Reverse("nested")': Reverse("nested"),
    'MixedFlow("segments")': MixedFlow("segments"),
    'MixedFlow("nested")': MixedFlow("nested"),
}
OTHERS = 2  # hyperparameters of one window: momentum and weight decay
KEY = 0


def problem() -> tuple[FDS, Tasks]:
    """Return the training run of the config, and the splits it is run on."""
    config = build.to_json(fds_digits.get_config())
    config["dataset"]["held_out"] = 0  # no evaluation during training
    splits = build.splits(config["dataset"])
    algorithm = build.algorithm(config["algorithm"], build.model(config["model"], splits))
    assert isinstance(algorithm, FDS)
    return algorithm, splits.train


def with_tangents(algorithm: FDS, count: int) -> FDS:
    """Return the algorithm with `count` hyperparameters, counting windows of the learning rate."""
    rate = dataclasses.replace(algorithm.hyperparameters["learning_rate"], windows=count - OTHERS)
    learned = {**algorithm.hyperparameters, "learning_rate": rate}
    return dataclasses.replace(algorithm, hyperparameters=learned)


def program(algorithm: FDS, engine: MetaGradient | None) -> Any:
    """Return (eta, episode, batches) -> the loss, and the hypergradient if an engine takes it."""

    def run(eta: Any, episode: Episode, batches: Any) -> Any:
        unroll = algorithm.unroll(episode, jax.random.key(KEY))
        if engine is None:
            return rollout(unroll, eta, batches)[0]
        (loss, _), grads = engine.value_and_grad(unroll, eta, batches)
        return loss, grads

    return jax.jit(run)


def arguments(algorithm: FDS, tasks: Tasks) -> tuple[Any, Episode, Any]:
    """Return the arguments of a program; under `jax.eval_shape`, their shapes."""
    key = jax.random.key(KEY)
    episode = tasks.sample(key)
    return algorithm.init(key), episode, algorithm.batches(episode, key)


def costs(algorithm: FDS, tasks: Tasks, engines: Iterable[str] = ENGINES) -> dict[str, Cost]:
    """Return the cost of each program; compiles, and allocates nothing."""
    shapes = jax.eval_shape(lambda tasks: arguments(algorithm, tasks), tasks)
    return {name: cost(program(algorithm, ENGINES[name]), *shapes) for name in engines}


def indices(algorithm: FDS, tasks: Tasks) -> int:
    """Return the bytes of the rows and step numbers that the inner steps read."""
    batches = jax.eval_shape(lambda tasks: arguments(algorithm, tasks)[2], tasks)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batches))


def seconds(algorithm: FDS, tasks: Tasks, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each program in each round, which runs them in random order."""
    operands = jax.jit(lambda tasks: arguments(algorithm, tasks))(tasks)
    ready = {name: program(algorithm, engine) for name, engine in ENGINES.items()}
    for run in ready.values():
        jax.block_until_ready(run(*operands))
    timings: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(ready), len(ready)):
            began = time.perf_counter()
            jax.block_until_ready(ready[name](*operands))
            timings[name].append(time.perf_counter() - began)
    return timings


def table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [[corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory(algorithm: FDS, tasks: Tasks, horizons: Sequence[int]) -> str:
    """Return the tables of temporaries, arguments and FLOPs."""
    runs = [algorithm.stretched(horizon) for horizon in horizons]
    measured = [costs(run, tasks) for run in runs]
    rows = [indices(run, tasks) for run in runs]
    data = [each[PLAIN].arguments - size for each, size in zip(measured, rows, strict=True)]
    sizes = {name: [_kib(each[name].temporaries) for each in measured] for name in ENGINES}
    sizes |= {"argument: batch indices": [_kib(size) for size in rows]}
    sizes |= {"arguments: data and eta": [_kib(size) for size in data]}
    work = {
        name: [f"{each[name].flops / each[PLAIN].flops:.2f}" for each in measured]
        for name in ENGINES
    }
    columns = [f"T={horizon}" for horizon in horizons]
    return "\n\n".join(
        (table("temporaries, KiB", columns, sizes), table("FLOPs, plain = 1", columns, work))
    )


def times(algorithm: FDS, tasks: Tasks, counts: Sequence[int], rounds: int) -> str:
    """Return the table of times by the number of hyperparameters."""
    cells: dict[str, list[str]] = {name: [] for name in ENGINES}
    for count in counts:
        timings = seconds(with_tangents(algorithm, count), tasks, rounds)
        plain = 1e6 * statistics.median(timings[PLAIN]) / algorithm.inner_steps
        for name, values in timings.items():
            ratio = statistics.median(a / b for a, b in zip(values, timings[PLAIN], strict=True))
            cells[name].append(f"{plain:.1f} us" if name == PLAIN else f"{ratio:.1f}")
    corner = f"time per inner step, T={algorithm.inner_steps}, plain = 1"
    return table(corner, [f"N={count}" for count in counts], cells)


def _kib(size: int) -> str:
    return f"{size / 2**10:,.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--T", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--N", type=int, nargs="+", default=[3, 5, 9, 17, 33])
    parser.add_argument("--seconds", type=int, default=0, metavar="ROUNDS")
    options = parser.parse_args(argv)
    algorithm, tasks = problem()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n", flush=True)
    print(memory(algorithm, tasks, options.T), flush=True)
    if options.seconds:
        first = algorithm.stretched(options.T[0])
        print(f"\n{times(first, tasks, options.N, options.seconds)}")


if __name__ == "__main__":
    main()
