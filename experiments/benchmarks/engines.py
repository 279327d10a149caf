"""Memory, FLOPs and time of the engines on a language model or a small MLP, and how they grow.

    python -m metalearn.experiments.benchmarks.engines                     # the workload below
    python -m metalearn.experiments.benchmarks.engines --layers 2 6 12 24  # against depth
    python -m metalearn.experiments.benchmarks.engines --task weights --seconds 7
    python -m metalearn.experiments.benchmarks.engines --task sinusoid --width 40 --batch 10

One meta-gradient of a task of Kemaev et al. 2025 (arXiv:2505.00793): per-parameter learning
rates (`rates`), MAML (`maml`) or loss weights (`weights`), of a transformer; or of MAML on
sinusoids (`sinusoid`), of an MLP with two layers of `width` units on `batch` points, whatever the
other sizes are. All are trained with Adam. By default T=2, batch 4, sequence 256, 12 layers,
width 64, 4 heads, 256 tokens. Every axis takes several values, and every combination is a row per
setting.

Memory is the temporaries of the compiled program, FLOPs are its matrix products with loop
trip counts, in units of F, one forward pass of an inner batch, per inner step: both are
deterministic, and nothing is allocated. Seconds only with `--seconds ROUNDS`: the settings
take turns, and a row is the median. Writes engines.csv, engines.md and a picture per axis.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn import Algorithm, Episode, MetaGradient, MixedFlow, Reverse
from metalearn.algorithms import MAML, LearningRates, LossWeights, TokenWeights, squared_error
from metalearn.cost import Cost, cost
from metalearn.datasets.text import Windows
from metalearn.experiments.benchmarks import reporting
from metalearn.models import Functions, Linen, Model
from metalearn.models.linen_networks import MLP
from metalearn.models.transformer import Architecture
from metalearn.optimizers import reversible
from metalearn.planning.step_cost import REFUSALS

AXES = {"T": 2, "batch": 4, "length": 256, "layers": 12, "width": 64}
BASE = "b: reverse, step and block remat"
Sizes = dict[str, int]


class Setting(NamedTuple):
    """An engine, and the rematerialisation of the model's blocks.

    engine: of the meta-gradient.
    block: `Architecture.remat`.
    """

    engine: MetaGradient
    block: str


def settings(size: Sizes) -> dict[str, Setting]:
    """Return the settings, from the standard one to that of least memory; micro-batches of one."""
    parts = size["batch"]
    return {
        "plain reverse": Setting(Reverse(), "none"),
        "reverse, block remat": Setting(Reverse(), "block"),
        BASE: Setting(Reverse("step"), "block"),
        "b, first step peeled": Setting(Reverse("step", peel=True), "block"),
        "mixed flow as in the paper": Setting(MixedFlow(peel=False), "block"),
        "MixedFlow()": Setting(MixedFlow(), "block"),
        "MixedFlow(), blocks keep dots": Setting(MixedFlow(), "dots"),
        "MixedFlow(), no block remat": Setting(MixedFlow(), "none"),
        "MixedFlow(nested)": Setting(MixedFlow("nested"), "block"),
        "MixedFlow(inexact_bfloat16)": Setting(MixedFlow(store="inexact_bfloat16"), "block"),
        "MixedFlow(inexact_reconstruct)": Setting(MixedFlow("inexact_reconstruct"), "block"),
        "MixedFlow(micro_batches)": Setting(MixedFlow(micro_batches=parts), "block"),
        "MixedFlow(nested, micro_batches)": Setting(
            MixedFlow("nested", micro_batches=parts), "block"
        ),
    }


def architecture(size: Sizes, block: str) -> Architecture:
    """Return the transformer of a size."""
    return Architecture(256, size["width"], size["layers"], heads=4, remat=block)


def rates(model: Model, size: Sizes) -> tuple[Algorithm, Episode]:
    """Per-parameter learning rates: eta is as large as theta."""
    optimizer = reversible.adam(1.0, eps_root=1e-8)  # as optax.adam, and reversible
    return LearningRates(model, optimizer=optimizer, mean_over_examples=True), Episode(
        (_tokens(size, "T"),) * 2, (_tokens(size),) * 2
    )


def maml(model: Model, size: Sizes) -> tuple[Algorithm, Episode]:
    """MAML: eta is theta_0; every step reads the same batch."""
    algorithm = MAML(model, optimizer=optax.adam(1e-3, eps_root=1e-8), inner_steps=size["T"])
    return algorithm, Episode((_tokens(size),) * 2, (_tokens(size),) * 2)


def weights(model: Model, size: Sizes) -> tuple[Algorithm, Episode]:
    """Loss weights: eta is a small network on each token's loss and position."""
    algorithm = LossWeights(model, TokenWeights(), optax.adam(1e-3, eps_root=1e-8))
    return algorithm, Episode(_windows(size, "T"), _windows(size))


def sinusoid(model: Model, size: Sizes) -> tuple[Algorithm, Episode]:
    """MAML on sinusoid regression: the task of arXiv:1703.03400, with Adam in the inner loop."""
    optimizer = optax.adam(1e-3, eps_root=1e-8)
    algorithm = MAML(model, squared_error, optimizer, inner_steps=size["T"])
    points = (jax.ShapeDtypeStruct((size["batch"], 1), jnp.float32),) * 2
    return algorithm, Episode(points, points)


