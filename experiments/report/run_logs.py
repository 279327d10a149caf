"""What a run has left in its workdir, read for a report: nothing is compiled or restored.

A run that has not ended is read as far as it got; lines of metrics.jsonl that cannot be read are
left out.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metalearn._utils import strict_json
from metalearn._utils.intervals import Estimate
from metalearn.experiments.cli.json_config import flat
from metalearn.experiments.runs import checkpoints_of, newest_record
from metalearn.loggers import read_lines
from metalearn.loggers.console import EVALUATION, INTERVAL


class Curve(NamedTuple):
    """A metric by outer step.

    Args:
      steps: [n] of integers, ascending.
      values: [n] of floats.
      intervals: [n], half-widths of 95% intervals over tasks; None: of a single outer step's mean.
    """

    steps: np.ndarray
    values: np.ndarray
    intervals: np.ndarray | None


class RunLog(NamedTuple):
    """A run as its workdir shows it.

    Args:
      workdir: its path.
      config: plain, as its checkpoints record it.
      versions: of metalearn and the libraries, by name.
      train: curves of the training metrics, by name.
      validation: curves of the evaluations during training, by name.
      test: the final score by metric; empty for a run that has not ended.
      seconds: wall time of training, as far as it was logged; NaN where it was not.
      pictures: files of pictures that the run has drawn.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    versions: dict[str, str]
    train: dict[str, Curve]
    validation: dict[str, Curve]
    test: dict[str, Estimate]
    seconds: float
    pictures: list[pathlib.Path]

    @property
    def steps(self) -> int:
        """Return the number of outer steps that were logged."""
        return max((int(curve.steps[-1]) for curve in self.train.values()), default=0)


def read_run(workdir: pathlib.Path) -> RunLog:
    """Read the run in a workdir.

    Raises:
      ValueError: where there is no run, one of no `metalearn train`, or one that logged nothing.
    """
    record = _record(workdir)
    return log_of(workdir, record["config"], record["versions"])


def log_of(workdir: pathlib.Path, config: dict[str, Any], versions: dict[str, str]) -> RunLog:
    """Read what the run of a config has logged in a workdir; ValueError if that is nothing."""
    rows = [line.row for line in read_lines(workdir / "metrics.jsonl") if line.row]
    train = curves([row for row in rows if "loss" in row])
    if not train:
        raise ValueError(
            f"The run in {workdir} has logged no outer step in metrics.jsonl, so there is nothing "
            f"to report. Train it further: metalearn train --workdir={workdir} ..."
        )
    evaluated = [row for row in rows if any(name.startswith(EVALUATION) for name in row)]
    return RunLog(
        workdir,
        config,
        versions,
        train,
        curves(evaluated),
        _test(workdir / "test.json"),
        _seconds(train),
        sorted((workdir / "pictures").glob("*.png")),
    )


def _record(workdir: pathlib.Path) -> dict[str, Any]:
    """Return the record of a run's newest checkpoint."""
    if not workdir.is_dir():
        raise ValueError(f"There is no folder {workdir}. A report takes workdirs of runs.")
    record = newest_record(checkpoints_of(workdir))
    if record is None or not {"dataset", "algorithm"} <= record["config"].keys():
        raise ValueError(
            f"There is no run of `metalearn train` in {workdir}, or none with a checkpoint yet. "
            f"Train one: metalearn train --config=NAME --workdir={workdir}."
        )
    return record


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the curve of each metric of rows; "eval/" is left off its name."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "step" or name.endswith(INTERVAL):
                continue
            interval = float(row.get(name + INTERVAL, math.nan))
            points.setdefault(name.removeprefix(EVALUATION), []).append(
                (row["step"], float(value), interval)
            )
    return {name: _curve(each) for name, each in points.items()}


def _curve(points: Sequence[tuple[int, float, float]]) -> Curve:
    steps, values, intervals = (np.asarray(column) for column in zip(*points, strict=True))
    return Curve(steps, values, None if np.isnan(intervals).all() else intervals)


def _test(path: pathlib.Path) -> dict[str, Estimate]:
    if not path.is_file():
        return {}
    return {name: Estimate(**value) for name, value in strict_json.loads(path.read_text()).items()}


def _seconds(train: Mapping[str, Curve]) -> float:
    """Return the wall time of training: the sum over the processes that a run has had."""
    if "time/seconds" not in train:
        return math.nan
    seconds = train["time/seconds"].values
    ends = np.append(seconds[1:] < seconds[:-1], True)  # where a process was the last time logged
    return float(seconds[ends].sum())


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys whose values are not the same in all configs."""
    values = [flat(config) for config in configs]
    keys = list(dict.fromkeys(key for each in values for key in each))
    texts = {key: {strict_json.dumps(each.get(key)) for each in values} for key in keys}
    return [key for key in keys if len(texts[key]) > 1]


def labels(runs: Sequence[RunLog]) -> list[str]:
    """Return a label of each run for a legend: its differing keys, or its workdir's name.

    Labels are different from each other: runs of one config are told apart by their workdirs.
    """
    keys = differing([run.config for run in runs])
    configs = [flat(run.config) for run in runs]
    texts = [
        ", ".join(f"{key.rpartition('.')[2]}={each[key]}" for key in keys if key in each)
        for each in configs
    ]
    return [
        text if text and texts.count(text) == 1 and len(text) <= 60 else run.workdir.name
        for text, run in zip(texts, runs, strict=True)
    ]
