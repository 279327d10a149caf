"""metalearn: algorithms, engines and one trainer for meta-learning in JAX."""

import importlib
from typing import Any

from metalearn._utils.version import __version__
from metalearn.algorithm import Algorithm
from metalearn.engines import (
    ES,
    PES,
    Forward,
    InverseVariance,
    MetaGradient,
    MixedFlow,
    Reverse,
)
from metalearn.eta_file import load_eta, save_eta
from metalearn.learner import Learner
from metalearn.planning.plan import choose_engine
from metalearn.sharding.layout import Layout
from metalearn.sharding.mesh import make_mesh
from metalearn.tasks import DrawnTask, Tasks, draw_task
from metalearn.trainer import Trainer
from metalearn.training.faults import Faults
from metalearn.training.kept_states import Replay
from metalearn.training.truncated_unroll import Truncation
from metalearn.unroll import Episode, ExampleMean, Masked, Unroll

__all__ = [
    "ES",
    "PES",
    "Algorithm",
    "DrawnTask",
    "Episode",
    "ExampleMean",
    "Faults",
    "Forward",
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


def __getattr__(name: str) -> Any:
    """Find `load_run` in `metalearn.experiments`, which is imported where it is asked for."""
    if name == "load_run":
        return importlib.import_module("metalearn.experiments.runs").load_run
    raise AttributeError(f"module 'metalearn' has no attribute {name!r}")
