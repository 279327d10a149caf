"""One run: from a config and a workdir to a trained eta and its score on test tasks.

workdir/checkpoints/   the whole train state, by Orbax, and what it was made of
workdir/config.json    the config, every key of it
workdir/data.json      what reading the run needs of the data; see metalearn.experiments.run_data
workdir/versions.json  of Python and the libraries, when the run last went on
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
from typing import Any

import jax

from metalearn import Replay, Tasks, Trainer
from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line
from metalearn._utils.intervals import Estimate
from metalearn.checkpoints.manager import Checkpoints
from metalearn.checkpoints.record import versions
from metalearn.eta_file import save_eta
from metalearn.experiments import build, run_data
from metalearn.experiments.cli import import_paths
from metalearn.experiments.commands import pictures, smooth, summary
from metalearn.experiments.commands import plan as auto
from metalearn.experiments.runs import checkpoints_of, load_run, open_checkpoints
from metalearn.loggers import ConsoleLogger, JsonlLogger, Logger, WandbLogger
from metalearn.sharding.distributed import is_first, say
from metalearn.train_state import TrainState
from metalearn.training.faults import Faults
from metalearn.training.signals import asked_to_stop

RHYTHM = ("eval_every", "eval_tasks", "log_every", "check_every")
TEST = 2**31  # folded into the seed's key for test tasks; training never draws from it


def train(
    config: Any,
    workdir: pathlib.Path,
    progress: bool = True,
    allow_change: bool = False,
    budget: int | None = None,
    command: str | None = None,
    test_tasks: bool = True,
    tolerance: float | None = None,
) -> dict[str, Estimate]:
    """Train, or go on training, in `workdir`; evaluate on test tasks; write both down.

    Args:
      config: of a packaged config, or of one's own.
      workdir: of the run.
      progress: show a progress bar.
      allow_change: resume though the config is another.
      budget: bytes that `engine="auto"` chooses an engine for; None: the memory of the device.
      command: the command line that begins and resumes the run, to be printed.
      test_tasks: evaluate on test tasks at the end. Trials of a sweep do not: they are compared on
        validation tasks, and the score of the best on test tasks is `metalearn eval`'s.
      tolerance: the relative error within which `engine="auto"` chooses the fastest engine; None:
        an exact one.

    Raises:
      Interrupted: where a signal asked to stop, once the run is saved.
    """
    plain = build.to_json(config)
    build.check_keys(plain)
    import_paths.remember(plain)
    plain = auto.settled(plain, checkpoints_of(workdir), budget, tolerance)
    if plain["checkpoint_best"] and not plain["eval_every"]:
        raise ValueError(
            f"checkpoint_best={plain['checkpoint_best']!r} is judged by evaluations in training, "
            "and eval_every is 0. Set it, to outer steps from one to the next."
        )
    with held(workdir) if is_first() else contextlib.nullcontext():
        return _train(plain, workdir, progress, allow_change, command, test_tasks)


@contextlib.contextmanager
def _without_score(workdir: pathlib.Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Take the test score away, of fewer outer steps; put it back where no step is taken."""
    path, before = workdir / "test.json", checkpoints.latest()
    if not is_first() or not path.is_file():
        yield
        return
    score = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        if checkpoints.latest() == before:
            disk.write(path, score)


