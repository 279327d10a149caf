"""Random search: candidates drawn uniformly; and the accounting of all black-box tuners.

A black-box tuner trains a model with a candidate and observes one number, the validation loss.
Random candidates are the simplest such tuner, and hard to beat if only a few of many
hyperparameters matter: a grid repeats their values, random candidates do not (Bergstra & Bengio
2012, "Random Search for Hyper-Parameter Optimization", JMLR 13). N windows of a schedule are N
dimensions, and the share of good candidates falls as the power N.

Candidates are uniform in their coordinates: in the logarithm for `space="log"`.

`losses` trains candidates in batches, in one vmapped program. `Ledger` charges each candidate
separately, so that a tuner neither pays for the padding of a batch nor uses a loss before its cost
is charged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.algorithms import FDS
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem


@dataclasses.dataclass(frozen=True)
class RandomSearch(Tuner):
    """The best of candidates drawn uniformly in their ranges.

    Args:
      batch: candidates trained at once; it changes neither the result nor the cost.
    """

    batch: int = 16

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        steps, validate = problem.algorithm.inner_steps, problem.validator()
        draw_keys, run_keys = (
            jax.random.split(k, int(budget // steps)) for k in jax.random.split(key)
        )
        ledger = Ledger(problem.algorithm)
        for begin in range(0, len(run_keys), self.batch):
            rows = slice(begin, begin + self.batch)
            etas = [problem.draw(k) for k in draw_keys[rows]]
            results = losses(validate, etas, run_keys[rows], self.batch)
            for eta, loss in zip(etas, results, strict=True):
                yield ledger.charged(steps, eta, loss)


@dataclasses.dataclass
class Ledger:
    """The cost so far and the incumbent, the best of the longest runs.

    A run that diverged is worse than any finite run of any length.

    Args:
      algorithm: of the candidates.
      spent: inner steps so far.
      eta: the incumbent.
      rank: (diverged, -steps, loss) of the incumbent; lower is better.
    """

    algorithm: FDS
    spent: float = 0.0
    eta: Any = None
    rank: tuple[bool, int, float] = (True, 1, math.inf)

    def charged(self, steps: int, eta: Any, loss: float) -> Incumbent:
        """Charge a run of this many steps, and return the incumbent after it."""
        self.spent += steps
        rank = not math.isfinite(loss), -steps, loss
        if rank < self.rank:
            self.rank, self.eta = rank, eta
        return Incumbent(self.spent, self.algorithm, self.eta, self.rank[-1])


def losses(validate: Any, etas: Sequence[Any], keys: jax.Array, batch: int) -> Iterator[float]:
    """Yield the validation loss of each candidate in order; infinite if it is not finite.

    Args:
      validate: from `TuningProblem.validator`. Every call has `batch` candidates, the last one with
        padding, so that it is compiled once.
      etas: the candidates.
      keys: [len(etas)], of their runs.
      batch: candidates trained at once.
    """
    for begin in range(0, len(etas), batch):
        rows = np.minimum(np.arange(begin, begin + batch), len(etas) - 1)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(etas[i] for i in rows))
        batch_losses = np.asarray(validate(stacked, keys[rows]).loss)
        finite = np.where(np.isfinite(batch_losses), batch_losses, np.inf)
        yield from finite[: len(etas) - begin].tolist()
