"""One inner run on 1, 2, 4 and 8 devices: the memory of each, and what they send.

    python -m metalearn.experiments.benchmarks.inner_run [--devices 1 2 4 8]

The schedule of a training run (FDS) by mixed flow: an MLP 784-1024-1024-10 with Adam, eight inner
steps of 256 examples, one task, float32. Several devices share the inner run, with a copy of the
inner state on every device, or with its kernels sharded. Nothing is run: the outer step is compiled
for the devices that XLA makes of the CPU. Memory is the temporaries of its program on one device;
collectives are counted in the program's text, one inside a loop once. The table is the same on
every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from metalearn import Layout, MixedFlow, Trainer, make_mesh
from metalearn._utils import strict_json
from metalearn._utils.device_memory import show_bytes
from metalearn.algorithms import FDS, Hyperparameter
from metalearn.cost.hlo import collectives
from metalearn.datasets import TrainingRuns
from metalearn.experiments.benchmarks.horizons import table
from metalearn.models import Functions
from metalearn.sharding.mesh import format_devices

WIDTHS, STEPS, BATCH = (784, 1024, 1024, 10), 8, 256
RULES = (("kernel$", P("data")),)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COLUMNS = ("temporaries on a device", "of 1 device", "all-gathers", "all-reduces", "others")


def problem() -> tuple[FDS, TrainingRuns]:
    """Return the algorithm, and tasks of zeros: only their shapes are read."""

    def init(key: jax.Array) -> dict[str, Any]:
        pairs = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
        return {
            f"layer{i}": {
                "kernel": jax.random.normal(jax.random.fold_in(key, i), pair) / pair[0] ** 0.5,
                "bias": jnp.zeros(pair[1]),
            }
            for i, pair in enumerate(pairs)
        }

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        *hidden, last = params.values()
        for layer in hidden:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    rate = Hyperparameter(1e-5, 1e-1, start=1e-3, windows=4, space="log")
    algorithm = FDS(Functions(init, apply), {"learning_rate": rate}, STEPS, BATCH, optimizer=_adam)
    inputs, targets = jnp.zeros((4096, WIDTHS[0])), jnp.zeros(4096, jnp.int32)
    return algorithm, TrainingRuns.create(inputs, targets, validation=1024)


def _adam(learning_rate: jax.Array) -> optax.GradientTransformation:
    return optax.adam(learning_rate, eps_root=1e-8)


def measured(rules: Any) -> dict[str, Any]:
    """Return the temporaries and the collectives of an outer step over all devices there are."""
    algorithm, tasks = problem()
    count = len(jax.devices())
    layout = Layout(make_mesh(tasks=1, data=count), rules) if count > 1 else None
    trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=1, layout=layout)
    outer: Any = trainer.step
    program = outer.lower(trainer.shapes(tasks), jax.eval_shape(lambda x: x, tasks)).compile()
    kinds = Counter(each.kind for each in collectives(program.as_text()))
    return {"temporaries": program.memory_analysis().temp_size_in_bytes, "kinds": dict(kinds)}


def run(count: int, sharded: bool) -> dict[str, Any]:
    """Measure in a new process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    words = [sys.executable, "-m", __spec__.name, "--part", str(int(sharded))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"A process of the benchmark failed:\n{done.stderr[-3000:]}")
    return strict_json.loads(done.stdout.splitlines()[-1])


def compared(counts: Sequence[int]) -> str:
    """Return the table of all numbers of devices."""
    one, rows = run(1, False), {}
    for count in counts:
        for name, sharded in (("copies", False), ("kernels sharded", True)):
            if count == 1 and sharded:
                continue
            each = one if count == 1 else run(count, sharded)
            gathers, reduces, *others = (each["kinds"].get(kind, 0) for kind in KINDS)
            title = format_devices(count) + ("" if count == 1 else f", {name}")
            rows[title] = [
                show_bytes(each["temporaries"]),
                f"{each['temporaries'] / one['temporaries']:.3f}",
                *map(str, (gathers, reduces, sum(others))),
            ]
    return table(f"one task, T = {STEPS}, batch {BATCH}", COLUMNS, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part is not None:
        print(strict_json.dumps(measured(RULES if options.part else ())))
    else:
        print(f"jax {jax.__version__}\n\n{compared(options.devices)}")


if __name__ == "__main__":
    main()
