"""A learned optimizer against tuned Adam and tuned SGD with momentum, on held-out runs.

    metalearn train --config=learned_optimizer_digits --workdir=runs/learned_optimizer
    python -m metalearn.experiments.benchmarks.learned_optimizer runs/learned_optimizer

The learning rates of Adam and SGD are selected from a logarithmic grid, for each setting, by the
mean training loss of runs on the training tasks: the outer loss and the tasks of the learned
optimizer. All are then compared on the test tasks, from the same theta_0, on the same batches.
Settings: as trained, a wider network, a longer run.

Writes to the workdir, and to its W&B run: curves.csv, curves.png (training loss by step, mean
and 95% band over runs), and a table with seconds per compiled step. For several
workdirs, trained with other seeds, it also prints a table over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import Algorithm, Tasks
from metalearn._utils.intervals import half_width
from metalearn.algorithms import Hyperparameter, LearnedOptimizer, TunedRule
from metalearn.engines.inner_loop import rollout
from metalearn.experiments import build
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.commands import run
from metalearn.experiments.runs import load_run
from metalearn.loggers import WandbLogger

RATES = tuple(np.geomspace(1e-4, 10, 21).tolist())  # four to an order of magnitude
SMOOTHED = 10  # steps over which the last training losses of a run are averaged
SETTINGS = ("as trained", "wider", "longer")


def _rated(make: Any) -> TunedRule:
    return TunedRule(make, {"learning_rate": Hyperparameter(1e-6, 100.0, 0.01, space="log")})


HAND_DESIGNED = {
    "Adam": _rated(optax.adam),
    "SGD, momentum 0.9": _rated(functools.partial(optax.sgd, momentum=0.9)),
}


class Curve(NamedTuple):
    """The runs of one optimizer in one setting.

    setting: its name.
    optimizer: its name.
    rate: the selected learning rate; nan for the learned optimizer.
    losses: [runs, T], training losses.
    validation: [runs], the final validation loss.
    seconds: of one inner step.
    """

    setting: str
    optimizer: str
    rate: float
    losses: np.ndarray
    validation: np.ndarray
    seconds: float


def settings(config: Mapping[str, Any], width: int, length: int) -> dict[str, dict[str, Any]]:
    """Return the run's config as trained, with wider hidden layers, and with longer runs."""
    wider, longer = copy.deepcopy(dict(config)), copy.deepcopy(dict(config))
    wider["model"]["hidden"] = [width * n for n in config["model"]["hidden"]]
    longer["algorithm"]["inner_steps"] *= length
    return dict(zip(SETTINGS, (dict(config), wider, longer), strict=True))


def compare(
    config: Mapping[str, Any], eta: Any, setting: str, runs: int, rates: Sequence[float]
) -> list[Curve]:
    """Run the learned optimizer and the hand-designed ones in one setting."""
    splits = build.splits(config["dataset"])
    learner = build.algorithm(config["algorithm"], build.model(config["model"], splits))
    assert isinstance(learner, LearnedOptimizer)
    learner = dataclasses.replace(learner, cap=None)
    keys = jax.random.split(key_of(config["seed"] + run.TEST), runs)
    curves = [_curve(setting, "learned", learner, eta, splits.test, keys)]
    for name, hand_rule in HAND_DESIGNED.items():
        hand = dataclasses.replace(learner, rule=hand_rule)
        rate = tuned(hand, splits.train, rates)
        values = {"learning_rate": jnp.log(jnp.asarray(rate, jnp.float32))}
        curves.append(_curve(setting, name, hand, values, splits.test, keys)._replace(rate=rate))
    return curves


def tuned(learner: LearnedOptimizer, tasks: Tasks, rates: Sequence[float], runs: int = 8) -> float:
    """Return the rate of the lowest mean training loss over runs on `tasks`."""
    keys = jax.random.split(jax.random.key(1), runs)  # the same runs for all rates

    @jax.jit
    def mean_loss(rate: Any) -> jax.Array:
        eta = {"learning_rate": jnp.log(rate)}
        return jax.vmap(lambda key: losses(learner, eta, tasks, key)[0].mean())(keys).mean()

    means = [float(mean_loss(rate)) for rate in rates]
    return float(rates[int(np.nanargmin(means))])


