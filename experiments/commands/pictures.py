"""Drawing the pictures of a run: its learning curves, and those of its algorithm.

When a run ends, `metalearn train` draws "curves" and what `config.pictures` names of
`Algorithm.pictures`, and logs them to W&B, but for what takes an outer step in one program where
the run takes several; `metalearn draw --workdir=runs/fds` draws all, whenever there is a
checkpoint. They are saved in the workdir's `pictures` folder.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metalearn import Algorithm, Tasks, Trainer
from metalearn._utils.checks import pick
from metalearn.experiments.report.figures import curves_figure
from metalearn.experiments.report.run_logs import log_of
from metalearn.train_state import TrainState

FOLDER = "pictures"


def check(kinds: Sequence[str], algorithm: Algorithm) -> None:
    """Raise ValueError where there is no such picture, or none of this algorithm."""
    for kind in kinds:
        pick(kinds_of(algorithm), str(kind), f"picture of {type(algorithm).__name__}")


def kinds_of(algorithm: Algorithm) -> dict[str, Callable[..., Mapping[str, Any]]]:
    """Return what draws each kind of picture of an algorithm: its own, and "curves" first."""
    return {"curves": _curves, **algorithm.pictures()}


def _curves(
    trainer: Trainer, state: TrainState, tasks: Tasks, workdir: pathlib.Path
) -> dict[str, Any]:
    """Draw the learning curves of the run in a workdir."""
    del trainer, state, tasks
    return {"curves.png": curves_figure(log_of(workdir, {}, {}))}


def draw(
    kind: str, workdir: pathlib.Path, trainer: Trainer, state: TrainState, tasks: Tasks
) -> list[pathlib.Path]:
    """Draw pictures of a run; return the files.

    Args:
      kind: "curves", or of `trainer.algorithm.pictures()`.
      workdir: of the run: its metrics.jsonl may be read.
      trainer: of the run.
      state: where it stands.
      tasks: that it trains on.

    Raises:
      ValueError: where `check` refuses the kind, or the algorithm cannot draw it.
    """
    check([kind], trainer.algorithm)
    figures = kinds_of(trainer.algorithm)[kind](trainer, state, tasks, workdir)
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for name, content in figures.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            content.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]
