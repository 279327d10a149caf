"""The command line: `metalearn train`, `plan`, `eval` and the other commands.

    metalearn plan  --config=maml_omniglot --budget=4GiB
    metalearn compare --config=fds_digits
    metalearn smooth --config=fds_digits --out=smooth.png
    metalearn train --config=maml_omniglot --workdir=runs/omniglot --config.seed=1
    metalearn eval  --workdir=runs/omniglot --tasks=1000 --best
    metalearn adapt --workdir=runs/omniglot --support=letters --query=scans --out=read.npz
    metalearn export --workdir=runs/omniglot --out=eta.safetensors
    metalearn export --workdir=runs/fds --out=schedules.json
    metalearn draw --workdir=runs/fds
    metalearn attribute --config=data_weights_digits --workdir=runs/worth --validate
    metalearn attribute --workdir=runs/data_rater --fraction=0.5
    metalearn report runs/omniglot runs/other --out=report.html
    metalearn sweep --config=maml_digits --sweep.tasks_per_step="[4,8]" --workdir=runs/sweep
    metalearn list maml
    metalearn doctor

`metalearn train --help` shows the options of train, and so for each command; all of them have
--traceback. train and plan: --config, --config.KEY=VALUE and --budget (such as 40GiB, of
--config.engine=auto and of the plan; else the memory of the device). adapt: --support and --query,
each an .npz file with `inputs` and `labels`, or a folder of images by class. compare runs every
engine on a config and prints its error beside its cost; with --tolerance=0.01, engine=auto of train
takes the fastest engine within that error. smooth measures whether the meta-gradient of a config
predicts the outer loss, with a verdict; --search tries settings that make it smoother. attribute
computes what each training example is worth, and --validate trains without some; without --config
it scores the training data of a trained data_rater; --fraction keeps the best share. sweep searches
keys of a config by trials, and resumes; list shows what a config may name, or the keys of a name;
doctor tries every engine on this machine, and exits with status 1 where something does not work.

A name that is set, --config.model.name=mlp, brings its own keys with their defaults; keys that
both names have keep their values. `None`, `null` or nothing behind the equals sign unsets a key
that may be unset.

Several processes, on one machine or many: the same command in each, with --coordinator=HOST:PORT
--processes=N --process=I, or with --distributed where SLURM or a cloud starts them.

`--config` takes the name of a packaged config; or the path of a config file, which is Python
and is executed; or of a JSON file, {"config": "maml_omniglot", "seed": 1}, which names a packaged
config and sets keys of it, executes nothing, and is the form for a config that is not your own.
The same command with the same workdir resumes; a finished run says so and only evaluates.
SIGTERM or ctrl-C saves first and exits with status 75; a second one does not wait. A full disk does
not end a run: what could not be written is named, the score is printed, and the status is 0.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from metalearn._utils.device_memory import parse_bytes
from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments
from metalearn.experiments.cli.compilation_cache import kept_programs
from metalearn.experiments.commands import adapt as adaptation
from metalearn.experiments.commands import attribute as attribution
from metalearn.experiments.commands import compare, doctor, listing, plan, run, smooth
from metalearn.experiments.commands import rate as rating
from metalearn.experiments.commands import report as reporting
from metalearn.experiments.commands import sweep as sweeping
from metalearn.sharding import distributed as processes
from metalearn.training.outer_loop import Interrupted
from metalearn.training.signals import EXIT_STATUS

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A packaged config's name, or the path of a .py or .json file.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints and logs.")
_TASKS = flags.DEFINE_integer("tasks", 1000, "How many test tasks.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "The file to write; else one in the workdir.")
_SUPPORT = flags.DEFINE_string("support", None, "An .npz file, or a folder of images by class.")
_QUERY = flags.DEFINE_string("query", None, "An .npz file, or a folder of images.")
_INNER_STEPS = flags.DEFINE_integer("inner_steps", None, "Inner steps; else as in an evaluation.")
_BUDGET = flags.DEFINE_string("budget", None, "The memory to choose an engine for, such as 40GiB.")
_TOLERANCE = flags.DEFINE_float(
    "tolerance", None, "Choose the fastest engine within this relative error, not an exact one."
)
_X64 = flags.DEFINE_bool("x64", False, "Compare in float64.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON and nothing else.")
_LARGEST = flags.DEFINE_string("largest", None, "Find the largest value of this key that fits.")
_SEARCH = flags.DEFINE_bool("search", False, "Try settings that make the inner run smoother.")
_QUERIES = flags.DEFINE_integer(
    "queries", 8, "Query examples that have scores of their own.", lower_bound=0
)
_SPLIT = flags.DEFINE_string("split", "train", "Whose run: train, validation or test.")
_VALIDATE = flags.DEFINE_bool("validate", False, "Compare scores with training without examples.")
_LEAVE_OUT = flags.DEFINE_integer(
    "leave_out", None, "Examples that such a training is without; else one in a hundred."
)
_TRAININGS = flags.DEFINE_integer("trainings", 100, "How many trainings.", lower_bound=3)
_FRACTION = flags.DEFINE_float(
    "fraction", None, "Keep this share of the examples, the best ones: between 0 and 1."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show no progress bar.")
_CHANGE = flags.DEFINE_bool("allow_config_change", False, "Resume whatever the config.")
_IMPORTS = flags.DEFINE_bool(
    "allow_imports", False, "Import the code that a JSON config, or a run of others, names."
)
_BEST = flags.DEFINE_bool("best", False, "The best checkpoint, not the newest.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes share the run.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Find the processes: SLURM, clouds.")
_CACHE = flags.DEFINE_bool("compilation_cache", True, "Compile all programs again.")
_TEST = flags.DEFINE_bool("test", True, "Evaluate no test tasks at the end.")
_TRIALS = flags.DEFINE_integer("trials", None, "How many; else 20, or all of a grid.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Trials at a time, which share the machine.")
_METRIC = flags.DEFINE_string(
    "metric", "eval/loss", 'To compare trials by, such as eval/accuracy or "max eval/my_score".'
)
_SAMPLER = flags.DEFINE_string("sampler", "tpe", "tpe, random or grid.")
_PRUNER = flags.DEFINE_string("pruner", "none", "none, or hyperband: stop bad trials early.")
_SAMPLER_SEED = flags.DEFINE_integer("sampler_seed", 0, "The same seed suggests the same trials.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where it was raised.")

WITHOUT_DEVICES = ("list", "sweep")  # which neither look for a device nor compile anything
WITH_DEVICES = (
    *("plan", "compare", "smooth", "train", "eval", "adapt", "export", "draw", "attribute"),
    *("report", "doctor"),
)

# Options of some commands alone; all others are of every command.
OPTIONS = {
    "config": ("plan", "compare", "smooth", "train", "sweep", "attribute"),
    "workdir": ("smooth", "train", "eval", "adapt", "export", "draw", "sweep", "attribute"),
    "tasks": ("eval",),
    "out": ("smooth", "adapt", "export", "report"),
    "support": ("adapt",),
    "query": ("adapt",),
    "inner_steps": ("adapt",),
    "budget": ("plan", "train"),
    "tolerance": ("compare", "train"),
    "x64": ("compare",),
    "json": ("plan", "compare", "smooth", "list"),
    "search": ("smooth",),
    "largest": ("plan",),
    "progress": ("train",),
    "allow_config_change": ("train",),
    "best": ("eval", "adapt", "export"),
    "test": ("train",),
    **dict.fromkeys(("queries", "split", "validate", "leave_out", "trainings"), ("attribute",)),
    "fraction": ("attribute",),
    **dict.fromkeys(("trials", "sampler_seed"), ("smooth", "sweep")),
    **dict.fromkeys(("jobs", "metric", "sampler", "pruner"), ("sweep",)),
    **dict.fromkeys(("coordinator", "processes", "process", "distributed"), WITH_DEVICES),
    "compilation_cache": (*WITH_DEVICES, "sweep"),
}

# What a user can mend. Anything else is a bug of ours and keeps its traceback.
REPORTED = (ValueError, TypeError, FloatingPointError, OSError, flags.Error)


def train() -> None:
    """Train the config in the workdir, resuming what is there; then evaluate on test tasks."""
    command = shlex.join(["metalearn", *sys.argv[1:]])
    options = _PROGRESS.value, _CHANGE.value, _budget(), command, _TEST.value, _TOLERANCE.value
    run.train(_config("train"), _workdir(), *options)


def evaluate() -> None:
    """Evaluate the newest checkpoint of a workdir on test tasks, by its own config."""
    run.evaluate(_workdir(), _TASKS.value, _BEST.value, _IMPORTS.value)


def show_plan() -> None:
    """Print what each engine would cost on the config, and which one to take."""
    plan.show(_config("plan"), _budget(), _JSON.value, _LARGEST.value)


def compare_engines() -> None:
    """Print how wrong each engine's meta-gradient is on the config, with its cost."""
    compare.show(_config("compare"), _JSON.value, _X64.value, _TOLERANCE.value)


