"""The record of a sweep, kept by Optuna: trials, their values, and what to try next.

workdir/sweep.json      what is searched, how and by which metric
workdir/sweep.journal   Optuna's journal: every trial, with its parameters and evaluations
workdir/trials/007/     the run of trial 7

The journal is written as things happen, so that a sweep can be killed at any moment: its trials
that were running are then resumed, from their checkpoints. What is tried in trial n is drawn by a
sampler with the seed (seed, n), so that it depends on the trials before alone, not on how often the
sweep was resumed.

Samplers: random and TPE (Bergstra et al. 2011, NIPS, "Algorithms for Hyper-Parameter
Optimization"), which models the good trials and the others; and the grid of all combinations.
Pruner: Hyperband (Li et al. 2017, arXiv:1603.06560), on evaluations along the way: a trial goes on
while it is among the best third of those that got as far.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from metalearn._utils import disk, strict_json
from metalearn._utils.checks import first_line, pick
from metalearn.checkpoints.record import changes
from metalearn.experiments.sweep.space import Parameter, parameter

NAME = "sweep"  # of the study: Hyperband's brackets depend on it
SETTINGS, JOURNAL, TRIALS = "sweep.json", "sweep.journal", "trials"
MADE = "made"  # in sweep.json: the config that its words made
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "hyperband")
MOST_POINTS = 1_000  # of a grid
REDUCTION = 3  # of Hyperband: the share of trials that go on, and how much further


class Settings(NamedTuple):
    """What a sweep searches, how, and by which metric.

    Args:
      config: the words of the command line that make the config, such as "--config=maml_digits".
      space: the keys that are searched.
      metric: such as "eval/accuracy".
      direction: "max" or "min".
      sampler: of `SAMPLERS`.
      pruner: of `PRUNERS`.
      seed: of the sampler.
    """

    config: tuple[str, ...]
    space: tuple[Parameter, ...]
    metric: str
    direction: str
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        space = {each.key: each.option().partition("=")[2] for each in self.space}
        return {**self._asdict(), "config": [*self.config], "space": space}


def read_settings(workdir: pathlib.Path) -> Settings:
    """Read the settings of the sweep in a workdir; ValueError where there is none."""
    path = workdir / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"There is no sweep in {workdir}: it has no {SETTINGS}. Begin one with "
            f"`metalearn sweep --config=NAME --sweep.KEY=... --workdir={workdir}`."
        )
    plain = strict_json.read(path, str(path))
    try:
        plain = {name: value for name, value in plain.items() if name != MADE}
        space = tuple(parameter(key, text) for key, text in plain["space"].items())
        return Settings(**{**plain, "config": tuple(plain["config"]), "space": space})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the {SETTINGS} of a sweep ({first_line(error)})."
        ) from error


def is_sweep(workdir: pathlib.Path) -> bool:
    """Say whether there is a sweep in a folder."""
    return (workdir / SETTINGS).is_file()


def metric_of(text: str) -> tuple[str, str]:
    """Return (metric, direction) of what `--metric` says.

    >>> metric_of("max eval/accuracy"), metric_of("eval/loss")
    (('eval/accuracy', 'max'), ('eval/loss', 'min'))

    Raises:
      ValueError: for a metric that is none of evaluations, or whose better direction is not known.
    """
    direction, _, metric = text.strip().rpartition(" ")
    if not metric.startswith("eval/") or metric.endswith("_ci95"):
        raise ValueError(
            f"--metric={text}: trials are compared by an evaluation on validation tasks, such as "
            "eval/accuracy or eval/loss. Training is what they fit, and test tasks are for the one "
            "that is chosen."
        )
    if direction in ("max", "min"):
        return metric, direction
    if direction:
        raise ValueError(f'--metric={text}: a direction is "max" or "min", as in "max {metric}".')
    for words, known in ((("loss", "error", "perplexity"), "min"), (("accuracy", "auc"), "max")):
        if any(word in metric.lower() for word in words):
            return metric, known
    raise ValueError(
        f'--metric={metric} does not say what is better. Write "max {metric}" or "min {metric}".'
    )


def check_sampler(settings: Settings, trials: int | None, evaluations: int) -> int:
    """Return the number of trials; ValueError where sampler or pruner do not fit.

    Args:
      settings: of the sweep.
      trials: that were asked for; None: 20, or the whole grid.
      evaluations: of a run.
    """
    pick(dict.fromkeys(SAMPLERS), settings.sampler, "sampler")
    pick(dict.fromkeys(PRUNERS), settings.pruner, "pruner")
    if settings.pruner == "hyperband" and evaluations < REDUCTION:
        raise ValueError(
            f"--pruner=hyperband stops trials between evaluations, and a run of this config has "
            f"{evaluations}: at least {REDUCTION} are needed. Set --config.eval_every to a smaller "
            "number of outer steps, or leave the pruner out."
        )
    if settings.sampler != "grid":
        return 20 if trials is None else trials
    for each in settings.space:
        if each.points() is None:
            raise ValueError(
                f"--sampler=grid tries all combinations, and {each.option()} has infinitely many "
                f"values. List some, --sweep.{each.key}=[a,b,c], or take --sampler=tpe or random."
            )
    size = math.prod(len(each.points() or ()) for each in settings.space)
    if size > MOST_POINTS:
        raise ValueError(
            f"The grid has {size:,} combinations, and {MOST_POINTS:,} at most. Take fewer values, "
            "or --sampler=tpe or random."
        )
    if trials is not None and trials != size:
        raise ValueError(
            f"--sampler=grid tries all {size} combinations, not --trials={trials}. Leave --trials "
            "out, or take --sampler=random."
        )
    return size


def library() -> Any:
    """Return Optuna; ValueError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError(
            "`metalearn sweep` takes its suggestions from Optuna, which is not installed: "
            "`pip install optuna`, or metalearn with its extra `sweep`."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's notes about parts that may change from the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library().exceptions.ExperimentalWarning)
        yield


class Study:
    """The trials of the sweep in a workdir.

    Only one process opens a workdir for writing at a time (`held`).
    """

    def __init__(self, workdir: pathlib.Path, settings: Settings, evaluations: int = 0):
        """Open the journal, or begin one.

        Args:
          workdir: of the sweep.
          settings: of the sweep.
          evaluations: of a run, for the pruner; 0: the study is only read.
        """
        optuna = library()
        self.workdir, self.settings, self.evaluations = workdir, settings, evaluations
        path = workdir / JOURNAL
        if evaluations:
            _mend(path)
        pruner = optuna.pruners.NopPruner()
        if settings.pruner == "hyperband" and evaluations:
            pruner = optuna.pruners.HyperbandPruner(1, evaluations, REDUCTION)
        try:
            with quiet():
                backend = optuna.storages.journal.JournalFileBackend(str(path))
                storage = optuna.storages.JournalStorage(backend)
                if evaluations and not storage.get_all_studies():
                    direction = {"max": "maximize", "min": "minimize"}[settings.direction]
                    optuna.create_study(storage=storage, study_name=NAME, direction=direction)
                self.optuna: Any = optuna.load_study(
                    storage=storage, study_name=NAME, pruner=pruner
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no journal of a sweep, or is damaged ({first_line(error)}). Its trials "
                f"are in {workdir / TRIALS}; begin again in another workdir."
            ) from error
        if settings.sampler == "grid" and evaluations:
            self._enqueue_grid()

    def _enqueue_grid(self) -> None:
        """Add all combinations as trials that wait; those that are there already stay."""
        keys = [each.key for each in self.settings.space]
        points = [*itertools.product(*(each.points() or () for each in self.settings.space))]
        there = len(self.trials(waiting=True))
        for point in points if there < len(points) else ():
            trial = dict(zip(keys, point, strict=True))
            self.optuna.enqueue_trial(trial, skip_if_exists=there > 0)

    def trials(self, waiting: bool = False) -> list[Any]:
        """Return Optuna's trials by number, those of a grid that have not begun if asked for."""
        each = self.optuna.get_trials(deepcopy=False)
        return [trial for trial in each if waiting or trial.state.name != "WAITING"]

    def running(self) -> list[Any]:
        """Return the trials that have begun and not ended, for their runs to be resumed."""
        trials = [trial for trial in self.trials() if trial.state.name == "RUNNING"]
        return [self._open(trial.number, trial._trial_id) for trial in trials]

    def ask(self) -> Any:
        """Begin the next trial, with its parameters suggested."""
        return self._open(len(self.trials()))

    def _open(self, number: int, known: int | None = None) -> Any:
        """Return a trial with its parameters, begun before or now."""
        with quiet():
            self.optuna.sampler = self._sampler(number)
            if known is None:
                trial = self.optuna.ask()
            else:
                trial = library().trial.Trial(self.optuna, known)
            for each in self.settings.space:
                _suggest(trial, each)
        return trial

    def _sampler(self, number: int) -> Any:
        samplers = library().samplers
        seed = _seed(self.settings.seed, number)
        return (samplers.TPESampler if self.settings.sampler == "tpe" else samplers.RandomSampler)(
            seed=seed
        )

    def tell(self, trial: Any, value: float | None, state: str) -> None:
        """End a trial in a state of Optuna: "COMPLETE" with its value, "PRUNED" or "FAIL"."""
        self.optuna.tell(trial, value, library().trial.TrialState[state])

    def best(self) -> Any:
        """Return the best trial that was trained to its end; None where there is none."""
        complete = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        sign = -1 if self.settings.direction == "max" else 1
        return min(complete, key=lambda trial: sign * float(trial.value or 0.0), default=None)

    def best_command(self) -> str:
        """Return the command that trains the config of the best trial; "" where there is none."""
        best = self.best()
        if best is None:
            return ""
        return shlex.join(["metalearn", "train", *self.words(best), "--workdir=runs/best"])

    def folder(self, number: int) -> pathlib.Path:
        """Return the workdir of a trial."""
        return self.workdir / TRIALS / f"{number:03d}"

    def words(self, trial: Any) -> list[str]:
        """Return the command line of a trial's config."""
        return [*self.settings.config, *(f"--config.{k}={v}" for k, v in values_of(trial).items())]


def values_of(trial: Any) -> dict[str, str]:
    """Return the parameters of a trial as words of the command line, to the last digit."""
    return {
        key: value if isinstance(value, str) else repr(value) for key, value in trial.params.items()
    }


def shown(value: Any) -> str:
    """Return a value of a parameter, short enough for a table.

    >>> shown(0.0031622776), shown(8), shown("(32,)")
    ('0.003162', '8', '(32,)')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _suggest(trial: Any, each: Parameter) -> None:
    if each.kind == "choice":
        trial.suggest_categorical(each.key, each.choices)
    elif each.kind == "int":
        trial.suggest_int(each.key, int(each.low), int(each.high))
    else:
        trial.suggest_float(each.key, each.low, each.high, log=each.kind == "log")


def _seed(seed: int, number: int) -> int:
    """Return a seed of 32 bits for a trial: different ones for (0, 1) and (1, 0)."""
    import numpy as np

    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _mend(path: pathlib.Path) -> None:
    """Drop what a killed process has left: half a line at the end, and its lock."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if not path.is_file():
        return
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        disk.write(path, whole)


def write_settings(
    workdir: pathlib.Path, settings: Settings, config: Mapping[str, Any] | None = None
) -> None:
    """Write the settings of a new sweep, or compare them with those of the one that is there.

    Args:
      workdir: of the sweep.
      settings: of the sweep.
      config: that the words of the settings make, as JSON; None: it is not compared.

    Raises:
      ValueError: where the workdir holds another sweep, or a run.
    """
    if is_sweep(workdir):
        there = read_settings(workdir)
        if there != settings:
            differing = [
                f"{name} is {_said(getattr(there, name))}, not {_said(getattr(settings, name))}"
                for name in Settings._fields
                if getattr(there, name) != getattr(settings, name)
            ]
            raise ValueError(
                f"{workdir} holds another sweep: its {'; its '.join(differing)}. The command that "
                "began it resumes it (--trials and --jobs may change); for this one name another "
                "workdir."
            )
        before = strict_json.read(workdir / SETTINGS, SETTINGS).get(MADE)
        now = strict_json.loads(strict_json.dumps(dict(config or {})))
        if before and now and (found := changes(before, now)):
            raise ValueError(
                f"{workdir} holds a sweep whose command made another config: {'; '.join(found)}. "
                "Its trials could not be compared with new ones. Set the config back, or name "
                "another workdir."
            )
        return
    if (workdir / "checkpoints").exists() or (workdir / "config.json").exists():
        raise ValueError(
            f"{workdir} holds a run, and a sweep has a workdir of its own. Name another one."
        )
    plain = settings.plain() | ({MADE: dict(config)} if config else {})
    disk.write(workdir / SETTINGS, strict_json.dumps(plain, indent=2) + "\n")


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(each.option() if isinstance(each, Parameter) else each for each in value)
    return str(value)


def evaluation_numbers(steps: int, every: int) -> Sequence[int]:
    """Return the outer steps at which a run is evaluated: multiples of `every`, and the last.

    >>> evaluation_numbers(10, 4), evaluation_numbers(10, 0)
    ([4, 8, 10], [])
    """
    return sorted({*range(every, steps + 1, every), steps}) if every and steps else []
