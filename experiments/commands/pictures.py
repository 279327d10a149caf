"""Drawing the pictures of a run, those that its algorithm has (`Algorithm.pictures`).

`metalearn train` draws what `config.pictures` names when a run ends, and logs it to W&B, but for
what takes an outer step in one program where the run takes several; `metalearn draw
--workdir=runs/fds` draws all, whenever there is a checkpoint. They are saved in the workdir's
`pictures` folder.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Sequence

from metalearn import Algorithm, Tasks, Trainer
from metalearn._utils.checks import pick
from metalearn.train_state import TrainState

FOLDER = "pictures"


def check(kinds: Sequence[str], algorithm: Algorithm) -> None:
    """Raise ValueError where there is no such picture, or none of this algorithm."""
    drawn = algorithm.pictures()
    if kinds and not drawn:
        raise ValueError(
            f"There are pictures of runs that learn schedules, by FDS, and this algorithm is "
            f"{type(algorithm).__name__}, whose `pictures()` are none."
        )
    for kind in kinds:
        pick(drawn, str(kind), "picture")


def draw(
    kind: str, workdir: pathlib.Path, trainer: Trainer, state: TrainState, tasks: Tasks
) -> list[pathlib.Path]:
    """Draw pictures of a run; return the files.

    Args:
      kind: of `trainer.algorithm.pictures()`.
      workdir: of the run: its metrics.jsonl may be read.
      trainer: of the run.
      state: where it stands.
      tasks: that it trains on.

    Raises:
      ValueError: where `check` refuses the kind, there is no matplotlib, or the algorithm cannot
        draw it.
    """
    check([kind], trainer.algorithm)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('pictures need matplotlib: pip install "metalearn-jax[plots]".')
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    drawn = trainer.algorithm.pictures()[kind](trainer, state, tasks, workdir)
    for name, content in drawn.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            content.savefig(folder / name, dpi=120)
    return [folder / name for name in drawn]
