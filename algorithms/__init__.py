"""Algorithms: what is learned, and what one inner step is."""

from metalearn.algorithms.learning_rates import LearningRates
from metalearn.algorithms.loss_weights import LossWeights
from metalearn.algorithms.maml import MAML
from metalearn.algorithms.objectives import cross_entropy, squared_error
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
    "DomainWeights",
    "ExampleWeights",
    "LearningRates",
    "LossWeights",
    "TokenWeights",
    "Weighting",
    "bounded",
    "cross_entropy",
    "mean_one",
    "squared_error",
    "unbounded",
]
