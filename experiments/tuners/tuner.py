"""The interface of all tuners, and how what they spend is counted."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from metalearn.algorithms import FDS
from metalearn.experiments.tuners.problem import Problem


class Found(NamedTuple):
    """What a tuner would answer with if it had to stop here."""

    spent: float  # inner steps of plain training until here, all of them
    algorithm: FDS  # whose eta it is: the problem's own, or one with other hyperparameters
    eta: Any
    loss: float  # on validation data, as the tuner saw it; inf where that is not finite


class Tuner(abc.ABC):
    """A way of finding hyperparameters. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        """Yield the incumbent whenever something was spent, until the budget is.

        Args:
          problem: what is tuned. The test set is never looked at.
          budget: inner steps of plain training; what costs more than is left is not begun.
          key: of all that is random.
        """
