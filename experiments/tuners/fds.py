"""FDS as a tuner: hypergradients of the whole run with an outer rule, charged by their FLOPs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from metalearn import MetaGradient, MixedFlow
from metalearn.algorithms import fds_rule
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem


@dataclasses.dataclass(frozen=True)
class Hypergradients(Tuner):
    """Micaelli & Storkey 2021 (arXiv:2007.07869), its outer rule with a tolerance, in any space.

    With `tolerance=None, annealed=False` the rule is that of the paper. The cost of a hypergradient
    is that of `TuningProblem.charge`.

    Args:
      steps: number of hypergradients.
      share: the first step size, as a share of each range.
      tolerance: see `metalearn.algorithms.fds_rule`.
      annealed: whether the step sizes fall linearly to a tenth over the steps.
      engine: of the hypergradients.
      windows: of every hyperparameter; None: those of the problem.
    """

    steps: int = 10
    share: float = 0.1
    tolerance: float | None = 0.1
    annealed: bool = True
    engine: MetaGradient = MixedFlow("nested")
    windows: int | None = None

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        """Yield the last accepted eta after each hypergradient."""
        schedule = optax.linear_schedule(1.0, 0.1, self.steps - 1) if self.annealed else None
        problem = problem if self.windows is None else problem.with_windows(self.windows)
        learned = problem.algorithm.hyperparameters
        rule = fds_rule(learned, self.share, tolerance=self.tolerance, schedule=schedule)
        eta = problem.algorithm.init(key)
        state, cost, spent = rule.init(eta), problem.charge(self.engine), 0.0
        solve = problem.hypergradient(self.engine)
        update = jax.jit(functools.partial(_updated, rule))
        for i in range(min(self.steps, int(budget // cost))):
            (loss, _), grads = solve(eta, jax.random.fold_in(key, i))
            eta, state = update(grads, state, eta, loss)
            spent += cost
            yield Incumbent(spent, problem.algorithm, state.base, float(state.best))


def _updated(rule: Any, grads: Any, state: Any, eta: Any, loss: jax.Array) -> tuple[Any, Any]:
    updates, state = rule.update(grads, state, eta, value=loss)
    return optax.apply_updates(eta, updates), state