def losses(
    learner: Algorithm, eta: Any, tasks: Tasks, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (training losses [T], validation loss ()) of one run."""
    sample_key, unroll_key, batch_key = jax.random.split(key, 3)
    episode = tasks.sample(sample_key)
    unroll = learner.unroll(episode, unroll_key)
    _, aux = rollout(unroll, eta, learner.batches(episode, batch_key))
    return aux.inner.losses[:, 0], aux.metrics["validation_loss"]


def _curve(
    setting: str, name: str, learner: LearnedOptimizer, eta: Any, tasks: Tasks, keys: jax.Array
) -> Curve:
    one = jax.jit(lambda eta, key: losses(learner, eta, tasks, key))
    results = [jax.device_get(one(eta, key)) for key in keys]
    times = []
    for key in keys[:3]:
        begun = time.perf_counter()
        jax.block_until_ready(one(eta, key))
        times.append(time.perf_counter() - begun)
    trained, validated = (np.stack(parts) for parts in zip(*results, strict=True))
    return Curve(setting, name, np.nan, trained, validated, min(times) / learner.inner_steps)


def table(curves: Sequence[Curve]) -> list[str]:
    """Return a Markdown table of the curves."""
    head = ["setting", "optimizer", "learning rate", "mean training loss"]
    head += [f"last {SMOOTHED} steps", "validation loss", "us a step"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for curve in curves:
        ends = curve.losses[:, -SMOOTHED:].mean(1), curve.validation
        shown = [interval(values.tolist(), 4) for values in (curve.losses.mean(1), *ends)]
        rate = "" if np.isnan(curve.rate) else f"{curve.rate:.2g}"
        cells = (curve.setting, curve.optimizer, rate, *shown, f"{1e6 * curve.seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over_seeds(seeds: Sequence[Sequence[Curve]]) -> list[str]:
    """Return a Markdown table of the mean over runs of each seed, with its interval over seeds."""
    lines = ["| setting | optimizer | mean training loss | validation loss |", "|---" * 4 + "|"]
    for curves in zip(*seeds, strict=True):
        trained = [float(curve.losses.mean()) for curve in curves]
        validated = [float(curve.validation.mean()) for curve in curves]
        cells = (*curves[0][:2], interval(trained, 4), interval(validated, 4))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Write the curves as a CSV file, a line for each run and step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("setting", "optimizer", "run", "step", "training_loss"))
        for curve in curves:
            for i, row in enumerate(curve.losses):
                writer.writerows((*curve[:2], i, t, float(loss)) for t, loss in enumerate(row))


def draw(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Draw training loss by step, mean and 95% band over runs. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.setting for curve in curves))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for curve in (curve for curve in curves if curve.setting == setting):
            runs, steps = curve.losses.shape
            low, mean, high = _band(curve.losses)
            (line,) = axes.plot(mean, label=curve.optimizer)
            axes.fill_between(range(steps), low, high, alpha=0.25, color=line.get_color())
        axes.set(yscale="log", xlabel="inner step", ylabel="training loss", title=setting)
        axes.legend(title=f"{runs} runs")
    figure.savefig(path, dpi=120)


def _band(losses: np.ndarray) -> np.ndarray:
    """Return [3, T]: the mean over runs between the ends of its 95% interval."""
    mean, width = losses.mean(0), half_width(losses)
    return np.stack([np.maximum(mean - width, losses.min(0)), mean, mean + width])


def main(argv: Sequence[str] | None = None) -> list[list[Curve]]:
    """Compare, write, draw and log, for each workdir."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path, nargs="+", help="of `metalearn train`")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--width", type=int, default=4, help="times the hidden units")
    parser.add_argument("--length", type=int, default=5, help="times the steps")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args(argv)
    reports = [_report(workdir, options) for workdir in options.workdir]
    if len(reports) > 1:
        print("\n".join([f"Over {len(reports)} seeds:", *over_seeds(reports)]))
    return reports


def _report(workdir: pathlib.Path, options: argparse.Namespace) -> list[Curve]:
    restored = load_run(workdir)
    settled = settings(restored.config, options.width, options.length)
    curves, learned = [], restored.trainer.learned(restored.state)
    for name in options.setting:
        curves += compare(settled[name], learned, name, options.runs, RATES)
    print("\n".join([f"{workdir}:", *table(curves)]), flush=True)
    write(curves, workdir / "curves.csv")
    draw(curves, workdir / "curves.png")
    logger = WandbLogger(**restored.config["wandb"], directory=workdir)
    record = restored.loggers.get("WandbLogger", {})
    logger.start(int(restored.state.step), restored.config, record)
    logger.show({"curves": workdir / "curves.png"})
    logger.finish()
    return curves


if __name__ == "__main__":
    main()
