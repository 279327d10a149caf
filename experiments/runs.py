"""A run of the command line, read back: its algorithm, trainer, data, state and eta.

    run = metalearn.load_run("runs/omniglot")
    run.trainer.evaluate(run.eta, run.splits.test, jax.random.key(1))

Everything is built again from the config that the run's checkpoints hold. The data are read when
they are asked for; what was learned needs none (`metalearn.experiments.run_data`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn import Algorithm, Trainer
from metalearn.checkpoints.manager import Checkpoints
from metalearn.checkpoints.store import UnreadableError
from metalearn.experiments import build, run_data
from metalearn.experiments.cli import import_paths
from metalearn.train_state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A checkpoint of a run, and what it was trained with.

    Args:
      workdir: of the run.
      config: as JSON values.
      trainer: with the algorithm, the engine and the outer optimizer.
      sizes: what the model is sized by: shapes of its inputs [1, ...], and its outputs.
      restored: the state of the checkpoint, without inner states carried by truncated unrolls.
      loggers: the record of each logger, by class name.
      folders: in which relative paths of the data may begin, the likeliest first.
      tasks: what `splits` returns, where the data have been read already; None: they have not.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    trainer: Trainer
    sizes: build.Sizes
    restored: TrainState = dataclasses.field(repr=False)
    loggers: dict[str, Any] = dataclasses.field(repr=False)
    folders: Sequence[pathlib.Path] = dataclasses.field(repr=False)
    tasks: build.Splits | None = dataclasses.field(default=None, repr=False)

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the run."""
        return self.trainer.algorithm

    @property
    def eta(self) -> Any:
        """What was learned, to evaluate and to export: `trainer.learned(state)`."""
        return self.trainer.learned(self.restored)

    @property
    def step(self) -> int:
        """How many outer steps are taken."""
        return int(self.restored.step)

    @functools.cached_property
    def splits(self) -> build.Splits:
        """The tasks: `splits.train`, `splits.validation` (may be None) and `splits.test`.

        They are read when they are first asked for. The current folder of the process is then, for
        the moment, the one in which the run was started.

        Raises:
          ValueError: if the data cannot be read; it names them.
        """
        return self.tasks or read_data(self.workdir, self.config, self.folders)

    @functools.cached_property
    def state(self) -> TrainState:
        """Where the run stands, to train it further.

        Of truncated unrolls this includes the inner states that they carry, whose shapes are those
        of the tasks: it reads the data (`splits`).

        Raises:
          ValueError: if the data are needed and cannot be read; if the checkpoint was deleted
            meanwhile.
        """
        if self.trainer.truncation is None:
            return self.restored
        opened = open_checkpoints(self.workdir, self.config)
        try:
            return opened.restore_state(self.trainer.shapes(self.splits.train), self.step)
        except UnreadableError as error:
            raise ValueError(
                f"The checkpoint of outer step {self.step} of {self.workdir} was deleted after "
                "the run was read: another process trains it. Read the run again."
            ) from error
        finally:
            opened.close()


def load_run(
    workdir: str | os.PathLike[str], best: bool = False, allow_imports: bool = False
) -> Run:
    """Read the newest checkpoint of a run, or the best one, and build what it was trained with.

    The data are not read, but for `Run.splits`.

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
    known = run_data.read(workdir, config["dataset"])
    trusted = allow_imports or import_paths.known_in(known.folder, config)
    folders = known.folders() if trusted else [pathlib.Path.cwd()]
    tasks = None if known.sizes else read_data(workdir, config, folders, described=False)
    sizes = known.sizes if tasks is None else tasks.sizes
    assert sizes is not None
    layout = build.evaluation_layout(config)
    trainer = run_data.built(folders, lambda: build.trainer(config, sizes, layout))
    checkpoints = open_checkpoints(workdir, config)  # now: a run may be training beside us
    state, now = checkpoints.read(trainer.shapes(carried=False), best, carried=False)
    checkpoints.close()
    at = workdir.absolute()
    return Run(at, config, trainer, sizes, state, now["loggers"], folders, tasks)


def read_data(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    folders: Sequence[pathlib.Path],
    described: bool = True,
) -> build.Splits:
    """Return the tasks of a run's config; ValueError, which names the dataset, if it cannot.

    Args:
      workdir: of the run, for messages.
      config: of the run.
      folders: in which relative paths may begin.
      described: whether the workdir says the sizes of the data.
    """
    try:
        return run_data.built(folders, lambda: build.splits(config["dataset"]))
    except (ValueError, OSError) as error:
        message = run_data.missing(workdir, config, folders, described)
        raise ValueError(f"{message}\n{error}") from error


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
