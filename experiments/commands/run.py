"""One run: from a config and a workdir to a trained eta and its score on test tasks.

workdir/checkpoints/   the whole train state, by Orbax, and what it was made of
workdir/metrics.jsonl  what was logged, one line each
workdir/test.json      the score on test tasks: mean, 95% interval, tasks
workdir/pictures/      those that the config names; see metalearn.experiments.commands.pictures
workdir/wandb/         the W&B run, unless disabled

A workdir is held by one process at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from metalearn import Tasks, Trainer
from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line
from metalearn._utils.intervals import Estimate
from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments import build
from metalearn.experiments.commands import pictures
from metalearn.experiments.commands import plan as auto
from metalearn.loggers import ConsoleLogger, JsonlLogger, Logger, WandbLogger
from metalearn.sharding.distributed import is_first, say
from metalearn.train_state import TrainState
from metalearn.training.faults import Faults
from metalearn.training.signals import asked_to_stop

RHYTHM = ("eval_every", "eval_tasks", "log_every", "check_every")
TEST = 2**31  # folded into the seed's key for test tasks; training never draws from it


def train(
    config: Any, workdir: pathlib.Path, progress: bool = True, allow_change: bool = False
) -> dict[str, Estimate]:
    """Train, or go on training, in `workdir`; evaluate on test tasks; write both down.

    Raises:
      Interrupted: where a signal asked to stop, once the run is saved.
    """
    plain = auto.settled(build.to_json(config), _checkpoints(workdir))
    if plain["checkpoint_best"] and not plain["eval_every"]:
        raise ValueError(
            f"checkpoint_best={plain['checkpoint_best']!r} is judged by evaluations on the way, "
            "and eval_every is 0. Set it, to outer steps from one to the next."
        )
    with held(workdir) if is_first() else contextlib.nullcontext():
        return _train(plain, workdir, progress, allow_change)


def _train(
    plain: dict[str, Any], workdir: pathlib.Path, progress: bool, allow_change: bool
) -> dict[str, Estimate]:
    layout = build.layout(plain)
    if left := build.idle_devices(plain, layout):
        say(left)
    splits = build.splits(plain["dataset"])
    if plain["eval_every"] and splits.validation is None:
        raise ValueError(
            f"eval_every={plain['eval_every']} evaluates on tasks that are not trained on, and "
            "dataset.held_out=0 leaves none. Set it, to a share such as 0.1, or set eval_every=0."
        )
    trainer = build.trainer(plain, splits, layout)
    trainer.check_memory(splits.train, _evaluated(plain, splits))
    pictures.check(plain.get("pictures") or (), trainer.algorithm)
    checkpoints = _open(workdir, plain, allow_change)
    checkpoints.check_config()
    ended = checkpoints.latest() == plain["steps"] and (workdir / "test.json").exists()
    if ended:
        say(f"The run in {workdir} has taken its {plain['steps']} outer steps: evaluating it.")
        loggers: list[Logger] = [ConsoleLogger()] if is_first() else []  # nothing new to log
    else:
        loggers = _loggers(plain, workdir)
    if (mode := trainer.algorithm.model_mode()) and not ended:
        say(f"model: {mode}.")
    key = build.key_of(plain["seed"])
    try:
        state = trainer.init(key, splits.train)
        if plain["health"] and checkpoints.latest() is None:
            check(trainer, state, splits.train)
        with asked_to_stop() as asked:
            state = trainer.fit(
                splits.train,
                plain["steps"],
                state=state,
                loggers=loggers,
                checkpoints=checkpoints,
                held_out=splits.validation,
                faults=Faults(**plain["faults"]),
                asked_to_stop=asked,
                progress=progress,
                **{name: plain[name] for name in RHYTHM},
            )
    finally:
        with disk.forgiven(f"The last checkpoint in {workdir}"):
            checkpoints.close()
    estimates: dict[str, Estimate] = {}
    try:
        estimates = test(trainer, state, splits, plain["seed"], plain["test_tasks"])
        if is_first() and not ended:
            _show(plain.get("pictures") or (), workdir, trainer, state, splits, loggers)
    finally:
        for logger in loggers:
            with disk.forgiven(f"What {type(logger).__name__} had left"):
                logger.finish(estimates)
    if is_first():
        with disk.forgiven(f"{workdir / 'test.json'}"):
            _write(workdir / "test.json", estimates)
    return estimates


def _evaluated(plain: dict[str, Any], splits: build.Splits) -> list[Tasks]:
    """Return the tasks that a run evaluates on."""
    on_the_way = [splits.validation] if plain["eval_every"] and splits.validation else []
    return [*on_the_way, splits.test]


class Restored(NamedTuple):
    """The newest checkpoint of a run, and what it was trained with."""

    config: dict[str, Any]
    trainer: Trainer
    splits: build.Splits
    state: TrainState
    loggers: dict[str, Any]  # the record of each, by class name


def restore(workdir: pathlib.Path, best: bool = False) -> Restored:
    """Read the newest checkpoint of a run, or the best; ValueError where there is none."""
    if not _checkpoints(workdir).is_dir():
        raise ValueError(
            f"There is no run in {workdir}: no {_checkpoints(workdir)}. Train one with "
            f"`metalearn train --config=NAME --workdir={workdir}`."
        )
    opened = Checkpoints(_checkpoints(workdir))
    record = opened.record()
    inside = opened.within_at() if record is None else None
    opened.close()
    if record is None:
        where = f": it is {inside[1]} inner steps into its first outer step" if inside else ""
        raise ValueError(f"The run in {workdir} has no checkpoint yet{where}. Train it further.")
    if not {"dataset", "algorithm"} <= record["config"].keys():
        raise ValueError(
            f"The run in {workdir} was not trained by `metalearn train`: its checkpoints have no "
            "config of one. Read its state in Python, with `Checkpoints(...).read(shapes)`."
        )
    splits = build.splits(record["config"]["dataset"])
    layout = build.evaluation_layout(record["config"])
    trainer = build.trainer(record["config"], splits, layout)
    checkpoints = _open(workdir, record["config"])  # now: a run may be training beside us
    state, now = checkpoints.read(trainer.shapes(splits.train), best)
    checkpoints.close()
    return Restored(record["config"], trainer, splits, state, now["loggers"])


def evaluate(workdir: pathlib.Path, tasks: int, best: bool = False) -> dict[str, Estimate]:
    """Evaluate the newest checkpoint of a run, or the best, with the config it was trained by."""
    config, trainer, splits, state, _ = restore(workdir, best)
    estimates = test(trainer, state, splits, config["seed"], tasks)
    say(f"{workdir}, outer step {int(state.step)}, on test tasks:")
    if is_first():
        ConsoleLogger().finish(estimates)
    return estimates


def export(workdir: pathlib.Path, out: pathlib.Path | None = None, best: bool = False) -> None:
    """Write what a run has learned, where that is of use on its own: see `Algorithm.export`.

    An optimizer, as a file that `load_optimizer` reads (optimizer.safetensors), or schedules, as
    one for `load_schedules` (schedules.json).
    """
    restored = restore(workdir, best)
    learner, step = restored.trainer.algorithm, int(restored.state.step)
    if learner.export_name is None:
        raise ValueError(
            f"The run in {workdir} learned no optimizer and no schedules: its algorithm is "
            f"{type(learner).__name__}. Its eta is in the train state of its checkpoints."
        )
    out = out or workdir / learner.export_name
    with named(out):
        what = learner.export(restored.trainer.learned(restored.state), out)
    print(f"{out}: {what} of outer step {step}.")


def draw(workdir: pathlib.Path) -> None:
    """Draw all pictures of a run at its newest checkpoint; print where each kind of them is."""
    _, trainer, splits, state, _ = restore(workdir)
    uncut = dataclasses.replace(trainer, segment=None)
    kinds = list(trainer.algorithm.pictures())
    pictures.check(kinds or ["pictures"], trainer.algorithm)
    for kind in kinds:
        with named(workdir / pictures.FOLDER):
            paths = pictures.draw(kind, workdir, uncut, state, splits.train)
        print("\n".join(map(str, paths)), flush=True)


def check(trainer: Trainer, state: TrainState, tasks: Tasks) -> None:
    """Print what a health check finds, one line where that is nothing; HealthError if bad."""
    report = trainer.check_health(state, tasks)
    report.raise_errors()
    say(str(report))


def test(
    trainer: Trainer, state: TrainState, splits: build.Splits, seed: int, tasks: int
) -> dict[str, Estimate]:
    """Evaluate on test tasks; the same seed draws the same ones."""
    key = jax.random.fold_in(build.key_of(seed), TEST)
    return trainer.evaluate(trainer.learned(state), splits.test, key, tasks)


def _show(
    kinds: Sequence[str],
    workdir: pathlib.Path,
    trainer: Trainer,
    state: TrainState,
    splits: build.Splits,
    loggers: Sequence[Logger],
) -> None:
    """Draw a run that has ended, and show it to the loggers. That fails no run."""
    for kind in kinds:
        try:
            drawn = pictures.draw(kind, workdir, trainer, state, splits.train)
            shown = {
                f"{pictures.FOLDER}/{path.stem}": path for path in drawn if path.suffix == ".png"
            }
            say(f"Pictures in {workdir / pictures.FOLDER}: {', '.join(p.name for p in drawn)}.")
            for logger in loggers:
                logger.show(shown)
        except Exception as error:  # of a device out of memory, matplotlib, W&B: all the same here
            say(f"The {kind} are not drawn: {first_line(error)}")


def _loggers(config: dict[str, Any], workdir: pathlib.Path) -> list[Logger]:
    if not is_first():
        return []
    wandb = WandbLogger(**config["wandb"], directory=workdir)
    return [ConsoleLogger(), JsonlLogger(workdir / "metrics.jsonl"), wandb]


def _open(workdir: pathlib.Path, config: dict[str, Any], allow_change: bool = False) -> Checkpoints:
    return Checkpoints(
        _checkpoints(workdir),
        config,
        config["checkpoint_every"],
        config.get("checkpoint_keep", 2),
        config.get("checkpoint_best"),
        allow_change,
        config.get("checkpoint_within", 0),
    )


def _checkpoints(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "checkpoints"


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
    """Name what a failing disk has refused: Python's own error does not."""
    try:
        yield
    except OSError as error:
        if not disk.at_fault(error):
            raise
        raise OSError(
            f"{path} could not be written ({first_line(error)}). Make room, or write elsewhere."
        ) from error


def _write(path: pathlib.Path, estimates: dict[str, Estimate]) -> None:
    rows = {name: value._asdict() for name, value in estimates.items()}
    disk.write(path, strict_json.dumps(rows, indent=2) + "\n")


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Make a workdir and hold it. The system lets go of it however the process ends.

    Raises:
      ValueError: where it cannot be written to, or another run is being trained in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("w")
    except OSError as error:
        raise ValueError(
            f"The run is to live in {workdir}, which cannot be written to ({error.strerror}). "
            "Name another place: --workdir=runs/my_run."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is training in {workdir}. Wait until it has ended, or name "
                "another workdir."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
