"""Pictures of a run of FDS, in its workdir's `pictures` folder.

loss.png       the outer loss, and with `engine=forward` the largest tangent
NAME.png       a hyperparameter of several windows: its schedule over the inner run, one line per
               outer step, dark to bright, and the learned one, dashed; beside it, each window's
               value by outer step. A hyperparameter of one window: its value by outer step
tangents.png   |d theta_t / d lambda| in the next outer step, against the inner step t, one line
               per window; the largest and the last norm of each are in tangents.md

`metalearn train` draws the pictures of `config.pictures` at the end of a run and logs them to W&B,
except the tangents of segmented unrolls; `metalearn draw --workdir=runs/fds` draws all of them from
the latest checkpoint.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from metalearn import Tasks, Trainer
from metalearn._utils.checks import pick
from metalearn.algorithms import FDS
from metalearn.experiments.pictures import schedules, tangents
from metalearn.train_state import TrainState

FOLDER = "pictures"
Drawing = Callable[[pathlib.Path, Trainer, TrainState, Tasks], list[pathlib.Path]]


def _schedules(
    workdir: pathlib.Path, trainer: Trainer, state: TrainState, *_: Any
) -> list[pathlib.Path]:
    assert isinstance(trainer.algorithm, FDS)
    learned = trainer.algorithm.schedules(trainer.learned(state))
    figures = schedules.figures(schedules.read(workdir), trainer.algorithm, learned)
    return [_saved(workdir, name, figure) for name, figure in figures.items()]


def _tangents(
    workdir: pathlib.Path, trainer: Trainer, state: TrainState, tasks: Tasks
) -> list[pathlib.Path]:
    if jax.process_count() > 1 or trainer.segment is not None:
        raise ValueError(
            "they take an outer step in one program of one process: `metalearn draw "
            f"--workdir={workdir}`, by itself."
        )
    lines, step = tangents.norms(trainer, state, tasks), int(state.step) + 1
    table = workdir / FOLDER / "tangents.md"
    table.write_text("\n".join(tangents.table(lines, step)) + "\n")
    return [_saved(workdir, "tangents", tangents.figure(lines, step)), table]


def _saved(workdir: pathlib.Path, name: str, figure: Any) -> pathlib.Path:
    path = workdir / FOLDER / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path


KINDS: dict[str, Drawing] = {"schedules": _schedules, "tangents": _tangents}


def check(kinds: Sequence[str], algorithm: Any) -> None:
    """Raise ValueError for an unknown kind of picture, or an algorithm that has no pictures."""
    for kind in kinds:
        pick(KINDS, str(kind), "picture")
    if kinds and not isinstance(algorithm, FDS):
        raise ValueError(
            f"There are pictures of runs that learn schedules, by FDS, and this algorithm is "
            f"{type(algorithm).__name__}."
        )


def draw(
    kind: str, workdir: pathlib.Path, trainer: Trainer, state: TrainState, tasks: Tasks
) -> list[pathlib.Path]:
    """Draw pictures of a run; return their files.

    Args:
      kind: of KINDS. "tangents" computes one hypergradient by forward mode, in one program.
      workdir: of the run, with its metrics.jsonl.
      trainer: of the run.
      state: the current state of the run.
      tasks: the training tasks.

    Raises:
      ValueError: if `check` refuses the kind, nothing was logged, matplotlib is not installed, or
        "tangents" would need segmented unrolls or several processes.
    """
    check([kind], trainer.algorithm)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('pictures need matplotlib: pip install "metalearn[plots]".')
    (workdir / FOLDER).mkdir(exist_ok=True)
    return KINDS[kind](workdir, trainer, state, tasks)
