"""`metalearn report WORKDIR...`: one page of HTML of one run or several, and its pictures.

The page holds the learning curves with intervals, what was learned (the first kind of
`Algorithm.pictures`), the memory and FLOPs of the engine, the config, the versions and the command
that reproduces it. Several runs are drawn side by side, named by the keys in which their configs
differ. The pictures are files too, in a folder beside the page.
"""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from metalearn._utils import disk
from metalearn._utils.checks import first_line
from metalearn.experiments import build
from metalearn.experiments.cli.import_paths import import_paths
from metalearn.experiments.commands.pictures import draw
from metalearn.experiments.commands.plan import abstract
from metalearn.experiments.report.figures import curve_figure, metrics_of, save_png
from metalearn.experiments.report.page import Cost, Picture, page
from metalearn.experiments.report.run_logs import RunLog, labels, read_run
from metalearn.experiments.runs import load_run
from metalearn.experiments.sweep.page import report_of
from metalearn.experiments.sweep.study import is_sweep
from metalearn.planning.step_cost import Candidate, StepCosts, short_repr
from metalearn.sharding.distributed import say

NAME = "report.html"


def report(
    workdirs: Sequence[pathlib.Path],
    out: pathlib.Path | None = None,
    costs: bool = True,
    allow_imports: bool = False,
) -> pathlib.Path:
    """Write the report of runs; return the page's path.

    Args:
      workdirs: of the runs, ended or not; or of one sweep.
      out: the page; None: report.html, in the workdir of a single run, else in this folder.
      costs: compile an outer step of each config, for shapes, to count its memory and FLOPs.
      allow_imports: see `load_run`.

    Raises:
      ValueError: where a workdir has no run, or there is no workdir.
    """
    if any(map(is_sweep, workdirs)):
        return _of_sweep(workdirs, out)
    if not workdirs:
        raise ValueError(
            "A report is of runs: name their workdirs, `metalearn report runs/one runs/two`."
        )
    runs = [read_run(workdir) for workdir in workdirs]
    names = labels(runs)
    out = out or (workdirs[0] / NAME if len(runs) == 1 else pathlib.Path(NAME))
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    curves = [
        Picture(f"{name} by outer step", save_png(curve_figure(name, runs, names), folder, name))
        for name in metrics_of(runs)
    ]
    learned = [
        Picture(f"{label}: {path.stem}" if len(runs) > 1 else path.stem, path.read_bytes())
        for run, label in zip(runs, names, strict=True)
        for path in _learned(run, allow_imports)
    ]
    counted = [cost_of(run.config, costs) for run in runs]
    text = page(runs, names, curves, learned, counted, [command_of(run) for run in runs])
    disk.write(out, text)
    return out


def _of_sweep(workdirs: Sequence[pathlib.Path], out: pathlib.Path | None) -> pathlib.Path:
    if len(workdirs) > 1:
        sweep = next(filter(is_sweep, workdirs))
        raise ValueError(
            f"{sweep} is a sweep, which has a page of its own: `metalearn report {sweep}`. Its "
            f"trials are runs and can be reported beside others: {sweep}/trials/000."
        )
    return report_of(workdirs[0], out)


def _learned(run: RunLog, allow_imports: bool) -> list[pathlib.Path]:
    """Return the pictures of what a run has learned; the first kind is drawn where there is none.

    Where the run cannot be restored, for its data is not here for instance, there are none.
    """
    drawn = [path for path in run.pictures if path.stem != "curves"]
    if drawn:
        return drawn
    try:
        restored = load_run(run.workdir, allow_imports=allow_imports)
        kinds = list(restored.algorithm.pictures())[:1]
        fields = restored.trainer, restored.state, restored.splits.train
        paths = [path for kind in kinds for path in draw(kind, run.workdir, *fields)]
    except (ValueError, OSError) as error:
        say(f"What {run.workdir} has learned is not drawn: {first_line(error)}")
        return []
    return [path for path in paths if path.suffix == ".png"]


def command_of(run: RunLog) -> str:
    """Return the command that trains the config of a run again."""
    path = run.workdir / "config.json"
    allowed = ["--allow-imports"] if import_paths(run.config) else []
    return shlex.join(["metalearn", "train", f"--config={path}", "--workdir=runs/again", *allowed])


def cost_of(config: Mapping[str, Any], counted: bool = True) -> Cost:
    """Compile an outer step of a config, for shapes, and count its memory and FLOPs if asked to."""
    config = {**config, **config.get("auto", {})}
    engine = build.engine(config["engine"], config.get("engine_options", {}))
    name = short_repr(engine)
    if not counted:
        return Cost(name, problem="not asked for")
    try:
        trainer, tasks = abstract(config)
        costs = StepCosts(trainer, tasks)
        row, plain = costs.row(Candidate(engine), costs.at_once), costs.plain()
    except (ValueError, OSError) as error:  # such as data that is not on this machine
        return Cost(name, problem=first_line(error))
    if row.cost is None:
        return Cost(name, problem=row.refusal)
    flops = row.cost.flops / plain.flops if plain.flops else float("nan")
    return Cost(name, row.cost.peak, row.cost.peak / plain.peak, flops)
