"""The page of a sweep: its best trial, its figures and a table of all trials, in one file of HTML.

Its style and its parts are those of the page of runs (`metalearn.experiments.report.page`); it
requests nothing.
"""

from __future__ import annotations

import math
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

from metalearn._utils import disk
from metalearn._utils.checks import first_line
from metalearn._utils.readable import aligned
from metalearn.experiments.report.figures import save_png
from metalearn.experiments.report.page import (
    Picture,
    document,
    duration,
    escaped,
    figures,
)
from metalearn.experiments.report.page import table as html_table
from metalearn.experiments.sweep import figures as drawing
from metalearn.experiments.sweep.figures import TrialLog
from metalearn.experiments.sweep.loop import evaluations
from metalearn.experiments.sweep.study import Study, library, quiet, read_settings, shown

NAME = "report.html"
ENOUGH = 4  # trials that are done, before importance says anything


def report_of(workdir: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of the sweep in a workdir; return its path.

    Raises:
      ValueError: where there is no sweep, or no trial of it has been evaluated.
    """
    return write_page(Study(workdir, read_settings(workdir)), out or workdir / NAME)


def write_page(study: Study, out: pathlib.Path) -> pathlib.Path:
    """Write the page of a sweep, and its pictures in a folder beside it; return its path."""
    trials, settings = logs(study), study.settings
    if not any(trial.steps for trial in trials):
        raise ValueError(
            f"No trial of the sweep in {study.workdir} has been evaluated yet, so there is nothing "
            "to report. Let it run on."
        )
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        Picture(caption, save_png(figure, folder, name))
        for name, caption, figure in _figures(study, trials)
    ]
    title = f"Sweep {study.workdir.resolve().name}"
    config = shlex.join(["metalearn", "train", *settings.config])
    options = [[each.key, each.option().partition("=")[2]] for each in settings.space]
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="note">{escaped(_summary(study, trials))}</p>',
        *_best(study),
        "<h2>Trials</h2>",
        figures(pictures),
        "<h2>All trials, the best first</h2>",
        html_table(list(_rows(study))),
        "<h2>What was searched</h2>",
        html_table([["key", "values"], *options]),
        f"<p>with sampler {settings.sampler} (seed {settings.seed}) and pruner {settings.pruner}, "
        "on top of</p>",
        f"<pre>{escaped(config)}</pre>",
    ]
    disk.write(out, document(title, parts))
    return out


def logs(study: Study) -> list[TrialLog]:
    """Return the trials with their evaluations by outer step."""
    metric, each = study.settings.metric, []
    for trial in study.trials():
        rows = evaluations(study.folder(trial.number) / "metrics.jsonl")
        steps, values = [row["step"] for row in rows], [float(row[metric]) for row in rows]
        value = values[-1] if values else math.nan
        if trial.state.name == "COMPLETE":
            value = float(trial.value)
        ended = str(trial.user_attrs.get("ended", "running"))
        each.append(TrialLog(trial.number, ended, value, trial.params, steps, values))
    return each


def importances(study: Study) -> dict[str, float]:
    """Return the importance of each parameter, summing to 1; {} where too few trials are done."""
    done = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    if len(done) < ENOUGH or len(study.settings.space) < 2:
        return {}
    importance = library().importance
    try:
        with quiet():
            evaluator = importance.PedAnovaImportanceEvaluator()
            return dict(importance.get_param_importances(study.optuna, evaluator=evaluator))
    except (ValueError, RuntimeError):  # all values are the same
        return {}


def _figures(study: Study, trials: list[TrialLog]) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, caption, figure)."""
    settings, best = study.settings, study.best()
    metric, space = settings.metric, settings.space
    yield "history", "value by trial", drawing.history(trials, metric, settings.direction)
    number = None if best is None else best.number
    caption = f"{metric} by outer step of every trial; grey: pruned or diverged"
    yield "evaluations", caption, drawing.evaluations(trials, metric, number)
    for each in space:
        figure = drawing.by_parameter(trials, each, metric)
        yield f"by_{each.key}", f"{metric} by {each.key}", figure
    if len(space) > 1 and sum(trial.ended == "done" for trial in trials) > 1:
        figure = drawing.parallel(trials, space, metric, settings.direction)
        yield "parallel", "trials as lines through their parameters; light: good", figure
    if shares := importances(study):
        caption = "how much of the difference between good trials and others each parameter makes"
        yield "importance", caption, drawing.importance(shares)


def _summary(study: Study, trials: list[TrialLog]) -> str:
    counts = {
        ended: sum(trial.ended == ended for trial in trials)
        for ended in ("done", "pruned", "diverged", "failed", "running")
    }
    parts = [f"{count} {ended}" for ended, count in counts.items() if count]
    return (
        f"{len(trials)} trials: {', '.join(parts)}. Compared by {study.settings.direction} "
        f"{study.settings.metric} on validation tasks at the end of each; no test task was used."
    )


def _best(study: Study) -> Iterator[str]:
    best = study.best()
    if best is None:
        yield "<p>No trial was trained to its end yet.</p>"
        return
    folder = study.folder(best.number)
    yield (
        f"<h2>Best: trial {best.number:03d}, {escaped(study.settings.metric)} "
        f"{float(best.value):.4g}</h2>"
    )
    evaluate = f"metalearn eval --workdir={folder} --tasks=1000"
    yield f"<pre>{escaped(study.best_command())}\n{escaped(evaluate)}</pre>"


def _rows(study: Study) -> Iterator[list[str]]:
    """Yield the rows of the table of trials, the header first and then the best."""
    keys = [each.key for each in study.settings.space]
    yield ["trial", "ended", study.settings.metric, "outer steps", "time", *keys]
    sign = -1 if study.settings.direction == "max" else 1

    def place(log: TrialLog) -> tuple[bool, float]:
        return log.ended != "done", sign * log.value if math.isfinite(log.value) else math.inf

    frozen = {trial.number: trial for trial in study.trials()}
    for log in sorted(logs(study), key=place):
        attributes = frozen[log.number].user_attrs
        why = first_line(ValueError(attributes["why"])) if "why" in attributes else ""
        yield [
            f"{log.number:03d}",
            f"{log.ended}: {why}"[:60] if why else log.ended,
            "" if math.isnan(log.value) else f"{log.value:.4g}",
            f"{attributes.get('steps', log.steps[-1] if log.steps else 0):,}",
            duration(float(attributes.get("seconds", math.nan))),
            *(shown(log.params[key]) if key in log.params else "" for key in keys),
        ]


def table(study: Study) -> list[str]:
    """Return the lines of the table of trials, for a terminal."""
    return aligned(list(_rows(study)))
