"""One exact meta-gradient through a training run of a decoder of 10.8M parameters, and its error.

    python -m metalearn.experiments.benchmarks.shakespeare [--steps=1000] [--data-dir=...]

The decoder (6 layers, width 384, 6 heads, bytes) is trained for T steps of Adam on windows of tiny
Shakespeare, at a rate that falls to zero; the outer loss is that of held-out windows. eta is a
learning rate for each step and a decoupled weight decay for each parameter, as logarithms of
factors: T + 10.8M numbers. A state of the run (parameters and Adam's moments) takes 124 MiB, so
that all T of them would take 121 GiB.

The run is cut into segments (`Trainer(segment=, replay=)`) whose first states are kept in so much
host memory and disk as `--host` and `--disk` allow. Printed are the plan, the time in times of the
same training alone, the largest anonymous memory of the process (RssAnon: what it has allocated;
compilation included) and what was on the disk at most.

Then the meta-gradient is compared with central differences along random directions v: a Gaussian
number for each tenth of the schedule, and for the decays Gaussian numbers of one sign in a tensor
of a layer, as independent signs of ten million numbers would cancel. In float32 a central
difference

    D(h) = (F(h v) - F(-h v)) / 2h

is wrong by a truncation error, which falls with h^2, and by the rounding error of F divided by h.
Two of them tell the first: D(h / 4) is wrong by about a fifteenth of its distance to D(h). The
second is what F differs by between two programs that compute it in another order, the run in
segments and the run in one program, or the distance of two numbers of float32 at F if that is more.
The tolerance printed beside each difference, D(h / 4), is the sum of the two.

XLA's flags are those of the `attribution` benchmark, unless `XLA_FLAGS` is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import Algorithm, Episode, MixedFlow, Replay, Trainer, Unroll
from metalearn.datasets.text import Text, Windows, read_text
from metalearn.engines.inner_loop import rollout
from metalearn.experiments.benchmarks.attribution import OneTask, seconds, xla_flags
from metalearn.experiments.benchmarks.host_fed import largest_during, peak_anonymous
from metalearn.models.transformer import Architecture
from metalearn.tasks import draw_task

DECODER = Architecture(256, 384, 6, heads=6)
RATE, DECAY, WARMUP = 3e-4, 0.1, 50
LENGTH, BATCH, QUERIES = 32, 2, 32
WINDOWS = 10  # of the steps, in which a direction is constant
KEY = 0


@dataclasses.dataclass(frozen=True)
class Schedules(Algorithm):
    """A learning rate for each step and a weight decay for each parameter of one training run.

    An episode's support is windows [T, batch], and its query windows [queries].

    architecture: of the decoder.
    steps: T.
    """

    architecture: Architecture
    steps: int

    def init(self, key: jax.Array) -> Any:
        """Return the logarithms of the factors on `RATE` and `DECAY`: zeros."""
        shapes = jax.eval_shape(self.architecture.init, key)
        decays = jax.tree.map(lambda shape: jnp.zeros(shape.shape), shapes)
        return {"rate": jnp.zeros(self.steps), "decay": decays}

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return the windows of each step, and its number."""
        return episode.support, jnp.arange(self.steps)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training run, and the mean loss on the query."""
        # A run whose derivatives are worth having: at a constant rate of 1e-3 with eps_root=1e-8,
        # derivatives grow from 0.02 over 50 steps to 6e3 over 200, and overflow over 1,000; at
        # 3e-4 with 1e-6 they are 0.2 over 400, and 700 over 1,000. Let the rate fall.
        adam = optax.scale_by_adam(0.9, 0.99, eps_root=1e-6)

        def mean_loss(params: Any, windows: Windows) -> jax.Array:
            logits = self.architecture.apply(params, windows.inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, windows.targets).mean()

        def init(eta: Any) -> Any:
            params = self.architecture.init(jax.random.key(KEY))
            return params, adam.init(params)

        def step(eta: Any, state: Any, batch: Any, grad: Any) -> Any:
            (params, optimizer), (windows, number) = state, batch
            updates, optimizer = adam.update(grad(mean_loss)(params, windows), optimizer)
            warm = jnp.minimum((number + 1) / WARMUP, 1)
            rate = RATE * warm * (1 - number / self.steps) * jnp.exp(eta["rate"][number])

            def moved(param: jax.Array, update: jax.Array, decay: jax.Array) -> jax.Array:
                return param - rate * (update + DECAY * jnp.exp(decay) * param)

            return jax.tree.map(moved, params, updates, eta["decay"]), optimizer

        def loss(eta: Any, state: Any) -> Any:
            return mean_loss(state[0], episode.query), {}

        return Unroll(init, step, loss)


def problem(steps: int, data_dir: str | None) -> tuple[Schedules, OneTask]:
    """Return the algorithm, and its task on tiny Shakespeare."""
    texts = (read_text(split=split, data_dir=data_dir) for split in ("train", "validation"))
    text = Text.create(*texts, length=LENGTH, inner_steps=steps, batch=BATCH, queries=QUERIES)
    return Schedules(DECODER, steps), OneTask(jax.jit(text.sample)(jax.random.key(KEY)))


def training(algorithm: Schedules, tasks: OneTask) -> Callable[[Any], float]:
    """Return the outer loss as a function of eta: the run alone, in one program."""

    def outer_loss(eta: Any, tasks: OneTask) -> jax.Array:
        task = draw_task(algorithm, tasks, jax.random.key(KEY))
        return rollout(task.unroll, eta, task.batches())[0]

    compiled = jax.jit(outer_loss)
    return lambda eta: float(compiled(eta, tasks))


def peak_on_disk(folder: pathlib.Path, run: Callable[[], Any]) -> int:
    """Return the most bytes that the files of a folder took while `run` ran."""

    def on_disk() -> int:
        with os.scandir(folder) as entries:
            return sum(_size(entry) for entry in entries)

    return largest_during(on_disk, run, every=0.2)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a state that was just deleted
        return 0


def direction(eta: Any, number: int) -> Any:
    """Return a random direction like eta; see the top of this file."""
    key = jax.random.fold_in(jax.random.key(1), number)
    rate_key, sign_key, size_key = jax.random.split(key, 3)
    leaves, treedef = jax.tree.flatten(eta["decay"])
    keys = (jax.random.split(key, len(leaves)) for key in (sign_key, size_key))

    def along(leaf: jax.Array, sign_key: jax.Array, size_key: jax.Array) -> jax.Array:
        one_a_layer = leaf.shape[0] if leaf.ndim == 3 else 1
        signs = jax.random.rademacher(sign_key, (one_a_layer, *[1] * (leaf.ndim - 1)), leaf.dtype)
        return signs * jnp.abs(jax.random.normal(size_key, leaf.shape))

    decays = jax.tree.unflatten(treedef, map(along, leaves, *keys))
    rates = jax.random.normal(rate_key, (WINDOWS,))
    window = jnp.arange(len(eta["rate"])) * WINDOWS // len(eta["rate"])
    return {"rate": rates[window], "decay": decays}


def central_difference(loss: Callable[[Any], float], v: Any, h: float) -> float:
    """Return (F(h v) - F(-h v)) / 2h."""
    up, down = (loss(optax.tree.scale(step, v)) for step in (h, -h))
    return (up - down) / (2 * h)


def check(grads: Any, loss: Callable[[Any], float], rounding: float, count: int, h: float) -> None:
    """Print the meta-gradient along some directions beside central differences."""
    columns = (
        "direction",
        "meta-gradient",
        "of the decays",
        "D(h)",
        "D(h / 4)",
        "apart",
        "tolerance",
    )
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for number in range(count):
        v = direction(grads, number)
        of_decays = float(optax.tree.vdot(grads["decay"], v["decay"]))
        exact = float(jnp.vdot(grads["rate"], v["rate"])) + of_decays
        coarse, fine = (central_difference(loss, v, step) for step in (h, h / 4))
        tolerance = abs(coarse - fine) / 15 + rounding / (h / 4)
        print(
            f"| {number + 1} | {exact:.6f} | {of_decays:.6f} | {coarse:.6f} | {fine:.6f} | "
            f"{abs(fine / exact - 1):.1e} | {tolerance / abs(exact):.1e} |",
            flush=True,
        )


def main() -> None:
    """Take the meta-gradient, then check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--segment", type=int, default=1)
    parser.add_argument("--host", default="0")
    parser.add_argument("--disk", default="18GiB")
    parser.add_argument("--data-dir", help="of TensorFlow Datasets")
    parser.add_argument("--directions", type=int, default=3)
    parser.add_argument("--step-size", type=float, default=0.0005, help="h")
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", xla_flags())
    algorithm, tasks = problem(options.steps, options.data_dir)
    with tempfile.TemporaryDirectory(prefix="states-") as scratch:
        folder = pathlib.Path(scratch)
        trainer = Trainer(
            algorithm,
            MixedFlow(),
            optax.trace(0.0),  # the outer optimizer's state is the meta-gradient
            tasks_per_step=1,
            segment=options.segment,
            replay=Replay(host=options.host, disk=options.disk, folder=folder),
        )
        state = trainer.init(jax.random.key(KEY), tasks)
        segments = trainer.segments(tasks)
        assert segments is not None
        print(f"jax {jax.__version__}, {os.cpu_count()} cores\n{segments.planned}", flush=True)
        taken: dict[str, Any] = {}

        def run() -> None:
            began = time.perf_counter()
            after, metrics = trainer.step(state, tasks)
            taken.update(grads=after.optimizer.trace, loss=float(metrics["loss"]))
            taken.update(seconds=time.perf_counter() - began)

        memory = peak_anonymous(lambda: taken.update(disk=peak_on_disk(folder, run)))
        grads, outer_loss, elapsed = (taken[name] for name in ("grads", "loss", "seconds"))
    loss, zeros = training(algorithm, tasks), jax.tree.map(jnp.zeros_like, grads)
    at_zero = loss(zeros)
    plain = seconds(lambda: loss(zeros))
    print(f"seconds: {elapsed:.0f}, of the training alone {plain:.0f}: {elapsed / plain:.2f}x")
    print(
        f"RssAnon at most {memory / 2**20:.0f} MiB, on disk at most {taken['disk'] / 2**30:.1f} GiB"
    )
    print(f"outer loss {outer_loss:.6f}, in one program {at_zero:.6f}", flush=True)
    rounding = max(abs(outer_loss - at_zero), float(np.spacing(np.float32(at_zero))))
    check(grads, loss, rounding, options.directions, options.step_size)


if __name__ == "__main__":
    main()
