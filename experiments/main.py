"""The command line: `metalearn plan`, `train`, `eval`, `adapt`, `export` and `draw`.

    metalearn plan  --config=maml_omniglot --budget=4GiB
    metalearn train --config=maml_omniglot --workdir=runs/omniglot --config.seed=1
    metalearn eval  --workdir=runs/omniglot --tasks=1000 --best
    metalearn adapt --workdir=runs/omniglot --support=letters --query=scans --out=read.npz
    metalearn export --workdir=runs/learned_optimizer --out=mine.safetensors
    metalearn export --workdir=runs/fds --out=schedules.json
    metalearn draw --workdir=runs/fds

Options: --config, --config.KEY=VALUE, --workdir, --noprogress, --traceback,
--nocompilation_cache (compile again what an earlier command has compiled). train:
--allow-config-change (resume though the config is another). eval: --tasks. eval, adapt and export:
--best (the best checkpoint, of a config with checkpoint_best). adapt: --support and --query (an
.npz file with `inputs` and `labels`, or a folder of images by class), --out, --inner-steps. export:
--out. plan: --budget
(such as 40GiB; else the memory of the device), --json, --largest=KEY (how large an integer of
the config may become, such as --largest=algorithm.inner_steps).

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

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from metalearn._utils.device_memory import parse_bytes
from metalearn.experiments.cli import arguments
from metalearn.experiments.cli.compilation_cache import kept_programs
from metalearn.experiments.commands import adapt as adaptation
from metalearn.experiments.commands import plan, run
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
_TASKS = flags.DEFINE_integer("tasks", 1000, "eval: how many test tasks.", lower_bound=2)
_OUT = flags.DEFINE_string("out", None, "export, adapt: the file to write; else in the workdir.")
_SUPPORT = flags.DEFINE_string("support", None, "adapt: an .npz file, or images by class.")
_QUERY = flags.DEFINE_string("query", None, "adapt: an .npz file, or a folder of images.")
_INNER_STEPS = flags.DEFINE_integer("inner_steps", None, "adapt: else as in an evaluation.")
_BUDGET = flags.DEFINE_string("budget", None, "plan: the memory there is, such as 40GiB.")
_JSON = flags.DEFINE_bool("json", False, "plan: print JSON and nothing else.")
_LARGEST = flags.DEFINE_string("largest", None, "plan: find the largest value of this key.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")
_CHANGE = flags.DEFINE_bool("allow_config_change", False, "train: resume whatever the config.")
_BEST = flags.DEFINE_bool("best", False, "eval, adapt, export: the best checkpoint.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0 of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes share the run.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Find the processes: SLURM, clouds.")
_CACHE = flags.DEFINE_bool("compilation_cache", True, "Keep compiled programs between starts.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where it was raised.")

# What a user can mend. Anything else is a bug of ours and keeps its traceback.
REPORTED = (ValueError, TypeError, FloatingPointError, OSError, flags.Error)


def train() -> None:
    """Train the config in the workdir, resuming what is there; then evaluate on test tasks."""
    run.train(_config("train"), _workdir(), _PROGRESS.value, _CHANGE.value)


def evaluate() -> None:
    """Evaluate the newest checkpoint of a workdir on test tasks, by its own config."""
    run.evaluate(_workdir(), _TASKS.value, _BEST.value)


def show_plan() -> None:
    """Print what each engine would cost on the config, and which one to take."""
    budget = None if _BUDGET.value is None else parse_bytes(_BUDGET.value)
    plan.show(_config("plan"), budget, _JSON.value, _LARGEST.value)


def adapt() -> None:
    """Adapt to a support set with what a run has learned, and predict a query set."""
    support, query = _examples("support", _SUPPORT.value), _examples("query", _QUERY.value)
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    adaptation.adapt(_workdir(), support, query, out, _INNER_STEPS.value, _BEST.value)


def export() -> None:
    """Write the optimizer, or the schedules, that a run has learned into a file."""
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    run.export(_workdir(), out, _BEST.value)


def draw() -> None:
    """Draw the schedules that a run has learned, and the tangents along its trajectory."""
    run.draw(_workdir())


COMMANDS: dict[str, Callable[[], None]] = {
    "plan": show_plan,
    "train": train,
    "eval": evaluate,
    "adapt": adapt,
    "export": export,
    "draw": draw,
}


def _config(command: str) -> Any:
    if _CONFIG.value is None:
        raise ValueError(
            f"`metalearn {command}` needs a config: --config=NAME, --config=FILE.py or "
            f"--config=FILE.json. Packaged: {', '.join(arguments.packaged())}."
        )
    return _CONFIG.value


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


def main(argv: Sequence[str]) -> int:
    """Run a command line, and return its exit status.

    That is 0, 2 for what the user can mend, 75 for a run that was asked to stop and has saved.
    """
    try:
        command = arguments.command(argv, COMMANDS, __doc__ or "")
        if command is None:
            return 0
        left = flags.FLAGS(arguments.expanded(argv))[1:]
        if left:
            raise ValueError(
                f"{left[0]!r} is not an option: those begin with two dashes, such as "
                "--config.seed=1."
            )
        processes.start(
            *(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value), detect=_DISTRIBUTED.value
        )
        with kept_programs(_CACHE.value):
            COMMANDS[command]()
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
