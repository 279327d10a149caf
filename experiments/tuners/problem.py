"""A tuning problem: the same inner training run, splits and ranges for every tuner.

A candidate is an eta of FDS, coordinates per hyperparameter and window. What a tuner may do
with one is train it on a fresh split and look at the validation loss; what it is judged by is
the test loss of a run on all the training data, which no tuner sees.

Cost is counted in inner steps of plain training. A hypergradient is charged by its FLOPs: the
ratio of the compiled programs, loop trip counts included.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn import MetaGradient, Tasks
from metalearn.algorithms import FDS
from metalearn.cost import cost
from metalearn.engines.inner_loop import rollout


class Score(NamedTuple):
    """How a training run ended; not finite counts as the worst there is."""

    loss: jax.Array  # ()
    accuracy: jax.Array  # (), 0..1


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is tuned: `algorithm` names the hyperparameters, their windows and their ranges."""

    algorithm: FDS
    train: Tasks  # a fresh validation split per key
    final: Tasks  # all the training data, and the test set

    @functools.cached_property
    def bounds(self) -> tuple[Any, Any]:
        """Return the least and the largest eta."""
        found = self.algorithm.hyperparameters
        eta = jax.eval_shape(self.algorithm.init, jax.random.key(0))
        low, high = (
            {name: jnp.full_like(eta[name], found[name].bounds()[i]) for name in eta}
            for i in (0, 1)
        )
        return low, high

    def with_windows(self, windows: int) -> Problem:
        """Return the same, every hyperparameter in so many windows from one start."""
        found = self.algorithm.hyperparameters
        cut = {name: dataclasses.replace(h, windows=windows) for name, h in found.items()}
        return dataclasses.replace(
            self, algorithm=dataclasses.replace(self.algorithm, hyperparameters=cut)
        )

    def draw(self, key: jax.Array) -> Any:
        """Return an eta drawn uniformly from its coordinates' ranges."""
        low, high = self.bounds
        keys = jax.random.split(key, len(low))
        return {
            name: jax.random.uniform(k, low[name].shape, minval=low[name], maxval=high[name])
            for k, name in zip(keys, low, strict=True)
        }

    def validator(self, algorithm: FDS | None = None, inner_steps: int | None = None) -> Any:
        """Return (etas [n, ...], keys [n]) -> Score [n]: each trained on its own split. Compiled.

        Args:
          algorithm: one with other hyperparameters; None: the problem's.
          inner_steps: of shorter runs, the schedules stretched to them; None: its own.
        """
        algorithm = algorithm or self.algorithm
        return _compiled(algorithm.stretched(inner_steps or algorithm.inner_steps), self.train)

    def tester(self, algorithm: FDS | None = None) -> Any:
        """Return the same of runs on all the training data, judged on the test set."""
        return _compiled((algorithm or self.algorithm).evaluation(), self.final)

    def hypergradient(self, engine: MetaGradient) -> Any:
        """Return (eta, key) -> ((loss, aux), grads), on a fresh split. Compiled."""
        solve = _differentiated(self.algorithm, engine)
        return lambda eta, key: solve(eta, self.train, key)

    def charge(self, engine: MetaGradient, algorithm: FDS | None = None) -> float:
        """Return the price of one hypergradient in inner steps of plain training, by FLOPs.

        Args:
          engine: that takes it.
          algorithm: one with other hyperparameters; None: the problem's.
        """
        algorithm = algorithm or self.algorithm
        return algorithm.inner_steps * self._ratio(engine, algorithm)

    def _ratio(self, engine: MetaGradient, algorithm: FDS) -> float:
        key = jax.random.key(0)
        eta, keys = jax.eval_shape(algorithm.init, key), jax.random.split(key, 1)
        etas = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), eta)
        plain = cost(_plain(algorithm), etas, self.train, keys).flops
        ours = cost(_differentiated(algorithm, engine), eta, self.train, key).flops
        return ours / plain


def _compiled(algorithm: FDS, tasks: Tasks) -> Any:
    scores = _plain(algorithm)
    return lambda etas, keys: scores(etas, tasks, keys)


@functools.cache  # problems that differ in their data alone share a program
def _plain(algorithm: FDS) -> Any:
    @jax.jit
    def scores(etas: Any, tasks: Tasks, keys: jax.Array) -> Score:
        def one(eta: Any, key: jax.Array) -> Score:
            sample_key, unroll_key, batch_key = jax.random.split(key, 3)
            episode = tasks.sample(sample_key)
            unroll = algorithm.unroll(episode, unroll_key)
            loss, aux = rollout(unroll, eta, algorithm.batches(episode, batch_key))
            return Score(jnp.where(jnp.isfinite(loss), loss, jnp.inf), aux.metrics["accuracy"])

        return jax.vmap(one)(etas, keys)

    return scores


@functools.cache
def _differentiated(algorithm: FDS, engine: MetaGradient) -> Any:
    @jax.jit
    def solve(eta: Any, tasks: Tasks, key: jax.Array) -> Any:
        sample_key, unroll_key, batch_key = jax.random.split(key, 3)
        episode = tasks.sample(sample_key)
        unroll = algorithm.unroll(episode, unroll_key)
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode, batch_key))

    return solve
