"""metalearn: algorithms, engines and one trainer for meta-learning in JAX."""

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
from metalearn.sharding.layout import Layout
from metalearn.sharding.mesh import make_mesh
from metalearn.tasks import DrawnTask, Tasks, draw_task
from metalearn.trainer import Trainer
from metalearn.training.faults import Faults
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
    "Masked",
    "MetaGradient",
    "MixedFlow",
    "Reverse",
    "Tasks",
    "Trainer",
    "Truncation",
    "Unroll",
    "__version__",
    "draw_task",
    "make_mesh",
]
