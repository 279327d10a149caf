"""Black boxes that learn where to look: TPE, Hyperband, and both together. Needs Optuna.

Bayesian optimisation models the losses seen so far and tries what looks best under the model.
TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", NIPS) models the
candidates instead: a density l of the good ones, g of the others, and the next is the one of
a few drawn from l that has the largest l / g. Multivariate, l and g see the windows of a
schedule together. Not a Gaussian process: Optuna's needs torch, and costs the cube of the
number of runs. TPE only ranks losses, so that a run which diverged can be told as `WORST`.

Hyperband (Li et al. 2017, arXiv:1603.06560) makes bad candidates cheap instead: many short
runs, of which the best 1 / factor go on to runs `factor` times as long, and so on (successive
halving). A bracket is one such race; since a short run may mislead, there are brackets that
begin with few long ones too. With lengths T, T/3, T/9, T/27, as (candidates x steps):

    27 x T/27   9 x T/9   3 x T/3   1 x T                 4 T inner steps
                12 x T/9  4 x T/3   1 x T             3 2/3 T
                          6 x T/3   2 x T                 4 T
                                    4 x T                 4 T

Shorter means the schedule squeezed into the shorter run, which begins afresh, on a split of
its own: a squeezed schedule is another one from its first step on, so nothing can be resumed.

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
from metalearn.experiments.tuners.problem import Problem
from metalearn.experiments.tuners.random_search import Ledger, losses
from metalearn.experiments.tuners.tuner import Found, Tuner

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "Bayesian optimization and BOHB take their suggestions from Optuna, which is not "
        'installed. It comes with the extra: pip install "metalearn[tuners]"'
    ) from error

ENOUGH = 10  # runs of a length to model it by: Optuna's default
WORST = float(np.finfo(np.float32).max)  # what TPE is told of a run that diverged


@dataclasses.dataclass(frozen=True)
class BayesianOptimization(Tuner):
    """Try what TPE suggests, in runs of full length, one after the other."""

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        steps, validate = problem.algorithm.inner_steps, problem.validator()
        suggest_key, run_key = jax.random.split(key)
        suggestions, ledger = Suggestions(problem, suggest_key), Ledger(problem.algorithm)
        for run in jax.random.split(run_key, int(budget // steps)):
            eta = suggestions.draw()
            (loss,) = losses(validate, [eta], run[None], 1)
            suggestions.saw(eta, steps, loss)
            yield ledger.charged(steps, eta, loss)


@dataclasses.dataclass(frozen=True)
class Hyperband(Tuner):
    """Race random candidates over runs of growing length, bracket after bracket."""

    factor: int = 3  # the paper's eta: by which runs grow and candidates shrink
    rungs: int = 4  # lengths of runs, T the longest; fewer where windows would be empty
    batch: int = 4  # runs trained at once

    def __post_init__(self) -> None:
        if self.factor < 2 or self.rungs < 1 or self.batch < 1:
            raise ValueError(
                f"Hyperband has runs `factor` >= 2 times as long from rung to rung, `rungs` >= 1 "
                f"of them, trained by `batch` >= 1, and this is {self}."
            )

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        suggest_key, race_key = jax.random.split(key)
        return self.race(problem, budget, race_key, Suggestions(problem, suggest_key, uniform=1))

    def race(
        self, problem: Problem, budget: float, key: jax.Array, suggestions: Suggestions
    ) -> Iterator[Found]:
        """Yield what `tune` does, with candidates from `suggestions`."""
        lengths, ledger = self.lengths(problem.algorithm), Ledger(problem.algorithm)
        validate = {steps: problem.validator(inner_steps=steps) for steps in lengths}
        for rungs in itertools.cycle(self.brackets(lengths)):
            etas = [suggestions.draw() for _ in range(rungs[0][0])]
            for count, steps in rungs:
                key, rung_key = jax.random.split(key)
                paid = min(count, int((budget - ledger.spent) // steps))
                keys, etas, seen = jax.random.split(rung_key, paid), etas[:paid], []
                results = losses(validate[steps], etas, keys, self.batch)
                for eta, loss in zip(etas, results, strict=True):
                    suggestions.saw(eta, steps, loss)
                    seen.append(loss)
                    yield ledger.charged(steps, eta, loss)
                if paid < count:
                    return
                etas = [etas[i] for i in np.argsort(seen, kind="stable")]

    def lengths(self, algorithm: FDS) -> list[int]:
        """Return the lengths of runs, the longest first: T, T / factor, ..., rounded up."""
        found = [algorithm.inner_steps]
        for rung in range(1, self.rungs):
            steps = -(-algorithm.inner_steps // self.factor**rung)
            try:
                algorithm.stretched(steps)
            except ValueError:  # too short for all its windows
                break
            found.append(steps)
        return list(dict.fromkeys(found))

    def brackets(self, lengths: list[int]) -> list[list[tuple[int, int]]]:
        """Return one race a length, that of the most candidates first: [(candidates, steps)]."""
        found = []
        for last in reversed(range(len(lengths))):
            count = -(-len(lengths) * self.factor**last // (last + 1))
            sizes = [count // self.factor**rung for rung in range(last + 1)]
            found.append(list(zip(sizes, lengths[last::-1], strict=True)))
        return found


@dataclasses.dataclass(frozen=True)
class BOHB(Tuner):
    """Race candidates that TPE suggests."""

    hyperband: Hyperband = Hyperband()
    uniform: float = 1 / 3  # share of candidates that are drawn uniformly all the same

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        suggest_key, race_key = jax.random.split(key)
        suggestions = Suggestions(problem, suggest_key, self.uniform)
        return self.hyperband.race(problem, budget, race_key, suggestions)


class Suggestions:
    """Candidates by TPE, on the longest runs of which there are enough; until then uniform.

    Every entry of an eta is a parameter to Optuna, such as "learning_rate[3]". Runs of each
    length are a study of their own, since losses of different lengths do not compare.
    """

    def __init__(self, problem: Problem, key: jax.Array, uniform: float = 0.0) -> None:
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
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # `saw` enters what comes of it
        entries = iter([trial.params[entry] for entry in self._space])
        return {
            name: jnp.array([next(entries) for _ in range(low.size)], float).reshape(low.shape)
            for name, low in self._problem.bounds[0].items()
        }

    def saw(self, eta: Any, steps: int, loss: float) -> None:
        """Take note of how a run of so many steps ended."""
        if steps not in self._studies:
            self._studies[steps] = _study(jax.random.fold_in(self._key, steps))
        told = optuna.create_trial(
            params=_flat(eta), distributions=self._space, value=min(loss, WORST)
        )
        self._studies[steps].add_trial(told)

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
    """Return {"learning_rate[3]": coordinate}, every entry of every array."""
    return {
        f"{name}{list(index)}": float(x)
        for name, leaf in eta.items()
        for index, x in np.ndenumerate(np.asarray(leaf))
    }
