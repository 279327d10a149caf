"""The lines that open and close a run: what is trained, with what, where, and what to do next.

metalearn 0.1.0
  algorithm  MAML, 1 inner step
  engine     MixedFlow()
  model      conv_net of linen, 29,829 parameters
  eta        29,829 meta-parameters
  data       digits (5-way 1-shot): train, validation and test tasks
  devices    1 x cpu
  workdir    runs/maml_digits
  W&B        auto: online where you are logged in, else offline
  resume     metalearn train --config=maml_digits --workdir=runs/maml_digits
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from metalearn import Trainer
from metalearn._utils import disk
from metalearn._utils.version import __version__
from metalearn.experiments import build
from metalearn.planning.step_cost import StepCosts, short_repr
from metalearn.sharding.distributed import is_first

WANDB = {
    "auto": "auto: online where you are logged in, else offline",
    "offline": "offline: `wandb sync` sends it later",
}


def show(title: str, rows: Mapping[str, str]) -> None:
    """Print a title and rows below it, in the first of several processes."""
    if is_first():
        print_rows(title, rows)


def print_rows(title: str, rows: Mapping[str, str]) -> None:
    """Print a title and rows below it: in colour in a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        width = max(map(len, rows))
        lines = [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
        disk.tell("\n".join(lines))
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"  [cyan]{name}[/cyan]", text)
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold]")
    console.print(table)


def opening(
    config: Mapping[str, Any],
    trainer: Trainer,
    splits: build.Splits,
    workdir: pathlib.Path,
    command: str | None,
) -> None:
    """Print what a run is about to do.

    Args:
      config: of the run, plain, with what `engine="auto"` chose.
      trainer: built from it.
      splits: its tasks.
      workdir: of the run.
      command: the command line that began the run; None: it was begun from Python.
    """
    rows = {
        "algorithm": f"{type(trainer.algorithm).__name__}, {_inner_steps(trainer, splits)}",
        "engine": short_repr(trainer.engine) + (", chosen by auto" if config.get("auto") else ""),
        "model": _model(config, splits),
        "mode": trainer.algorithm.model_mode(),
        "eta": f"{_size(trainer.algorithm.init):,} meta-parameters",
        "data": _data(config, splits),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "workdir": str(workdir),
        "W&B": WANDB.get(config["wandb"]["mode"], config["wandb"]["mode"]),
    }
    if command is not None:
        rows["resume"] = command
    show(f"metalearn {__version__}", {name: text for name, text in rows.items() if text})


def closing(trainer: Trainer, workdir: pathlib.Path) -> None:
    """Print what one may do with a finished run."""
    rows = {
        "evaluate": f"metalearn eval --workdir={workdir} --tasks=2000",
        "export": f"metalearn export --workdir={workdir}",
        "report": f"metalearn report {workdir}",
        "in Python": f"run = metalearn.load_run({str(workdir)!r})",
    }
    if trainer.algorithm.pictures():
        rows["draw"] = f"metalearn draw --workdir={workdir}"
    show("Next", rows)


def _inner_steps(trainer: Trainer, splits: build.Splits) -> str:
    steps = StepCosts(trainer, splits.train).inner_steps()
    unroll = "inner step" if trainer.truncation is None else "inner step of a truncated unroll"
    return f"{steps:,} {unroll}" if steps == 1 else f"{steps:,} {unroll.replace('step', 'steps')}"


def _model(config: Mapping[str, Any], splits: build.Splits) -> str:
    model = config.get("model") or {}
    if not model:
        return ""
    sized = build.sized_for(config["algorithm"], splits)
    size = _size(lambda key: build.model(model, sized).init(key)[0])
    library = f" of {model['library']}" if model.get("library") else ""
    return f"{model['name']}{library}, {size:,} parameters"


def _size(init: Any) -> int:
    """Return how many numbers `init` returns for a key."""
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _data(config: Mapping[str, Any], splits: build.Splits) -> str:
    names = ("train", "validation", "test")
    there = [name for name in names if getattr(splits, name) is not None]
    dataset = config["dataset"]
    shape = f" ({dataset['ways']}-way {dataset['shots']}-shot)" if "ways" in dataset else ""
    return f"{dataset['name']}{shape}: {', '.join(there[:-1])} and {there[-1]} tasks"
