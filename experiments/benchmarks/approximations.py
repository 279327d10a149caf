"""What an approximate meta-gradient costs in the end: meta-training with each, by the same seeds.

    python -m metalearn.experiments.benchmarks.approximations
    python -m metalearn.experiments.benchmarks.approximations --config=fds_digits --seeds=3

`metalearn compare` says how far an approximation is from the exact meta-gradient of one outer step.
A wrong length may be nothing to an outer optimizer that normalises, and a small bias may add up
over a run. So a packaged config is meta-trained here, by its own exact engine and by every
approximation that serves it, with everything else the same: initial eta, tasks, inner loops and
outer optimizer. The number of outer steps is what two cores do in minutes (`SETTINGS`).

The score is that of validation tasks, the same for all contenders of a seed; the test split is not
used. Differences from the exact engine are paired by seed, with their 95% interval (Student's t).
"none" is the initial eta: what there is to gain. A contender that refuses the config is named below
the table with its reason. So is `ES` where eta has more than `MOST` entries: the cosine of its
estimate is about the root of pairs / |eta|.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from metalearn import ES, SAMA, Implicit, MetaGradient, Trainer, Truncated
from metalearn._utils.checks import first_line, pick
from metalearn.algorithms import MAML
from metalearn.diagnostics.comparison import REFUSALS, inner_steps
from metalearn.engines import ApproximationWarning
from metalearn.experiments import build
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.configs import fds_digits, loss_weights_shakespeare, maml_omniglot
from metalearn.planning.step_cost import short_repr
from metalearn.training.faults import Faults, NonFiniteError


class Setting(NamedTuple):
    """How a config is trained here.

    Args:
      config: returns it.
      steps: outer steps.
      tasks: validation tasks of a score.
      metrics: what is reported of them.
    """

    config: Callable[[], Any]
    steps: int
    tasks: int
    metrics: tuple[str, ...]


SETTINGS = {
    "maml_omniglot": Setting(maml_omniglot.get_config, 200, 200, ("loss", "accuracy")),
    "fds_digits": Setting(fds_digits.get_config, 10, 4, ("loss", "accuracy")),
    "loss_weights_shakespeare": Setting(
        loss_weights_shakespeare.get_config, 40, 2, ("loss", "weight_auc")
    ),
}
MOST = 10_000  # entries of eta for `ES`
EXACT, NONE = "exact", "none"  # contenders that are not approximations

Scores = Mapping[str, float]  # by metric; "seconds" is there too


def contenders(trainer: Trainer, steps: int, entries: int) -> dict[str, Trainer]:
    """Return the trainers that are compared, by name; the first is exact.

    Args:
      trainer: of the config.
      steps: T, inner steps.
      entries: of eta.
    """
    lasts = sorted({k for k in (1, steps // 10, steps // 2) if 1 <= k < steps})
    engines: list[MetaGradient] = [
        *(Truncated(last) for last in lasts),
        *(SAMA(), Implicit(), Implicit(variables="params")),
        *([ES(pairs=8)] if entries <= MOST else []),
    ]
    chosen = {EXACT: trainer}
    if isinstance(trainer.algorithm, MAML):
        first_order = dataclasses.replace(trainer.algorithm, first_order=True)
        chosen["first order"] = dataclasses.replace(trainer, algorithm=first_order)
    return chosen | {short_repr(e): dataclasses.replace(trainer, engine=e) for e in engines}


def trained(trainer: Trainer, splits: Any, steps: int, faults: Faults, seed: int) -> Any:
    """Meta-train with a seed, and return (the eta that was learned, seconds)."""
    key, began = key_of(seed), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)  # it is what is measured
        state = trainer.fit(splits.train, steps, key=key, faults=faults, progress=False)
    return jax.block_until_ready(trainer.learned(state)), time.perf_counter() - began


def evaluated(trainer: Trainer, eta: Any, splits: Any, setting: Setting, seed: int) -> Scores:
    """Return the scores of an eta on the validation tasks of a seed; no engine changes them."""
    key = jax.random.fold_in(key_of(seed), 1)
    found = trainer.evaluate(eta, splits.validation, key, setting.tasks)
    return {name: found[name].mean for name in setting.metrics}


def row(name: str, found: Sequence[Scores], exact: Sequence[Scores], metrics: Sequence[str]) -> str:
    """Return a line of the table: of each metric the mean, and the paired difference."""
    cells = [f"`{name}`" if "(" in name else name]
    for metric in metrics:
        values = [each[metric] for each in found]
        differences = [a - b[metric] for a, b in zip(values, exact, strict=True)]
        cells += [interval(values), "" if name == EXACT else interval(differences)]
    seconds = [each["seconds"] for each in found if "seconds" in each]
    cells.append(f"{statistics.median(seconds):.1f}" if seconds else "")
    return f"| {' | '.join(cells)} |"


def compare(name: str, setting: Setting, seeds: Sequence[int]) -> None:
    """Train a config in all ways, and print the table as it comes."""
    config = build.to_json(setting.config())
    splits = build.splits(config["dataset"])
    trainer = build.trainer(config, splits)
    steps = inner_steps(trainer, splits.train, key_of(0))
    faults = Faults(**config["faults"])
    print(
        f"\n{name}: {setting.steps} outer steps of {trainer.tasks_per_step} tasks of {steps} inner "
        f"steps, {len(seeds)} seeds, {setting.tasks} validation tasks; jax {jax.__version__}\n"
    )
    columns = [cell for metric in setting.metrics for cell in (metric, "against exact")]
    print(f"| meta-gradient | {' | '.join(columns)} | seconds |\n|{'---|' * (len(columns) + 2)}")
    exact: list[Scores] = []
    eta = jax.eval_shape(trainer.algorithm.init, key_of(0))
    entries = sum(leaf.size for leaf in jax.tree.leaves(eta))
    refused = [] if entries <= MOST else [f"ES(pairs=8): left out, eta has {entries:,} entries"]
    for each, contender in contenders(trainer, steps, entries).items():
        try:
            ends = [trained(contender, splits, setting.steps, faults, seed) for seed in seeds]
        except (*REFUSALS, NonFiniteError) as error:
            refused.append(f"{each}: {first_line(error)}")
            continue
        found: list[Scores] = [
            {**evaluated(trainer, eta, splits, setting, seed), "seconds": seconds}
            for seed, (eta, seconds) in zip(seeds, ends, strict=True)
        ]
        exact = exact or found
        print(row(each, found, exact, setting.metrics), flush=True)
    start = [
        evaluated(trainer, trainer.init(key_of(s), splits.train).eta, splits, setting, s)
        for s in seeds
    ]
    print(row(NONE, start, exact, setting.metrics))
    print("".join(f"\n{line}" for line in refused), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on the configs that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="outer steps; by default those of `SETTINGS`")
    options = parser.parse_args(argv)
    for name in options.config:
        setting = pick(SETTINGS, name, "config of this benchmark")
        if options.steps is not None:
            setting = setting._replace(steps=options.steps)
        compare(name, setting, range(options.seeds))


if __name__ == "__main__":
    main()
