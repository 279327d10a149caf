"""A tuning problem, with the same training runs, splits and ranges for every tuner; and a tuner.

A candidate is an eta of FDS, coordinates per hyperparameter and window. A tuner trains candidates
on fresh splits and observes their validation loss; it is evaluated by the test loss of a run on all
the training data, which no tuner observes.

Cost is counted in inner steps of plain training. A hypergradient is charged by its FLOPs: the
ratio of the compiled programs, loop trip counts included.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn import Episode, MetaGradient, Tasks
from metalearn.algorithms import FDS
from metalearn.cost import cost
from metalearn.engines.inner_loop import rollout
from metalearn.unroll import Batch, Eta, Unroll


class Score(NamedTuple):
    """The result of a training run.

    loss: (), of the outer loss; infinite if it is not finite.
    accuracy: (), 0..1.
    """

    loss: jax.Array
    accuracy: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TuningProblem:
    """A training run whose hyperparameters are tuned.

    Args:
      algorithm: the training run, the hyperparameters, their windows and their ranges.
      train: tasks with a fresh validation split per key.
      final: the task with all the training data, and the test set.
    """

    algorithm: FDS
    train: Tasks
    final: Tasks

    @functools.cached_property
    def bounds(self) -> tuple[Any, Any]:
        """The least and the largest eta."""
        hyperparameters = self.algorithm.hyperparameters
        eta = jax.eval_shape(self.algorithm.init, jax.random.key(0))
        low, high = (
            {name: jnp.full_like(eta[name], hyperparameters[name].bounds()[i]) for name in eta}
            for i in (0, 1)
        )
        return low, high

    def with_windows(self, windows: int) -> TuningProblem:
        """Return the same problem with this number of windows for every hyperparameter."""
        hyperparameters = {
            name: dataclasses.replace(h, windows=windows)
            for name, h in self.algorithm.hyperparameters.items()
        }
        return dataclasses.replace(
            self, algorithm=dataclasses.replace(self.algorithm, hyperparameters=hyperparameters)
        )

    def draw(self, key: jax.Array) -> Eta:
        """Return an eta drawn uniformly from the ranges of its coordinates."""
        low, high = self.bounds
        keys = jax.random.split(key, len(low))
        return {
            name: jax.random.uniform(k, low[name].shape, minval=low[name], maxval=high[name])
            for k, name in zip(keys, low, strict=True)
        }

    def validator(self, algorithm: FDS | None = None, inner_steps: int | None = None) -> Any:
        """Return a compiled function (etas [n, ...], keys [n]) -> Score [n] of training runs.

        Every run has its own split into training and validation data.

        Args:
          algorithm: with other hyperparameters; None: that of the problem.
          inner_steps: of shorter runs, with schedules stretched to it; None: that of the algorithm.
        """
        algorithm = algorithm or self.algorithm
        return _compiled(algorithm.stretched(inner_steps or algorithm.inner_steps), self.train)

    def tester(self, algorithm: FDS | None = None) -> Any:
        """Return the same function for runs on all the training data, scored on the test set."""
        return _compiled((algorithm or self.algorithm).evaluation(), self.final)

    def hypergradient(self, engine: MetaGradient) -> Any:
        """Return a compiled function (eta, key) -> ((loss, aux), grads), on a fresh split."""
        solve = _differentiated(self.algorithm, engine)
        return lambda eta, key: solve(eta, self.train, key)

    def charge(self, engine: MetaGradient, algorithm: FDS | None = None) -> float:
        """Return the cost of one hypergradient in inner steps of plain training, by FLOPs.

        Args:
          engine: of the hypergradient.
          algorithm: with other hyperparameters; None: that of the problem.
        """
        algorithm = algorithm or self.algorithm
        key = jax.random.key(0)
        eta, keys = jax.eval_shape(algorithm.init, key), jax.random.split(key, 1)
        etas = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), eta)
        plain = cost(_plain(algorithm), etas, self.train, keys).flops
        differentiated = cost(_differentiated(algorithm, engine), eta, self.train, key).flops
        return algorithm.inner_steps * (differentiated / plain)


def _compiled(algorithm: FDS, tasks: Tasks) -> Any:
    scores = _plain(algorithm)
    return lambda etas, keys: scores(etas, tasks, keys)


def draw_run(algorithm: FDS, tasks: Tasks, key: jax.Array) -> tuple[Episode, Unroll, Batch]:
    """Return a training run drawn with a key: its episode, unroll and batches."""
    sample_key, unroll_key, batch_key = jax.random.split(key, 3)
    episode = tasks.sample(sample_key)
    return episode, algorithm.unroll(episode, unroll_key), algorithm.batches(episode, batch_key)


@functools.cache  # problems that differ only in their data share a program
def _plain(algorithm: FDS) -> Any:
    @jax.jit
    def scores(etas: Any, tasks: Tasks, keys: jax.Array) -> Score:
        def one(eta: Eta, key: jax.Array) -> Score:
            _, unroll, batches = draw_run(algorithm, tasks, key)
            loss, aux = rollout(unroll, eta, batches)
            return Score(jnp.where(jnp.isfinite(loss), loss, jnp.inf), aux.metrics["accuracy"])

        return jax.vmap(one)(etas, keys)

    return scores


@functools.cache
def _differentiated(algorithm: FDS, engine: MetaGradient) -> Any:
    @jax.jit
    def solve(eta: Eta, tasks: Tasks, key: jax.Array) -> Any:
        _, unroll, batches = draw_run(algorithm, tasks, key)
        return engine.value_and_grad(unroll, eta, batches)

    return solve


class Incumbent(NamedTuple):
    """The best candidate of a tuner so far.

    spent: the total cost so far, in inner steps of plain training.
    algorithm: the algorithm of `eta`: that of the problem, or one with other hyperparameters.
    eta: the candidate.
    loss: its validation loss; infinite if it is not finite.
    """

    spent: float
    algorithm: FDS
    eta: Eta
    loss: float


class Tuner(abc.ABC):
    """A method that tunes hyperparameters. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        """Yield the incumbent after every cost, until the budget is spent.

        Args:
          problem: what is tuned. The test set is not used.
          budget: inner steps of plain training; a run that costs more than the rest of it is not
            started.
          key: (), of all random draws.
        """