TASKS: dict[str, Callable[[Model, Sizes], tuple[Algorithm, Episode]]] = {
    "rates": rates,
    "maml": maml,
    "weights": weights,
    "sinusoid": sinusoid,
}


def _tokens(size: Sizes, *leading: str) -> Any:
    shape = tuple(size[axis] for axis in (*leading, "batch", "length"))
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _windows(size: Sizes, *leading: str) -> Windows:
    tokens = _tokens(size, *leading)
    source: Any = jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.int32)
    return Windows(tokens, tokens, source, None)


def network(task: str, size: Sizes, block: str) -> Model:
    """Return the model of a task: a transformer; a small MLP for sinusoids."""
    if task == "sinusoid":
        hidden = size["width"], size["width"]
        return Linen(MLP(1, hidden), jax.ShapeDtypeStruct((1, 1), jnp.float32))
    shape = architecture(size, block)
    return Functions(shape.init, shape.apply)


def program(task: str, size: Sizes, setting: Setting) -> tuple[Any, tuple[Any, ...]]:
    """Return (a jitted meta-gradient, the shapes of its arguments)."""
    algorithm, episode = TASKS[task](network(task, size, setting.block), size)

    def meta_gradient(eta: Any, episode: Episode, key: jax.Array) -> Any:
        unroll = algorithm.unroll(episode, key)
        batches = algorithm.batches(episode, key)
        (loss, _), grads = setting.engine.value_and_grad(unroll, eta, batches)
        return loss, grads

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(meta_gradient), (jax.eval_shape(algorithm.init, key), episode, key)


def forward_flops(task: str, size: Sizes) -> int:
    """Return F: the FLOPs of one forward pass of the model on one inner batch."""
    model = network(task, size, "none")
    _, episode = TASKS[task](model, size)
    inputs = episode.support[0] if task == "sinusoid" else _tokens(size)

    def forward(params: Any, state: Any, inputs: Any) -> Any:
        return model.apply(params, state, inputs, train=True)[0]

    return cost(jax.jit(forward), *jax.eval_shape(model.init, jax.random.key(0)), inputs).flops


def measure(task: str, size: Sizes, chosen: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row per setting, with its ratios to the strongest standard set-up."""
    flops = forward_flops(task, size)
    programs = {name: program(task, size, settings(size)[name]) for name in chosen}
    costs = {name: needs for name in chosen if (needs := _cost(name, *programs[name]))}
    programs = {name: programs[name] for name in costs}
    seconds = timed(programs, rounds) if rounds else dict.fromkeys(chosen, float("nan"))
    base = costs.get(BASE, next(iter(costs.values())))
    for name, needs in costs.items():
        yield {
            "task": task,
            **size,
            "setting": name,
            "temporaries_mib": round(needs.temporaries / 2**20, 3),
            "memory_below_b": round(base.temporaries / needs.temporaries, 2),
            "flops_f_per_step": round(needs.flops / flops / size["T"], 2),
            "flops_of_b": round(needs.flops / base.flops, 3),
            "seconds": seconds[name],
            "seconds_of_b": seconds[name] / seconds.get(BASE, float("nan")),
        }


def _cost(name: str, run: Any, arguments: Any) -> Cost | None:
    """Return the cost of a program; None, with a printed reason, if the engine refuses the task."""
    try:
        return cost(run, *arguments)
    except REFUSALS as error:
        print(f"{name} refuses: {error}")
        return None


def timed(programs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Return the median seconds of each program; rounds run all programs in random order."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    ready = {name: (run, _arguments(shapes)) for name, (run, shapes) in programs.items()}
    for run, arguments in ready.values():
        jax.block_until_ready(run(*arguments))
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(ready), len(ready)):
            run, arguments = ready[name]
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def _arguments(shapes: Any) -> Any:
    """Return small random numbers, tokens and a key of these shapes."""

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jax.random.randint(jax.random.key(1), shape.shape, 0, 256, shape.dtype)
        return 0.02 * jax.random.normal(jax.random.key(2), shape.shape, shape.dtype)

    return jax.tree.map(draw, shapes)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, without constant columns."""
    columns = [k for k in rows[0] if k == "setting" or len({str(row[k]) for row in rows}) > 1]
    lines = [
        [f"{row[k]:.3g}" if isinstance(row[k], float) else str(row[k]) for k in columns]
        for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write all files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="rates")
    for axis, value in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=[value])
    names = list(settings(AXES))
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seconds", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/engines"))
    options = vars(parser.parse_args(argv))
    rows = []
    for values in itertools.product(*(options[axis] for axis in AXES)):
        size = dict(zip(AXES, values, strict=True))
        for row in measure(options["task"], size, options["settings"], options["seconds"]):
            rows.append(row)
            print(*(f"{k}={v}" for k, v in row.items() if v == v), flush=True)
    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    table = f"{options['task']}, {machine}\n\n{markdown(rows)}\n"
    print(f"\n{table}")
    out = options["out"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "engines.md").write_text(table)
    with (out / "engines.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for axis in AXES:
        if len(options[axis]) > 1:
            reporting.against(rows, axis, out, AXES)


if __name__ == "__main__":
    main()
