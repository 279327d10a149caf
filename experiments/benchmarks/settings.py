r"""What a smoother setting of a packaged config costs: its metasmoothness beside the final loss.

    python -m metalearn.experiments.benchmarks.settings data_weights_digits \
        --try algorithm.optimizer.learning_rate=0.04 algorithm.optimizer.decay_steps=200

The config is meta-trained as it is and with the settings of each `--try`, by several seeds, and
evaluated on the validation split: the loss, its 95% interval (Student's t over seeds), and the
paired difference. The metasmoothness is that of `metalearn smooth --search`, along one random
direction at the first seed. A setting that is smoother becomes the default where the loss does not
rise by more than its interval.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from metalearn.diagnostics.smoothness import three_runs
from metalearn.experiments import build
from metalearn.experiments.benchmarks.reporting import interval
from metalearn.experiments.build import key_of
from metalearn.experiments.cli.arguments import packaged
from metalearn.experiments.commands.smooth import built, changed


def config_of(name: str) -> dict[str, Any]:
    """Return a packaged config as JSON values."""
    module = importlib.import_module(f"metalearn.experiments.configs.{name}")
    return build.to_json(module.get_config())


def setting(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of `KEY=VALUE` words by key.

    >>> setting(["model.hidden=(128,)", "algorithm.batch=200"])
    {'model.hidden': (128,), 'algorithm.batch': 200}
    """
    pairs = [word.partition("=") for word in words]
    return {key: ast.literal_eval(value) for key, _, value in pairs}


def smooth_of(plain: Mapping[str, Any], seed: int) -> float:
    """Return the metasmoothness of a config at its initial eta."""
    return float(three_runs(*built({**plain, "seed": seed})).metasmoothness)


def final_losses(plain: Mapping[str, Any], seeds: Sequence[int], tasks: int) -> list[float]:
    """Return the validation loss after meta-training, of each seed the mean over `tasks` tasks."""
    splits = build.splits(plain["dataset"])
    if splits.validation is None:
        raise ValueError(
            "This dataset has no validation split (dataset.held_out=0), and settings are not "
            "chosen by the test split. Take a config that holds out a share of the training split."
        )
    trainer = build.trainer(plain, splits, build.layout(plain))
    losses = []
    for seed in seeds:
        key = key_of(seed)
        state = trainer.fit(splits.train, plain["steps"], key=key, progress=False)
        eta = trainer.learned(state)
        metrics = trainer.evaluate(eta, splits.validation, jax.random.fold_in(key, 1), tasks)
        losses.append(metrics["loss"].mean)
        print(f"  seed {seed}: {losses[-1]:.4f}", flush=True)
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for the config as it is, and one for each `--try`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", choices=packaged())
    parser.add_argument("--try", nargs="+", action="append", default=[], dest="tried")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", type=int, default=10, help="validation tasks of each seed")
    options = parser.parse_args(argv)
    plain = config_of(options.config)
    lines: list[str] = []
    first: list[float] = []
    for words in [[], *options.tried]:
        name = " ".join(words) or "as it is"
        print(name, flush=True)
        config = changed(plain, setting(words))
        losses = final_losses(config, options.seeds, options.tasks)
        first = first or losses
        difference = interval([a - b for a, b in zip(losses, first, strict=True)])
        smooth = f"{smooth_of(config, options.seeds[0]):.3f}"
        lines.append(f"| {name} | {smooth} | {interval(losses)} | {difference if words else ''} |")
    columns = "setting", "metasmoothness", "validation loss", "minus that of the first"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print("\n".join(lines))
    print(f"\nseeds {options.seeds}, {os.cpu_count()} cores, jax {jax.__version__}")


if __name__ == "__main__":
    main()