def show_smoothness() -> None:
    """Print whether the meta-gradient of the config predicts the outer loss."""
    out, workdir = (pathlib.Path(v) if v else None for v in (_OUT.value, _WORKDIR.value))
    words = tuple(arguments.of_trials(sys.argv))
    options = smooth.Options(
        *(_JSON.value, out, _SEARCH.value, _TRIALS.value, workdir, _SAMPLER_SEED.value, words)
    )
    smooth.show(_config("smooth"), options)


def adapt() -> None:
    """Adapt to a support set with what a run has learned, and predict a query set."""
    support, query = _examples("support", _SUPPORT.value), _examples("query", _QUERY.value)
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    adaptation.adapt(
        _workdir(), support, query, out, _INNER_STEPS.value, _BEST.value, _IMPORTS.value
    )


def export() -> None:
    """Write what a run has learned into a file: an optimizer, schedules, or any other eta."""
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    run.export(_workdir(), out, _BEST.value, _IMPORTS.value)


def draw() -> None:
    """Draw the schedules that a run has learned, and the tangents along its trajectory."""
    run.draw(_workdir(), _IMPORTS.value)


def attribute() -> None:
    """Score every training example: of a config for some queries, or by a trained data_rater."""
    if _CONFIG.value is None:
        rating.run(_workdir(), _FRACTION.value, _IMPORTS.value)
        return
    options = _QUERIES.value, _SPLIT.value, _VALIDATE.value, _LEAVE_OUT.value, _TRAININGS.value
    attribution.run(_CONFIG.value, _workdir(), attribution.Options(*options, _FRACTION.value))


