"""Outer steps per second of tasks on the host, against the same tasks on the device.

    python -m metalearn.experiments.benchmarks.host_fed [--large-gib=2]

MAML on Omniglot's shapes, as in `metalearn.experiments.benchmarks.maml`: 16 tasks, 5-way 1-shot,
25 query images of 28 x 28, four convolutions of 64 filters, one inner step, reverse mode, tasks
one at a time. The images are noise in the shape of the training split (4,112 classes x 20).

- `device`          `FewShot`: the images are on the device, and sampled inside the outer step
- `host, array`     `HostFewShot` of an array in memory
- `host, memmap`    `HostFewShot` of a file
- `host, items`     `HostFewShot` of a source that returns one image at a time

All by `Trainer.fit`, which reads the rows of the next steps in a thread. They take turns, and each
ratio is the median of the ratios within rounds; that of CPU time tells as much on a machine that is
busy with other things. With `--large-gib` the tasks of a sparse file of
that size are trained on too, and FDS learns a learning rate of whole training runs on it
(`HostTrainingRuns`, forward mode in segments, then the final run of `HostHeldOut`); the largest
anonymous memory (RssAnon) of the process on the way is reported: what it has allocated, without the
pages of the file. `--only-large` leaves it at that. About 2 minutes.

    python -m metalearn.experiments.benchmarks.host_fed --replay-gib=4

takes one exact meta-gradient of such a run by mixed flow, in segments whose states are kept and
replayed (`Trainer(segment=, replay=)`), on a file of random pictures of that size, and compares it
with that of one program that has all the rows of the run in memory.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from metalearn import Forward, MixedFlow, Replay, Reverse, Tasks, Trainer
from metalearn.algorithms import FDS, MAML, Hyperparameter
from metalearn.datasets import FewShot, HostFewShot, HostHeldOut, HostTrainingRuns
from metalearn.experiments.benchmarks.maml import IMAGE, TASKS
from metalearn.experiments.benchmarks.sampler import random_index
from metalearn.models import Linen, train_flag
from metalearn.models.linen_networks import MLP, ConvNet

SIZES: dict[str, Any] = {"ways": 5, "shots": 1, "queries": 5}
WARM = 3  # outer steps before the clock starts
BASE = "device"


def learner() -> Trainer:
    """Return the trainer of one contender."""
    model = Linen(ConvNet(5), IMAGE, train_flag)
    return Trainer(MAML(model), Reverse(), optax.adam(1e-3), TASKS, chunk=1)


class Items:
    """A source of pairs (image, label), one at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self._images[row], self._labels[row]


def contenders(folder: pathlib.Path) -> Iterator[tuple[str, Tasks]]:
    """Yield (name, tasks): the same on the device, in memory, and in a file."""
    index = random_index()
    images = np.asarray(index.examples).reshape(-1, 28, 28, 1)
    labels = np.repeat(np.arange(len(index.counts)), index.counts)
    yield BASE, FewShot.create(index, **SIZES)
    yield "host, array", HostFewShot.create(images, labels, **SIZES)
    images.tofile(folder / "images")
    file: Any = np.memmap(folder / "images", np.uint8, "r", shape=images.shape)
    yield "host, memmap", HostFewShot.create(file, labels, **SIZES)
    yield "host, items", HostFewShot.create(Items(images, labels), labels, **SIZES)


def rates_of(trainer: Trainer, tasks: Tasks, steps: int) -> tuple[float, float]:
    """Return outer steps of `Trainer.fit` per second and per CPU second, without the first ones."""
    times = []

    def note(step: int) -> None:
        times.append((time.perf_counter(), time.process_time()))

    key = jax.random.key(0)
    state = trainer.fit(
        tasks, WARM + steps, key=key, progress=False, log_every=0, asked_to_stop=note
    )
    jax.block_until_ready(state)
    wall, cpu = times[WARM - 1]
    return steps / (time.perf_counter() - wall), steps / (time.process_time() - cpu)


