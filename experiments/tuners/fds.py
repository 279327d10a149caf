"""FDS as a tuner: hypergradients of the whole run, an outer rule, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from metalearn import MetaGradient, MixedFlow
from metalearn.algorithms import fds_rule
from metalearn.experiments.tuners.problem import Problem
from metalearn.experiments.tuners.tuner import Found, Tuner


@dataclasses.dataclass(frozen=True)
class Hypergradients(Tuner):
    """Micaelli & Storkey 2021 (arXiv:2007.07869), its outer rule guarded and in any space.

    A hypergradient is charged by its FLOPs, as so many plain runs (`Problem.charge`).
    """

    steps: int = 10  # hypergradients
    share: float = 0.1  # of each range: the first step
    tolerance: float | None = 0.1  # None, and not annealed: the rule of the paper
    annealed: bool = True  # moves shrink to a tenth over the steps
    engine: MetaGradient = MixedFlow("nested")
    windows: int | None = None  # of every hyperparameter; None: those it has

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        """Yield the last eta that was not taken back, after each hypergradient."""
        schedule = optax.linear_schedule(1.0, 0.1, self.steps - 1) if self.annealed else None
        problem = problem if self.windows is None else problem.with_windows(self.windows)
        learned = problem.algorithm.hyperparameters
        rule = fds_rule(learned, self.share, tolerance=self.tolerance, schedule=schedule)
        eta = problem.algorithm.init(key)
        state, price, spent = rule.init(eta), problem.charge(self.engine), 0.0
        solve = problem.hypergradient(self.engine)
        move = jax.jit(functools.partial(_moved, rule))
        for i in range(min(self.steps, int(budget // price))):
            (loss, _), grads = solve(eta, jax.random.fold_in(key, i))
            eta, state = move(grads, state, eta, loss)
            spent += price
            yield Found(spent, problem.algorithm, state.base, float(state.best))


def _moved(rule: Any, grads: Any, state: Any, eta: Any, loss: jax.Array) -> tuple[Any, Any]:
    updates, state = rule.update(grads, state, eta, value=loss)
    return optax.apply_updates(eta, updates), state