def report(*workdirs: str) -> None:
    """Write one page of HTML of the runs in some workdirs: `metalearn report runs/a runs/b`."""
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    print(reporting.report([*map(pathlib.Path, workdirs)], out, allow_imports=_IMPORTS.value))


def sweep() -> None:
    """Search keys of a config by trials, each a run in WORKDIR/trials; the command resumes it.

    --sweep.KEY=VALUES, once for each key, says what is tried: log(1e-4,1e-1), uniform(0,1),
    int(1,8), or [a,b,c].
    """
    (words, swept), workdir = arguments.of_sweep(sys.argv), _workdir()
    options = sweeping.Options(
        _METRIC.value,
        _TRIALS.value,
        _JOBS.value,
        _SAMPLER.value,
        _PRUNER.value,
        _SAMPLER_SEED.value,
    )
    sweeping.sweep(_config("sweep"), words, swept, workdir, options)


def show_names(*names: str) -> None:
    """List what a config may name, or the keys of one name: `metalearn list`, `list maml`."""
    listing.show(names, _JSON.value)


def diagnose() -> int:
    """Say what this machine has, and compute a meta-gradient in every engine on it."""
    return doctor.diagnose()


COMMANDS: dict[str, Callable[..., int | None]] = {
    "plan": show_plan,
    "compare": compare_engines,
    "smooth": show_smoothness,
    "train": train,
    "eval": evaluate,
    "adapt": adapt,
    "export": export,
    "draw": draw,
    "attribute": attribute,
    "report": report,
    "sweep": sweep,
    "list": show_names,
    "doctor": diagnose,
}
TAKES_ARGUMENTS = ("report", "list")  # without a name


