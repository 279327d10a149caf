"""metalearn: algorithms, engines and one trainer for meta-learning in JAX."""

from metalearn.algorithm import Algorithm
from metalearn.engines import Forward, MetaGradient, MixedFlow, Reverse
from metalearn.example_mean import ExampleMean
from metalearn.tasks import Tasks
from metalearn.trainer import Trainer
from metalearn.unroll import Episode, Unroll

__all__ = [
    "Algorithm",
    "Episode",
    "ExampleMean",
    "Forward",
    "MetaGradient",
    "MixedFlow",
    "Reverse",
    "Tasks",
    "Trainer",
    "Unroll",
]

__version__ = "0.1.0"
