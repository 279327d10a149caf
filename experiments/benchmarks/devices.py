"""One device, eight, and two processes with four each: the same meta-gradient, and its memory.

    python -m metalearn.experiments.benchmarks.devices [--tasks 32]
    python -m metalearn.experiments.benchmarks.devices --paper [--flops 1e14 --bandwidth 5e10]

MAML on 5-way 1-shot digits, an MLP 64-128-5 of plain functions in float64, five inner steps of
SGD, mixed flow. Devices are those that XLA makes of the CPU, so memory and messages are what they
would be and time is not: no time is measured. Memory is the temporaries of the compiled outer
step on one device.

`--paper` computes what more devices would do, under assumptions that are arguments: what a device
computes in a second, what it sends in a second, and how long a message takes to the next one. An
all-reduce of B bytes over n devices sends 2 (n - 1) / n B from each, in 2 ceil(log2 n) messages
one after the other; nothing is overlapped with it. Every device takes one task: the least it can.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from metalearn import Layout, MixedFlow, Trainer, make_mesh
from metalearn._utils import strict_json
from metalearn._utils.device_memory import show_bytes
from metalearn._utils.trees import size
from metalearn.algorithms import MAML
from metalearn.cost import cost
from metalearn.cost.hlo import collectives
from metalearn.datasets import FewShot, digits
from metalearn.experiments.benchmarks.horizons import table
from metalearn.models import Functions
from metalearn.sharding import distributed as processes

SETTINGS = {"1 device": (1, 1), "8 devices": (1, 8), "2 processes x 4": (2, 4)}
HIDDEN, WAYS, STEPS = 128, 5, 5
COLUMNS = ("difference", "temporaries on a device", "of 1 device", "all-reduces", "bytes reduced")
# On paper, beside the problem above: |eta|, parameters of the inner network, inner steps, tokens
# of each. A token costs 6 FLOPs a parameter for an inner gradient, a meta-gradient thrice that.
LARGE = {
    "a learned optimizer": (10**4, 10**7, 50, 2**12),
    "an initialisation": (10**8, 10**8, 10, 2**14),
}


def problem() -> tuple[MAML, FewShot]:
    """Return MAML on digits, its network of plain functions."""

    def init(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key)
        return [
            jax.random.normal(keys[0], (64, HIDDEN)) / 8,
            jax.random.normal(keys[1], (HIDDEN, WAYS)) / 11,
        ]

    def apply(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return jax.numpy.tanh(x.reshape(len(x), 64) @ params[0]) @ params[1]

    tasks = FewShot.create(digits("train"), ways=WAYS, shots=1, queries=5)
    return MAML(Functions(init, apply), inner_steps=STEPS), tasks


def measured(tasks_per_step: int, spread: bool) -> dict[str, Any]:
    """Return the meta-gradient of the first outer step, and what its program takes."""
    algorithm, tasks = problem()
    layout = Layout(make_mesh()) if spread else None
    trainer = Trainer(algorithm, MixedFlow(), optax.sgd(1.0), tasks_per_step, layout=layout)
    state = trainer.init(jax.random.key(0), tasks)
    after, _ = trainer.step(state, trainer.place(tasks))
    grads = [np.asarray(a) - np.asarray(b) for a, b in zip(state.eta[0], after.eta[0], strict=True)]
    outer: Any = trainer.step
    program = outer.lower(trainer.shapes(tasks), tasks).compile()
    reduced = [one.size for one in collectives(program.as_text()) if one.kind == "all-reduce"]
    return {
        "gradient": np.concatenate([grad.ravel() for grad in grads]).tolist(),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "reduced": reduced,
    }


def run(tasks_per_step: int, count: int, devices: int) -> dict[str, Any]:
    """Measure in new processes with several devices each."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "XLA_FLAGS": flags}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "results.json"
        words = [sys.executable, "-m", __spec__.name, f"--tasks={tasks_per_step}", f"--out={out}"]
        places = [[coordinator, str(count), str(i)] for i in range(count)]
        started = [
            subprocess.Popen([*words, "--part", *place], env=environment) for place in places
        ]
        if any(process.wait() for process in started):
            raise RuntimeError("A process of the benchmark failed; its error is above.")
        return strict_json.loads(out.read_text())


def part(coordinator: str, count: int, process: int, tasks: int, out: pathlib.Path) -> None:
    """Measure in this process, one of several, and write the results."""
    if count > 1:
        processes.start(coordinator, count, process)
    results = measured(tasks, spread=len(jax.devices()) > 1)
    if processes.is_first():
        out.write_text(strict_json.dumps(results))


def compared(tasks: int) -> str:
    """Return the table of all settings."""
    results = {name: run(tasks, *setting) for name, setting in SETTINGS.items()}
    one = results["1 device"]
    rows = {}
    for name, each in results.items():
        gradient, expected = np.array(each["gradient"]), np.array(one["gradient"])
        difference = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        rows[name] = [
            f"{difference:.1e}" if each is not one else "",
            show_bytes(each["temporaries"]),
            f"{each['temporaries'] / one['temporaries']:.3f}",
            str(len(each["reduced"])),
            f"{sum(each['reduced']):,}",
        ]
    return table(f"{tasks} tasks, float64", COLUMNS, rows)


def work() -> dict[str, tuple[int, float]]:
    """Return |eta| and the FLOPs of a task: of the problem above, compiled, and of large ones."""
    algorithm, tasks = problem()
    trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=1)
    shapes = trainer.shapes(tasks), jax.eval_shape(lambda tree: tree, tasks)
    workloads = {"MAML on digits": (size(shapes[0].eta), float(cost(trainer.step, *shapes).flops))}
    for name, (eta, inner, steps, tokens) in LARGE.items():
        workloads[name] = eta, 3 * 6.0 * inner * steps * tokens
    return workloads


def on_paper(counts: Sequence[int], flops: float, bandwidth: float, latency: float) -> str:
    """Return the table of bytes and seconds of an outer step, one float32 task on each device."""
    rows = {}
    for name, (parameters, per_task) in work().items():
        computing = per_task / flops
        for count in counts:
            sent = 2 * (count - 1) / count * 4 * parameters
            sending = sent / bandwidth + 2 * math.ceil(math.log2(count)) * latency
            rows[f"{name}, {count} devices"] = [
                show_bytes(sent),
                _seconds(sending),
                _seconds(computing),
                f"{sending / (sending + computing):.2g}",
                f"{max(math.ceil(9 * sending / computing), 1):,}",
            ]
    columns = ("sent by a device", "all-reduce", "a task", "share of the time", "tasks for a tenth")
    return table("on paper", columns, rows)


def _seconds(time: float) -> str:
    """Return a time as text."""
    units = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
    unit = next((unit for unit, each in units.items() if time * each >= 1), "ns")
    return f"{time * units[unit]:.3g} {unit}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or compute on paper, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--flops", type=float, default=1e14, help="of a device, in a second")
    parser.add_argument(
        "--bandwidth", type=float, default=5e10, help="bytes a device sends, in 1 s"
    )
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds of a message")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        coordinator, count, process = options.part
        part(coordinator, int(count), int(process), options.tasks, options.out)
    elif options.paper:
        print(on_paper(options.devices, options.flops, options.bandwidth, options.latency))
    else:
        print(f"jax {jax.__version__}\n\n{compared(options.tasks)}")


if __name__ == "__main__":
    main()
