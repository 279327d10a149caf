"""`metalearn sweep`: search keys of a config by trials, each a run of its own.

    metalearn sweep --config=maml_digits --sweep.optimizer.learning_rate="log(1e-4,1e-1)"
        --trials=20 --jobs=2 --metric=eval/accuracy --workdir=runs/rates

Trials are `metalearn train` in WORKDIR/trials/NNN. They are compared by the last evaluation on
validation tasks, `--metric`, and none is evaluated on test tasks. The command that began a sweep
resumes it after any end: trials that are done stay, those that ran go on from their checkpoints,
and a larger `--trials` adds more. See `metalearn.experiments.sweep`.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metalearn._utils.checks import at_least
from metalearn.experiments import build
from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments, import_paths
from metalearn.experiments.commands.run import held
from metalearn.experiments.commands.summary import print_rows
from metalearn.experiments.sweep import space
from metalearn.experiments.sweep.loop import Loop, UnknownMetricError
from metalearn.experiments.sweep.page import NAME, table, write_page
from metalearn.experiments.sweep.study import (
    JOURNAL,
    SETTINGS,
    TRIALS,
    Settings,
    Study,
    check_sampler,
    evaluation_numbers,
    library,
    metric_of,
    values_of,
    write_settings,
)


class Options(NamedTuple):
    """The options of a sweep, as the command line has them.

    Args:
      metric: such as "eval/accuracy" or "max eval/my_score".
      trials: how many; None: 20, or all of a grid.
      jobs: trials at a time.
      sampler: "tpe", "random" or "grid".
      pruner: "none" or "hyperband".
      seed: of the sampler.
    """

    metric: str = "eval/loss"
    trials: int | None = None
    jobs: int = 1
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0


def sweep(
    config: Any,
    words: Sequence[str],
    swept: Mapping[str, str],
    workdir: pathlib.Path,
    options: Options,
) -> pathlib.Path:
    """Run the trials of a sweep that are left, print what they reached, and write its page.

    Args:
      config: that the trials begin with.
      words: of the command line that make it.
      swept: the text of each `--sweep.KEY`.
      workdir: of the sweep.
      options: how it searches.

    Returns:
      The path of its report.

    Raises:
      ValueError: for what cannot be swept, or another sweep in the workdir.
      Interrupted: where a signal asked to stop, once all trials are saved.
    """
    library()
    plain = build.to_json(config)
    import_paths.remember(plain)
    at_least("metalearn sweep", 1, trials=options.trials, jobs=options.jobs)
    given = arguments.settings(["metalearn", "sweep", *words])
    parameters = space.space(swept, config, given, sections.nullable)
    metric, direction = metric_of(options.metric)
    chosen = options.sampler, options.pruner, options.seed
    settings = Settings(tuple(words), tuple(parameters), metric, direction, *chosen)
    evaluations = len(evaluation_numbers(plain["steps"], plain["eval_every"]))
    if not evaluations:
        raise ValueError(
            f"A sweep compares its trials by evaluations on validation tasks, and eval_every="
            f"{plain['eval_every']} with steps={plain['steps']} makes none. Set "
            "--config.eval_every, to outer steps from one to the next."
        )
    trials = check_sampler(settings, options.trials, evaluations)
    with held(workdir):
        write_settings(workdir, settings, plain)
        study = Study(workdir, settings, evaluations)
        _open(study, trials, options.jobs)
        try:
            say = functools.partial(print, flush=True)
            Loop(study, trials, options.jobs, say, plain.get("wandb", {})).run()
        except UnknownMetricError:
            _forget(study)
            raise
        print("\n" + "\n".join(table(study)))
        page = write_page(study, workdir / NAME)
        _close(study, page)
    return page


def _open(study: Study, trials: int, jobs: int) -> None:
    settings = study.settings
    ended = [trial for trial in study.trials() if trial.state.is_finished()]
    rows = {
        "searches": "  ".join(each.option() for each in settings.space),
        "by": f"{settings.direction} {settings.metric}, the last of {study.evaluations}",
        "sampler": f"{settings.sampler}, seed {settings.seed}; pruner {settings.pruner}",
        "trials": f"{trials}, {jobs} at a time" + (f"; {len(ended)} have ended" if ended else ""),
        "workdir": str(study.workdir),
    }
    print_rows("metalearn sweep", rows)


def _close(study: Study, page: pathlib.Path) -> None:
    """Print what one may do with the sweep."""
    best, rows = study.best(), {"report": str(page)}
    if best is not None:
        folder = study.folder(best.number)
        rows = {
            "train": study.best_command(),
            "evaluate": f"metalearn eval --workdir={folder} --tasks=1000  (on test tasks)",
            **rows,
        }
        settings = ", ".join(f"{key}={value}" for key, value in values_of(best).items())
        score = f"{study.settings.metric} {best.value:.4g}"
        title = f"Best: trial {best.number:03d}, {score}, {settings}"
    else:
        title = "No trial was trained to its end."
    print()
    print_rows(title, rows)


def _forget(study: Study) -> None:
    """Remove a sweep in which no trial has ended: its metric is not there."""
    if not any(trial.state.is_finished() for trial in study.trials()):
        shutil.rmtree(study.workdir / TRIALS, ignore_errors=True)
        for name in (JOURNAL, SETTINGS):
            (study.workdir / name).unlink(missing_ok=True)
