"""Exact meta-gradients through long inner runs, cut into segments: time, memory and replays.

    python -m metalearn.experiments.benchmarks.replay long [--T 100000] [--states 64]
    python -m metalearn.experiments.benchmarks.replay overhead [--K 100] [--rounds 7]
    python -m metalearn.experiments.benchmarks.replay gradients [--K 100] [--rounds 7]

`long`: the training run of `--config=fds_digits` (an MLP 64-64-10 on scikit-learn's digits, SGD
with momentum) with nine hyperparameters, T inner steps, at most so many states kept on the host.
Printed per outer step: the programs that ran, against the formula of the binomial schedule; the
largest temporaries of a compiled program; the time, against `Reverse("segments")` in one program
at T / 10, scaled.

`overhead`: the same run at T = 2000 in segments of K, every state kept, against the same work in
one program: the loop over T / K segments as a scan whose segments are rematerialised
(`Reverse("segments", segment=K)`, which computes the same steps).

`gradients`: `MixedFlow` at T = 2000 in segments of K, every state kept, with the inner gradients of
no segment kept beside them and with those of all: FLOPs and seconds of an outer step, and of plain
training.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from metalearn import MixedFlow, Replay, Reverse, Trainer
from metalearn.algorithms import FDS
from metalearn.engines.inner_loop import inner_loop
from metalearn.experiments.benchmarks.horizons import problem, with_tangents
from metalearn.planning.step_cost import StepCosts
from metalearn.tasks import Tasks, draw_task
from metalearn.training.replay_schedule import replays

HYPERPARAMETERS = 9
KEY = 0


def trainer(algorithm: FDS, steps: int, engine: Any, **options: Any) -> Trainer:
    """Return the trainer of one run of T steps."""
    algorithm = dataclasses.replace(with_tangents(algorithm, HYPERPARAMETERS), inner_steps=steps)
    return Trainer(algorithm, engine, optax.sgd(1e-3), tasks_per_step=1, **options)


def seconds(call: Callable[[], Any], rounds: int = 1) -> list[float]:
    """Return the times of a call that has run before."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return times


def outer_step(made: Trainer, tasks: Tasks) -> Callable[[], Any]:
    """Return a call of an outer step from the same state, compiled."""
    state = made.init(jax.random.key(KEY))
    return lambda: made.step(state, tasks)[0].eta


def long(steps: int, states: int) -> None:
    """Print the row of a long run."""
    algorithm, tasks = problem()
    made = trainer(algorithm, steps, MixedFlow(), segment="auto", replay=Replay(states=states))
    segments = made.segments(tasks)
    assert segments is not None
    cut = segments.segments
    step = outer_step(made, tasks)
    (first,), (again,) = seconds(step), seconds(step)
    programs, expected = segments.programs_in_all, replays(cut.count, states)
    print(f"T={steps:,}: {cut.count} segments of {cut.length} steps, {states} states kept")
    print(f"  programs {programs:,}, of which replays {programs - 2 * cut.count + 1:,}")
    print(f"  replays by the formula: {expected:,}")
    print(f"  seconds: {again:.1f} (the first outer step, compiled: {first:.1f})")
    for count in (steps // 100, steps // 10, steps):
        print(f"  temporaries at T={count:,}: {temporaries(algorithm, tasks, count):,} B")
    shorter = max(steps // 10, 1)
    whole = outer_step(trainer(algorithm, shorter, Reverse("segments")), tasks)
    whole()
    (scaled,) = seconds(whole)
    print(
        f"  Reverse('segments') in one program at T={shorter:,}: {scaled:.1f} s, "
        f"times {steps // shorter}: {scaled * steps / shorter:.1f} s "
        f"({again / (scaled * steps / shorter):.2f}x)"
    )


def temporaries(algorithm: FDS, tasks: Tasks, steps: int, segment: int = 100) -> int:
    """Return the largest temporaries of the programs of an outer step, in bytes."""
    made = trainer(algorithm, steps, MixedFlow(), segment=segment)
    segments = made.segments(tasks)
    assert segments is not None
    return max(each.temporaries for each in segments.costs(made.shapes(tasks), tasks).values())


def overhead(segment: int, rounds: int, steps: int = 2000) -> None:
    """Print the time of segments over that of one program."""
    algorithm, tasks = problem()
    cut = outer_step(trainer(algorithm, steps, Reverse(), segment=segment), tasks)
    whole = outer_step(trainer(algorithm, steps, Reverse("segments", segment=segment)), tasks)
    for each in (cut, whole):
        each()
    pairs = [(*seconds(cut), *seconds(whole)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"T={steps} in segments of {segment}: {a:.3f} s, in one program {b:.3f} s, "
        f"median ratio {statistics.median(ratios):.3f} of {rounds} rounds"
    )


def gradients(segment: int, rounds: int, steps: int = 2000) -> None:
    """Print FLOPs and seconds of outer steps without and with inner gradients kept."""
    algorithm, tasks = problem()
    made = [
        trainer(algorithm, steps, MixedFlow(), segment=segment, replay=Replay(gradients=amount))
        for amount in (0, "1GiB")
    ]
    plain = StepCosts(made[0], tasks).plain().flops
    calls = [inner_run(made[0], tasks), *(outer_step(each, tasks) for each in made)]
    for call in calls:
        call()
    rows = [[each for call in calls for each in seconds(call)] for _ in range(rounds)]
    times = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"T={steps} in segments of {segment}; plain training: {plain:,} FLOPs, {times[0]:.3f} s")
    for number, each in enumerate(made, 1):
        segments = each.segments(tasks)
        assert segments is not None
        plan, cost = segments.planned, segments.cost(each.shapes(tasks), tasks)
        ratio = statistics.median(row[number] / row[0] for row in rows)
        print(
            f"  inner gradients of {plan.host_gradients} segments kept, "
            f"{plan.host_gradients * plan.gradient_bytes:,} B: {cost.flops / plain:.2f}x FLOPs, "
            f"{times[number]:.3f} s, median {ratio:.2f}x of {rounds} rounds"
        )


def inner_run(made: Trainer, tasks: Tasks) -> Callable[[], Any]:
    """Return a call of plain training, compiled: the inner run, without a meta-gradient."""
    eta, key = made.init(jax.random.key(KEY)).eta, jax.random.key(KEY)

    @jax.jit
    def run(eta: Any, tasks: Tasks) -> Any:
        task = draw_task(made.algorithm, tasks, key)
        return inner_loop(task.unroll, eta, task.batches())[0]

    return lambda: run(eta, tasks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("long", "overhead", "gradients"))
    parser.add_argument("--T", type=int, default=100_000)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--K", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if options.what == "long":
        long(options.T, options.states)
    elif options.what == "overhead":
        overhead(options.K, options.rounds)
    else:
        gradients(options.K, options.rounds)


if __name__ == "__main__":
    main()
