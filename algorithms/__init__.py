"""Algorithms: what is learned, and what one inner step is."""

from metalearn.algorithms.augmentation import jitter
from metalearn.algorithms.fds import FDS
from metalearn.algorithms.hyperparameter import Hyperparameter
from metalearn.algorithms.learning_rates import LearningRates
from metalearn.algorithms.loss_weights import LossWeights
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.objectives import (
    cross_entropy,
    squared_error,
    weighted_cross_entropy,
)
from metalearn.algorithms.outer_rules import fds_rule, in_ranges, sign_steps, within
from metalearn.algorithms.schedule import Schedule
from metalearn.algorithms.sgd import sgd
from metalearn.algorithms.weighting import (
    DomainWeights,
    ExampleWeights,
    TokenWeights,
    Weighting,
    bounded,
    mean_one,
    unbounded,
)

__all__ = [
    "MAML",
    "FDS",
    "DomainWeights",
    "ExampleWeights",
    "Hyperparameter",
    "LearningRates",
    "LossWeights",
    "Schedule",
    "TokenWeights",
    "Weighting",
    "bounded",
    "cross_entropy",
    "fds_rule",
    "in_ranges",
    "jitter",
    "mean_one",
    "sgd",
    "sign_steps",
    "squared_error",
    "unbounded",
    "weighted_cross_entropy",
    "within",
]