def _train(
    plain: dict[str, Any],
    workdir: pathlib.Path,
    progress: bool,
    allow_change: bool,
    command: str | None,
    test_tasks: bool,
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
    checkpoints = open_checkpoints(workdir, plain, allow_change)
    checkpoints.check_config()
    ended = checkpoints.latest() == plain["steps"] and (workdir / "test.json").exists()
    if ended:
        say(f"The run in {workdir} has taken its {plain['steps']} outer steps: evaluating it.")
        loggers: list[Logger] = [ConsoleLogger()] if is_first() else []  # nothing new to log
    else:
        summary.opening(plain, trainer, splits, workdir, command)
        loggers = _loggers(plain, workdir)
        _write_config(workdir, plain, splits)
    key = build.key_of(plain["seed"])
    try:
        state = trainer.init(key, splits.train)
        if plain["health"] and checkpoints.latest() is None:
            check(trainer, state, splits.train)
            if rough := smooth.warning(plain, trainer, state, splits.train):
                say(f"Warning: {rough}")
        with asked_to_stop() as asked, _without_score(workdir, checkpoints):
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
        if test_tasks:
            estimates = test(trainer, state, splits, plain["seed"], plain["test_tasks"])
        if is_first() and test_tasks:
            with disk.forgiven(f"{workdir / 'test.json'}"):
                _write(workdir / "test.json", estimates)
        if is_first() and not ended:
            kinds = (*(["curves"] if plain["log_every"] else []), *(plain.get("pictures") or ()))
            _show(kinds, workdir, trainer, state, splits, loggers)
    finally:
        for logger in loggers:
            with disk.forgiven(f"What {type(logger).__name__} had left"):
                logger.finish(estimates)
    if is_first():
        summary.closing(trainer, workdir)
    return estimates


def _write_config(workdir: pathlib.Path, plain: dict[str, Any], splits: build.Splits) -> None:
    """Write the config, the versions, and what reading the run needs of its data."""
    if is_first():
        with disk.forgiven(f"{workdir / run_data.FILE}"):
            run_data.write(workdir, plain["dataset"], splits.sizes)
        for name, values in {"config.json": plain, "versions.json": versions()}.items():
            with disk.forgiven(f"{workdir / name}"):
                disk.write(workdir / name, strict_json.dumps(values, indent=2) + "\n")


def _evaluated(plain: dict[str, Any], splits: build.Splits) -> list[Tasks]:
    """Return the tasks that a run evaluates on."""
    on_the_way = [splits.validation] if plain["eval_every"] and splits.validation else []
    return [*on_the_way, splits.test]


def evaluate(
    workdir: pathlib.Path, tasks: int, best: bool = False, allow_imports: bool = False
) -> dict[str, Estimate]:
    """Evaluate the newest checkpoint of a run, or the best, with the config it was trained by."""
    run = load_run(workdir, best, allow_imports)
    estimates = test(run.trainer, run.restored, run.splits, run.config["seed"], tasks)
    say(f"{workdir}, outer step {run.step}, on test tasks:")
    if is_first():
        ConsoleLogger().finish(estimates)
    return estimates


def export(
    workdir: pathlib.Path,
    out: pathlib.Path | None = None,
    best: bool = False,
    allow_imports: bool = False,
) -> None:
    """Write what a run has learned to a file.

    An optimizer, as a file that `load_optimizer` reads (optimizer.safetensors); schedules, as one
    for `load_schedules` (schedules.json); what an algorithm of the user's own writes
    (`Algorithm.export`); and any other eta as one for `metalearn.load_eta` (eta.safetensors).
    """
    run = load_run(workdir, best, allow_imports)
    learner, step = run.algorithm, run.step
    out = out or workdir / (learner.export_name or "eta.safetensors")
    with named(out):
        if learner.export_name is not None:
            what = learner.export(run.eta, out)
        else:
            save_eta(out, run.eta, config=run.config, algorithm=type(learner).__name__, step=step)
            what = "the eta"
    print(f"{out}: {what} of outer step {step}.")


def draw(workdir: pathlib.Path, allow_imports: bool = False) -> None:
    """Draw all pictures of a run at its newest checkpoint; print where each kind of them is."""
    run = load_run(workdir, allow_imports=allow_imports)
    uncut = dataclasses.replace(run.trainer, segment=None, replay=Replay())
    for kind in pictures.kinds_of(run.algorithm):
        with named(workdir / pictures.FOLDER):
            paths = pictures.draw(kind, workdir, uncut, run.state, run.splits.train)
        print("\n".join(map(str, paths)), flush=True)


def check(trainer: Trainer, state: TrainState, tasks: Tasks) -> None:
    """Print what a health check finds, one line where that is nothing; HealthError if bad."""
    say("Health: compiling one meta-gradient, to check it before training.")
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
