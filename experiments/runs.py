"""A run of the command line, read back: its algorithm, trainer, data, state and eta.

    run = metalearn.load_run("runs/omniglot")
    run.trainer.evaluate(run.eta, run.splits.test, jax.random.key(1))

Everything is built again from the config that the run's checkpoints hold.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from metalearn import Algorithm, Trainer
from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments import build
from metalearn.experiments.cli import import_paths
from metalearn.train_state import TrainState


class Run(NamedTuple):
    """A checkpoint of a run, and what it was trained with.

    config: as JSON values.
    trainer: with the algorithm, the engine and the outer optimizer.
    splits: the tasks: `splits.train`, `splits.validation` (may be None) and `splits.test`.
    state: where the run stands; `state.step` outer steps are taken.
    loggers: the record of each logger, by class name.
    """

    config: dict[str, Any]
    trainer: Trainer
    splits: build.Splits
    state: TrainState
    loggers: dict[str, Any]

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the run."""
        return self.trainer.algorithm

    @property
    def eta(self) -> Any:
        """What was learned, to evaluate and to export: `trainer.learned(state)`."""
        return self.trainer.learned(self.state)


def load_run(
    workdir: str | os.PathLike[str], best: bool = False, allow_imports: bool = False
) -> Run:
    """Read the newest checkpoint of a run, or the best one, and build what it was trained with.

    Args:
      workdir: of the run: `metalearn train --workdir=...`.
      best: the best checkpoint, of a config with `checkpoint_best`; not the newest.
      allow_imports: import what the run's config names by import path, though no run on this
        machine has been trained with it. It executes code.

    Raises:
      ValueError: if there is no run or no checkpoint, or it names code that is not allowed.
    """
    workdir = pathlib.Path(workdir)
    if not checkpoints_of(workdir).is_dir():
        raise ValueError(
            f"There is no run in {workdir}: no {checkpoints_of(workdir)}. Train one with "
            f"`metalearn train --config=NAME --workdir={workdir}`."
        )
    config = _config(workdir)
    import_paths.check_run(workdir, config, allow_imports)
    splits = build.splits(config["dataset"])
    trainer = build.trainer(config, splits, build.evaluation_layout(config))
    checkpoints = open_checkpoints(workdir, config)  # now: a run may be training beside us
    state, now = checkpoints.read(trainer.shapes(splits.train), best)
    checkpoints.close()
    return Run(config, trainer, splits, state, now["loggers"])


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the config in the newest checkpoint of a run."""
    record = newest_record(checkpoints_of(workdir))
    if record is None:
        opened = Checkpoints(checkpoints_of(workdir))
        inside = opened.within_at()
        opened.close()
        where = f": it is at {inside.where} of its first outer step" if inside else ""
        raise ValueError(f"The run in {workdir} has no checkpoint yet{where}. Train it further.")
    if not {"dataset", "algorithm"} <= record["config"].keys():
        raise ValueError(
            f"The run in {workdir} was not trained by `metalearn train`: its checkpoints have no "
            "config of one. Read its state in Python, with `Checkpoints(...).read(shapes)`."
        )
    return record["config"]


def newest_record(checkpoints: pathlib.Path) -> dict[str, Any] | None:
    """Return the record of the newest checkpoint in a folder; None where there is none."""
    if not checkpoints.is_dir():
        return None
    opened = Checkpoints(checkpoints)
    record = opened.record()
    opened.close()
    return record


def checkpoints_of(workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of a run's checkpoints."""
    return workdir / "checkpoints"


def open_checkpoints(
    workdir: pathlib.Path, config: dict[str, Any], allow_change: bool = False
) -> Checkpoints:
    """Return the checkpoints of a run, as its config says that they are kept."""
    return Checkpoints(
        checkpoints_of(workdir),
        config,
        config["checkpoint_every"],
        config.get("checkpoint_keep", 2),
        config.get("checkpoint_best"),
        allow_change,
        config.get("checkpoint_within", 0),
    )