def peak_anonymous(run: Callable[[], Any]) -> int:
    """Return the largest RssAnon of this process while `run` runs, in bytes (Linux)."""

    def anonymous() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    return largest_during(anonymous, run, every=0.05)


def largest_during(measure: Callable[[], int], run: Callable[[], Any], every: float) -> int:
    """Return the largest of what `measure` returns while `run` runs, `every` so many seconds."""
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(every):
            largest = max(largest, measure())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return largest


def large(folder: pathlib.Path, gib: float, steps: int) -> tuple[float, int]:
    """Train on tasks of a sparse file; return (outer steps per second, peak RssAnon in bytes)."""
    rows = int(gib * 2**30) // 784
    path = folder / "large"
    path.touch()
    os.truncate(path, rows * 784)
    rates = []

    def run() -> None:
        file: Any = np.memmap(path, np.uint8, "r", shape=(rows, 28, 28, 1))
        tasks = HostFewShot.create(file, np.arange(rows) % 10_000, **SIZES)
        rates.append(rates_of(learner(), tasks, steps)[0])

    peak = peak_anonymous(run)
    return rates[0], peak


PICTURE = (32, 32, 3)
INNER_STEPS, SEGMENT, BATCH = 2000, 100, 128
STATES = 8  # kept of the twenty segments of a run


def learning_rates(windows: int = 1) -> FDS:
    """Return FDS on runs of an MLP on pictures: a learning rate for each window of steps."""
    network = MLP(outputs=10, hidden=(64,))
    model = Linen(network, jax.ShapeDtypeStruct((1, *PICTURE), np.float32), train_flag)
    rate = Hyperparameter(1e-4, 1.0, 1e-2, windows=windows, space="log")
    return FDS(model, {"learning_rate": rate}, INNER_STEPS, BATCH)


def large_runs(folder: pathlib.Path, gib: float) -> tuple[float, int]:
    """Train full unrolls on a sparse file; return (inner steps/s, peak RssAnon in bytes)."""
    rows = int(gib * 2**30) // 3072
    path = folder / "pictures"
    path.touch()
    os.truncate(path, rows * 3072)
    file: Any = np.memmap(path, np.uint8, "r", shape=(rows, *PICTURE))
    labels = np.arange(rows, dtype=np.int32) % 10
    trainer = Trainer(learning_rates(), Forward(), tasks_per_step=1, segment=SEGMENT)
    seconds = []

    def run() -> None:
        runs = HostTrainingRuns.create(file, labels, validation=1000)
        final = HostHeldOut.create(
            file, labels, test_source=file[:1000], test_targets=labels[:1000]
        )
        state = trainer.fit(runs, 1, key=jax.random.key(0), progress=False, log_every=0)
        start = time.perf_counter()
        state = trainer.fit(runs, 2, state=state, progress=False, log_every=0)
        jax.block_until_ready(state.eta)
        seconds.append(time.perf_counter() - start)
        trainer.evaluate(trainer.learned(state), final, jax.random.key(1), 1)

    peak = peak_anonymous(run)
    return INNER_STEPS / seconds[0], peak


def random_pictures(path: pathlib.Path, rows: int) -> np.ndarray:
    """Write a file of noise around a mean picture of each of ten classes; return the labels [n]."""
    draw = np.random.default_rng(0)
    means = draw.integers(0, 128, (10, 3072), np.uint8)
    labels = draw.integers(0, 10, rows, np.int32)
    with path.open("wb") as file:
        for first in range(0, rows, 10_000):
            classes = labels[first : first + 10_000]
            noise = draw.integers(0, 128, (len(classes), 3072), np.uint8)
            file.write((means[classes] + noise).tobytes())
    return labels