def _config(command: str) -> Any:
    if _CONFIG.value is None:
        raise ValueError(
            f"`metalearn {command}` needs a config: --config=NAME, --config=FILE.py or "
            f"--config=FILE.json. Packaged: {', '.join(arguments.packaged())}."
        )
    return _CONFIG.value


def _budget() -> int | None:
    return None if _BUDGET.value is None else parse_bytes(_BUDGET.value)


def _examples(name: str, path: str | None) -> pathlib.Path:
    if path is None:
        raise ValueError(
            f"`metalearn adapt` needs --{name}: an .npz file with the arrays `inputs` and "
            "`labels`, or a folder with a folder of images for each class."
        )
    return pathlib.Path(path)


def _workdir() -> pathlib.Path:
    if _WORKDIR.value is None:
        raise ValueError("Say where the run lives, or is to live: --workdir=runs/my_run.")
    return pathlib.Path(_WORKDIR.value)


def _flags() -> list[flags.Flag]:
    """Return the flags that are defined above, in their order."""
    values = [value for value in globals().values() if isinstance(value, flags.FlagHolder)]
    return [flags.FLAGS[value.name] for value in values]


def _options_of(command: str) -> list[flags.Flag]:
    return [flag for flag in _flags() if command in OPTIONS.get(flag.name, COMMANDS)]


def help_of(command: str) -> str:
    """Return what `metalearn COMMAND --help` prints: what the command does, and its options."""
    return arguments.usage(command, COMMANDS[command].__doc__ or "", _options_of(command))


def main(argv: Sequence[str]) -> int:
    """Run a command line, and return its exit status.

    That is 0, 1 where `doctor` finds what must work and does not, 2 for what the user can mend, 75
    for a run that was asked to stop and has saved.
    """
    try:
        command = arguments.command(argv, COMMANDS, __doc__ or "")
        if command is None:
            return 0
        if arguments.asks_for_help(argv):
            print(help_of(command))
            return 0
        known = {**OPTIONS, "sweep": ("sweep",)}
        arguments.check_options(argv, command, known, _options_of(command))
        rest, _ = arguments.swept(argv)
        left = flags.FLAGS(arguments.expanded(rest, sections.renew, sections.nullable))[1:]
        if left and command not in TAKES_ARGUMENTS:
            raise ValueError(
                f"{left[0]!r} is not an option: those begin with two dashes, such as "
                "--config.seed=1."
            )
        if command in WITHOUT_DEVICES:
            return COMMANDS[command](*left) or 0
        processes.start(
            *(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value), detect=_DISTRIBUTED.value
        )
        with kept_programs(_CACHE.value):
            return COMMANDS[command](*left) or 0
    except BrokenPipeError:  # of `metalearn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes from the last checkpoint.", file=sys.stderr)
        return 130
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_STATUS
    except REPORTED as error:
        if flags.FLAGS.is_parsed() and _TRACEBACK.value:
            raise
        print(f"\nmetalearn: {error}\n(--traceback shows where.)", file=sys.stderr)
        return 2
    return 0


def console() -> None:
    """Entry point of the `metalearn` command."""
    sys.exit(main(sys.argv))
