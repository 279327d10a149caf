"""Black-box tuners with a model or early stopping: TPE, Hyperband, and BOHB. Needs Optuna.

Bayesian optimisation fits a model to the observed losses and tries the best candidate of the model.
TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", NIPS) models the
candidates instead: a density l of the good ones, g of the others; the next candidate is the one of
a few drawn from l with the largest l / g. l and g are multivariate, over all windows of a schedule.
Optuna's Gaussian process is not used: it needs torch, and costs the cube of the number of runs. TPE
only ranks losses, so a run that diverged is recorded with the loss `WORST`.

Hyperband (Li et al. 2017, arXiv:1603.06560) makes bad candidates cheap instead: many short
runs, of which the best 1 / factor are continued by runs `factor` times as long, and so on
(successive halving). One such sequence is a bracket; as short runs may mislead, there are also
brackets that start with few long runs. With lengths T, T/3, T/9, T/27, as (candidates x steps):

    27 x T/27   9 x T/9   3 x T/3   1 x T                 4 T inner steps
                12 x T/9  4 x T/3   1 x T             3 2/3 T
                          6 x T/3   2 x T                 4 T
                                    4 x T                 4 T

A shorter run has the schedule compressed to its length, a fresh start and a split of its own: a
compressed schedule differs from its first step on, so a shorter run cannot be resumed.

BOHB (Falkner et al. 2018, arXiv:1807.01774) draws Hyperband's candidates from TPE, except for
a third of them, and models the longest runs of which there are enough.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.algorithms import FDS
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem
from metalearn.experiments.tuners.random_search import Ledger, losses

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "Bayesian optimization and BOHB take their suggestions from Optuna, which is not "
        'installed. It comes with the extra: pip install "metalearn-jax[tuners]"'
    ) from error

ENOUGH = 10  # runs of one length before they are modelled: Optuna's default
WORST = float(np.finfo(np.float32).max)  # the loss of a run that diverged


@dataclasses.dataclass(frozen=True)
class BayesianOptimization(Tuner):
    """Runs of full length with candidates of TPE, one after the other."""

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        steps, validate = problem.algorithm.inner_steps, problem.validator()
        suggest_key, run_key = jax.random.split(key)
        suggestions, ledger = Suggestions(problem, suggest_key), Ledger(problem.algorithm)
        for run in jax.random.split(run_key, int(budget // steps)):
            eta = suggestions.draw()
            (loss,) = losses(validate, [eta], run[None], 1)
            suggestions.record(eta, steps, loss)
            yield ledger.charged(steps, eta, loss)


@dataclasses.dataclass(frozen=True)
class Hyperband(Tuner):
    """Successive halving of random candidates over runs of growing length, in brackets.

    Args:
      factor: the paper's eta, by which runs get longer and candidates fewer.
      rungs: the number of lengths of runs, T the longest; fewer where windows would be empty.
      batch: runs trained at once.
    """

    factor: int = 3
    rungs: int = 4
    batch: int = 4

    def __post_init__(self) -> None:
        if self.factor < 2 or self.rungs < 1 or self.batch < 1:
            raise ValueError(
                f"Hyperband has runs `factor` >= 2 times as long from rung to rung, `rungs` >= 1 "
                f"of them, trained by `batch` >= 1, and this is {self}."
            )

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        suggest_key, race_key = jax.random.split(key)
        return self.race(problem, budget, race_key, Suggestions(problem, suggest_key, uniform=1))

    def race(
        self, problem: TuningProblem, budget: float, key: jax.Array, suggestions: Suggestions
    ) -> Iterator[Incumbent]:
        """Yield the incumbents of `tune`, with candidates from `suggestions`."""
        lengths, ledger = self.lengths(problem.algorithm), Ledger(problem.algorithm)
        validate = {steps: problem.validator(inner_steps=steps) for steps in lengths}
        for rungs in itertools.cycle(self.brackets(lengths)):
            etas = [suggestions.draw() for _ in range(rungs[0][0])]
            for count, steps in rungs:
                key, rung_key = jax.random.split(key)
                paid = min(count, int((budget - ledger.spent) // steps))
                keys, etas, observed = jax.random.split(rung_key, paid), etas[:paid], []
                results = losses(validate[steps], etas, keys, self.batch)
                for eta, loss in zip(etas, results, strict=True):
                    suggestions.record(eta, steps, loss)
                    observed.append(loss)
                    yield ledger.charged(steps, eta, loss)
                if paid < count:
                    return
                etas = [etas[i] for i in np.argsort(observed, kind="stable")]

    def lengths(self, algorithm: FDS) -> list[int]:
        """Return the lengths of runs, the longest first: T, T / factor, ..., rounded up."""
        lengths = [algorithm.inner_steps]
        for rung in range(1, self.rungs):
            steps = -(-algorithm.inner_steps // self.factor**rung)
            try:
                algorithm.stretched(steps)
            except ValueError:  # too short for all its windows
                break
            lengths.append(steps)
        return list(dict.fromkeys(lengths))

    def brackets(self, lengths: list[int]) -> list[list[tuple[int, int]]]:
        """Return a bracket per length, with the most candidates first: [(candidates, steps)]."""
        brackets = []
        for last in reversed(range(len(lengths))):
            count = -(-len(lengths) * self.factor**last // (last + 1))
            sizes = [count // self.factor**rung for rung in range(last + 1)]
            brackets.append(list(zip(sizes, lengths[last::-1], strict=True)))
        return brackets


@dataclasses.dataclass(frozen=True)
class BOHB(Tuner):
    """Hyperband with candidates of TPE.

    Args:
      hyperband: its brackets.
      uniform: the share of candidates that are still drawn uniformly.
    """

    hyperband: Hyperband = Hyperband()
    uniform: float = 1 / 3

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        suggest_key, race_key = jax.random.split(key)
        suggestions = Suggestions(problem, suggest_key, self.uniform)
        return self.hyperband.race(problem, budget, race_key, suggestions)


class Suggestions:
    """Candidates of TPE, fitted to the longest runs of which there are enough; before, uniform.

    Every entry of an eta is a parameter of Optuna, such as "learning_rate[3]". Each length of runs
    has its own study, as losses of runs of different lengths are not comparable.
    """

    def __init__(self, problem: TuningProblem, key: jax.Array, uniform: float = 0.0) -> None:
        self._problem, self._key, self._uniform = problem, key, uniform
        self._studies: dict[int, optuna.Study] = {}
        low, high = (_flat(bound) for bound in problem.bounds)
        self._space: dict[str, optuna.distributions.BaseDistribution] = {
            entry: optuna.distributions.FloatDistribution(low[entry], high[entry]) for entry in low
        }

    def draw(self) -> Any:
        """Return the next candidate, an eta."""
        self._key, draw_key, choice_key = jax.random.split(self._key, 3)
        modelled = [steps for steps in self._studies if self._count(steps) >= ENOUGH]
        if not modelled or jax.random.uniform(choice_key) < self._uniform:
            return self._problem.draw(draw_key)
        study = self._studies[max(modelled)]
        trial = study.ask(self._space)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # `record` adds the result
        entries = iter([trial.params[entry] for entry in self._space])
        return {
            name: jnp.array([next(entries) for _ in range(low.size)], float).reshape(low.shape)
            for name, low in self._problem.bounds[0].items()
        }

    def record(self, eta: Any, steps: int, loss: float) -> None:
        """Add the result of a run of this many steps."""
        if steps not in self._studies:
            self._studies[steps] = _study(jax.random.fold_in(self._key, steps))
        trial = optuna.create_trial(
            params=_flat(eta), distributions=self._space, value=min(loss, WORST)
        )
        self._studies[steps].add_trial(trial)

    def _count(self, steps: int) -> int:
        complete = (optuna.trial.TrialState.COMPLETE,)
        return len(self._studies[steps].get_trials(deepcopy=False, states=complete))


def _study(key: jax.Array) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(jax.random.bits(key, dtype=jnp.uint32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(n_startup_trials=ENOUGH, multivariate=True, seed=seed)
    return optuna.create_study(sampler=sampler)


def _flat(eta: Any) -> dict[str, float]:
    """Return every entry of every array by name: {"learning_rate[3]": coordinate}."""
    return {
        f"{name}{list(index)}": float(x)
        for name, leaf in eta.items()
        for index, x in np.ndenumerate(np.asarray(leaf))
    }