def replayed(folder: pathlib.Path, gib: float) -> tuple[float, int, float]:
    """Take the meta-gradient of a run on a file of random pictures, in segments and in one program.

    Returns:
      (seconds in segments, peak RssAnon in bytes, relative difference of the meta-gradients).
    """
    rows = int(gib * 2**30) // 3072
    path = folder / "pictures"
    labels = random_pictures(path, rows)
    file: Any = np.memmap(path, np.uint8, "r", shape=(rows, *PICTURE))
    runs = HostTrainingRuns.create(file, labels, validation=1000)
    fds, taken = learning_rates(windows=5), []

    def meta_gradient(engine: Any, **options: Any) -> None:
        # The state of this outer optimizer is the meta-gradient.
        trainer = Trainer(fds, engine, optax.trace(0.0), tasks_per_step=1, **options)
        began = time.perf_counter()
        state = trainer.fit(runs, 1, key=jax.random.key(0), progress=False, log_every=0)
        (grads,) = jax.tree.leaves(jax.device_get(state.optimizer))
        taken.append((time.perf_counter() - began, grads))

    keep = Replay(states=STATES)
    peak = peak_anonymous(lambda: meta_gradient(MixedFlow(), segment=SEGMENT, replay=keep))
    meta_gradient(Reverse("segments"))
    (elapsed, grads), (_, expected) = taken
    return elapsed, peak, float(np.linalg.norm(grads - expected) / np.linalg.norm(expected))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="outer steps a round")
    parser.add_argument("--large-gib", type=float, default=0, help="size of a sparse file, in GiB")
    parser.add_argument("--only-large", action="store_true", help="no comparison with the device")
    parser.add_argument("--replay-gib", type=float, default=0, help="of a replayed run; no others")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if arguments.replay_gib:
            elapsed, peak, difference = replayed(folder, arguments.replay_gib)
            print(
                f"A meta-gradient through {INNER_STEPS} inner steps of {BATCH} pictures on a file "
                f"of {arguments.replay_gib:g} GiB: {elapsed:.0f} s in segments of {SEGMENT}, "
                f"{STATES} states kept, at most {peak / 2**20:.0f} MiB of anonymous memory; "
                f"relative difference from one program {difference:.1e}"
            )
            return
        if arguments.large_gib:  # first, as memory that is freed stays with the process
            speed, peak = large(folder, arguments.large_gib, arguments.steps)
            print(
                f"A file of {arguments.large_gib:g} GiB: {speed:.2f} outer steps/s, at most "
                f"{peak / 2**20:.0f} MiB of anonymous memory\n"
            )
            speed, peak = large_runs(folder, arguments.large_gib)
            print(
                f"Runs of {INNER_STEPS} inner steps of {BATCH} pictures on a file of "
                f"{arguments.large_gib:g} GiB: {speed:.0f} inner steps/s of forward mode, at most "
                f"{peak / 2**20:.0f} MiB of anonymous memory\n"
            )
            if arguments.only_large:
                return
        rows = dict(contenders(folder))
        trainers = {name: learner() for name in rows}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for name, tasks in rows.items():  # compiles
            rates_of(trainers[name], tasks, 1)
        load = os.getloadavg()[0]
        for turn in range(arguments.rounds):
            for name in random.Random(turn).sample(list(rows), len(rows)):
                rates[name].append(rates_of(trainers[name], rows[name], arguments.steps))
    print(f"{os.cpu_count()} cores, load {load:.1f} before, jax {jax.__version__}\n")
    print("| tasks | outer steps/s | against the device | in CPU time |\n|---|---|---|---|")
    for name, measured in rates.items():
        pairs = [*zip(measured, rates[BASE], strict=True)]
        wall, cpu = (statistics.median(ours[i] / base[i] for ours, base in pairs) for i in (0, 1))
        speed = statistics.median(wall for wall, _ in measured)
        print(f"| {name} | {speed:.2f} | {wall:.2f}x | {cpu:.2f}x |")


if __name__ == "__main__":
    main()
