"""Random search: candidates drawn uniformly, and what all black boxes share.

A black box trains a model with a candidate and sees one number, the validation loss. Drawing
candidates at random is the least one can do with that, and hard to beat where only a few of
many hyperparameters matter: a grid repeats their values, random candidates never do (Bergstra
& Bengio 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13). N windows of a
schedule are N dimensions, and a volume that shrinks with the power N is what it has to hit.

Uniform is meant in coordinates: uniform in the logarithm for `space="log"`.

`losses` trains candidates together, in one vmapped program, where that is the faster way.
`Ledger` accounts for them one by one all the same, so that no tuner is charged for the
padding of a batch, nor knows of a loss before it has paid for it.
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
from metalearn.experiments.tuners.problem import Problem
from metalearn.experiments.tuners.tuner import Found, Tuner


@dataclasses.dataclass(frozen=True)
class RandomSearch(Tuner):
    """Draw candidates uniformly in their ranges and keep the best."""

    batch: int = 16  # candidates trained at once; no matter for what is found or charged

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        steps, validate = problem.algorithm.inner_steps, problem.validator()
        draw_keys, run_keys = (
            jax.random.split(k, int(budget // steps)) for k in jax.random.split(key)
        )
        ledger = Ledger(problem.algorithm)
        for begin in range(0, len(run_keys), self.batch):
            now = slice(begin, begin + self.batch)
            etas = [problem.draw(k) for k in draw_keys[now]]
            seen = losses(validate, etas, run_keys[now], self.batch)
            for eta, loss in zip(etas, seen, strict=True):
                yield ledger.charged(steps, eta, loss)


@dataclasses.dataclass
class Ledger:
    """What was spent until now and the incumbent: the best of the longest runs.

    A run that diverged is worse than any other, however short that was.
    """

    algorithm: FDS  # whose etas are entered
    spent: float = 0.0  # inner steps
    eta: Any = None  # the incumbent
    rank: tuple[bool, int, float] = (True, 1, math.inf)  # diverged, -steps, loss: lower is better

    def charged(self, steps: int, eta: Any, loss: float) -> Found:
        """Enter a run of so many steps, and return the incumbent after it."""
        self.spent += steps
        rank = not math.isfinite(loss), -steps, loss
        if rank < self.rank:
            self.rank, self.eta = rank, eta
        return Found(self.spent, self.algorithm, self.eta, self.rank[-1])


def losses(validate: Any, etas: Sequence[Any], keys: jax.Array, batch: int) -> Iterator[float]:
    """Yield the validation loss of each candidate in order, not finite as inf.

    Args:
      validate: from `Problem.validator`. It is called with `batch` candidates each time, the
        last time padded, so that it is compiled once.
      etas: candidates.
      keys: [len(etas)], of their runs.
      batch: how many are trained at once.
    """
    for begin in range(0, len(etas), batch):
        rows = np.minimum(np.arange(begin, begin + batch), len(etas) - 1)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(etas[i] for i in rows))
        seen = np.asarray(validate(stacked, keys[rows]).loss)
        yield from np.where(np.isfinite(seen), seen, np.inf)[: len(etas) - begin].tolist()
