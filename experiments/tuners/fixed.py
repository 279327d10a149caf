"""Baselines without tuning: a cosine with a few peaks, optimizers that set their own rate.

Cosine annealing (Loshchilov & Hutter 2017, arXiv:1608.03983) from a peak down to zero,

    alpha_t = peak (1 + cos(pi t / T)) / 2

is what a practitioner runs by hand: a few peaks a factor of three apart, one run each, with the
usual momentum and weight decay. T inner steps for every peak.

Learning-rate-free optimizers adapt the scale of their steps within a single run:
Mechanic (Cutkosky et al. 2023, arXiv:2306.00144) by online learning of the factor of another
optimizer's updates, Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101) by a lower bound on
the distance from theta_0 to a solution, in steps like Adam's. T inner steps in total, and a copy
of theta_0 in memory. Neither sets the shape of the schedule: optax recommends one that starts at 1
and is annealed (`annealed=True`), as in most experiments of these papers.

Meta-Regularization (Xie et al. 2021, arXiv:2104.05447) lets the rate fall from a first one as steps
get long: T inner steps for each first rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from metalearn._utils.checks import pick
from metalearn.algorithms import FDS, Hyperparameter, sgd
from metalearn.algorithms.fds.hyperparameter import numeric
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem
from metalearn.experiments.tuners.random_search import Ledger, losses
from metalearn.optimizers import meta_regularized


@dataclasses.dataclass(frozen=True)
class Cosine(Tuner):
    """One run per peak with a cosine and the optimizer of the problem; the best is the incumbent.

    Hyperparameters of the problem that are not set here have their initial values.

    Args:
      peaks: the learning rates at the first step.
      momentum: None: that of the problem.
      weight_decay: None: that of the problem.
    """

    peaks: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    momentum: float | None = 0.9
    weight_decay: float | None = 5e-4

    def __post_init__(self) -> None:
        if not self.peaks or min(self.peaks) <= 0:
            raise ValueError(
                f"A cosine falls from its peak to 0, so peaks are positive, and there is at least "
                f"one of them; not peaks={self.peaks}. Pass some, such as (0.01, 0.1, 1.0)."
            )

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        algorithm = self._algorithm(problem.algorithm)
        etas = [
            algorithm.init(key) | {"learning_rate": cosine(peak, algorithm.inner_steps)}
            for peak in self.peaks
        ]
        return _one_run_each(problem, algorithm, etas, budget, key)

    def _algorithm(self, algorithm: FDS) -> FDS:
        options = {"momentum": self.momentum, "weight_decay": self.weight_decay}
        fixed = {name: value for name, value in options.items() if value is not None}
        arguments = numeric(algorithm.optimizer)
        for name in ("learning_rate", *fixed):
            if name not in arguments:
                without = "" if name == "learning_rate" else f", or `Cosine({name}=None)`"
                raise ValueError(
                    f"`Cosine` sets the optimizer's {name}, and the problem's optimizer takes "
                    f"{', '.join(arguments) or 'nothing'}. Use one that takes it, such as "
                    f"`metalearn.algorithms.sgd`{without}."
                )
        rate = Hyperparameter(0.0, max(self.peaks), windows=algorithm.inner_steps)
        own = {name: Hyperparameter(0.0, max(1.0, value), value) for name, value in fixed.items()}
        chosen = {**algorithm.hyperparameters, "learning_rate": rate, **own}
        return dataclasses.replace(algorithm, hyperparameters=chosen)


@dataclasses.dataclass(frozen=True)
class LearningRateFree(Tuner):
    """One run with an optimizer that needs no learning rate, with its default options.

    It replaces the optimizer of the problem and its hyperparameters; those of the objective and of
    the augmentation have their initial values.

    Args:
      name: of `OPTIMIZERS`.
      annealed: whether the updates are scaled by a cosine from 1 to 0; else by 1.
    """

    name: str
    annealed: bool = False

    def __post_init__(self) -> None:
        pick(OPTIMIZERS, self.name, "learning-rate-free optimizer")

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        algorithm = self._algorithm(problem.algorithm)
        eta = algorithm.init(key)
        if self.annealed:
            eta |= {"learning_rate": cosine(1.0, algorithm.inner_steps)}
        return _one_run_each(problem, algorithm, [eta], budget, key)

    def _algorithm(self, algorithm: FDS) -> FDS:
        windows = algorithm.inner_steps if self.annealed else 1
        rate = Hyperparameter(0.0, 2.0, start=1.0, windows=windows)
        return _with_optimizer(algorithm, OPTIMIZERS[self.name], rate)


@dataclasses.dataclass(frozen=True)
class MetaRegularization(Tuner):
    """One run per first learning rate, which falls by itself; the best is the incumbent.

    SGD by `metalearn.optimizers.meta_regularized` replaces the optimizer of the problem and its
    hyperparameters; those of the objective and of the augmentation have their initial values.

    Args:
      rates: the first learning rates.
      scale: the length of a step, in units of the parameters, from which on the rate falls.
      divergence: of `metalearn.optimizers.meta_regularized`.
      momentum: of the steps.
    """

    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    scale: float = 1.0
    divergence: str = "adagrad_norm"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(
                f"A first learning rate is positive, and there is at least one; not "
                f"rates={self.rates}. Pass some, such as (0.1, 1.0)."
            )
        self._optimizer(self.rates[0])  # refuses a scale and a divergence

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        rate = Hyperparameter(0.0, max(self.rates))
        algorithm = _with_optimizer(problem.algorithm, self._optimizer, rate)
        etas = [
            algorithm.init(key) | {"learning_rate": jnp.asarray([first])} for first in self.rates
        ]
        return _one_run_each(problem, algorithm, etas, budget, key)

    def _optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        falling = meta_regularized(learning_rate, self.scale, self.divergence)
        return optax.chain(falling, optax.trace(self.momentum))


def cosine(peak: float, horizon: int) -> jax.Array:
    """Return the learning rate of every step, [T], from the peak down to almost 0."""
    return jnp.asarray(peak * (1 + np.cos(np.pi * np.arange(horizon) / horizon)) / 2)


def mechanic(learning_rate: float) -> optax.GradientTransformation:
    """Return Mechanic, which adapts the scale of SGD with momentum."""
    return contrib.mechanize(sgd(learning_rate, momentum=0.9))


def prodigy(learning_rate: float) -> optax.GradientTransformation:
    """Return Prodigy, `learning_rate` a factor of its estimated rate."""
    return contrib.prodigy(learning_rate)


OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "mechanic": mechanic,
    "prodigy": prodigy,
}


def _with_optimizer(
    algorithm: FDS, optimizer: Callable[[float], optax.GradientTransformation], rate: Hyperparameter
) -> FDS:
    """Return an algorithm with an optimizer of a learning rate in place of its own."""
    replaced = numeric(algorithm.optimizer)
    others = {n: h for n, h in algorithm.hyperparameters.items() if n not in replaced}
    chosen = {**others, "learning_rate": rate}
    return dataclasses.replace(algorithm, hyperparameters=chosen, optimizer=optimizer)


def _one_run_each(
    problem: TuningProblem, algorithm: FDS, etas: Sequence[Any], budget: float, key: jax.Array
) -> Iterator[Incumbent]:
    """Train with as many of the etas as the budget allows, in one batch."""
    ledger, validate, steps = Ledger(algorithm), problem.validator(algorithm), algorithm.inner_steps
    paid = etas[: int(budget // steps)]
    keys = jax.random.split(key, len(etas))[: len(paid)]
    for eta, loss in zip(paid, losses(validate, paid, keys, len(etas)), strict=True):
        yield ledger.charged(steps, eta, loss)
