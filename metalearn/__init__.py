"""metalearn: algorithms, engines and one trainer for meta-learning in JAX."""

import importlib
import os
from typing import Any

from metalearn._utils.version import __version__
from metalearn.algorithm import Algorithm
from metalearn.engines import (
    ES,
    PES,
    SAMA,
    Forward,
    Implicit,
    InverseVariance,
    MetaGradient,
    MixedFlow,
    Reverse,
    Truncated,
)
from metalearn.eta_file import load_eta, save_eta
from metalearn.learner import Learner
from metalearn.planning.plan import choose_engine
from metalearn.sharding.layout import Layout
from metalearn.sharding.mesh import make_mesh
from metalearn.tasks import DrawnTask, Tasks, draw_task
from metalearn.trainer import Trainer
from metalearn.training.faults import Faults
from metalearn.training.replay import Replay
from metalearn.training.truncated_unroll import Truncation
from metalearn.unroll import Episode, ExampleMean, Masked, Unroll

__all__ = [
    "ES",
    "PES",
    "SAMA",
    "Algorithm",
    "DrawnTask",
    "Episode",
    "ExampleMean",
    "Faults",
    "Forward",
    "Implicit",
    "InverseVariance",
    "Layout",
    "Learner",
    "Masked",
    "MetaGradient",
    "MixedFlow",
    "Replay",
    "Reverse",
    "Tasks",
    "Trainer",
    "Truncated",
    "Truncation",
    "Unroll",
    "__version__",
    "choose_engine",
    "draw_task",
    "load_eta",
    "load_run",
    "make_mesh",
    "save_eta",
]


def load_run(
    workdir: str | os.PathLike[str], best: bool = False, allow_imports: bool = False
) -> Any:
    """Read a run of the command line: its algorithm, trainer, data, state and eta.

    This is `metalearn.experiments.runs.load_run`, which is imported when it is called.
    """
    runs = importlib.import_module("metalearn.experiments.runs")
    return runs.load_run(workdir, best, allow_imports)
