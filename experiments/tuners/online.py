"""Hypergradient descent during a single training run: greedy, or with decaying tangents.

After every inner step the hyperparameters take a step against the hypergradient of the current
validation loss. The tangents S decay by mu, which limits how far back the hypergradient reaches,

    S_{t+1} = mu (d theta_{t+1} / d theta_t) S_t + d theta_{t+1} / d eta
    eta_{t+1} = eta_t - rate * grad L_val(theta_{t+1}) . S_{t+1}

    mu = 0    greedy: HD (Baydin et al. 2018, arXiv:1703.04782), on validation data
    mu = 1    RTHO (Franceschi et al. 2017, arXiv:1703.01785)
    between   MARTHE (Donini et al. 2020, arXiv:1910.08525), with a fixed mu

None of them accounts for later steps, where a smaller learning rate costs more than it gains now:
such methods decay the learning rate too early (Wu et al. 2018, arXiv:1803.02021). The result is the
schedule of the run, a value for each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn import Episode, Forward
from metalearn.algorithms import FDS
from metalearn.experiments.tuners.problem import Incumbent, Tuner, TuningProblem, draw_run


@dataclasses.dataclass(frozen=True)
class Online(Tuner):
    """One run per rate; the incumbent is the schedule with the best final validation loss.

    Args:
      decay: mu.
      rates: of the hypergradient descent, one run each, with every hyperparameter in units of its
        range.
    """

    decay: float
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def tune(self, problem: TuningProblem, budget: float, key: jax.Array) -> Iterator[Incumbent]:
        """Yield the best schedule so far, after each run."""
        algorithm = constant(problem.algorithm)
        replayed = problem.algorithm.unshared()
        run, check = self.along(problem, algorithm), problem.validator(replayed)
        engine, spent, best = Forward(inexact_decay=self.decay), 0.0, None
        # A tangent per hyperparameter, a validation gradient per step, and a run with the schedule.
        cost = problem.charge(engine, algorithm) + 2 * problem.algorithm.inner_steps
        for i, rate in enumerate(self.rates):
            if spent + cost > budget:
                return
            run_key, check_key = jax.random.split(jax.random.fold_in(key, i))
            eta = run(jnp.asarray(rate), run_key)
            loss = float(check(jax.tree.map(lambda x: x[None], eta), check_key[None]).loss[0])
            spent += cost
            if best is None or loss < best.loss:
                best = Incumbent(spent, replayed, eta, loss)
            yield best._replace(spent=spent)

    def along(self, problem: TuningProblem, algorithm: FDS) -> Any:
        """Return a compiled function (rate (), key) -> eta of every step, {name: [T, ...]}."""
        engine = Forward(inexact_decay=self.decay)
        low, high = bounds(algorithm)

        @jax.jit
        def run(rate: jax.Array, tasks: Any, key: jax.Array) -> Any:
            episode, unroll, batches = draw_run(algorithm, tasks, key)
            eta = algorithm.init(key)

            def step(carry: Any, batch: Any) -> Any:
                eta, stream = carry
                segment = jax.tree.map(lambda x: x[None], batch)
                stream, inner = engine.advance(unroll, eta, stream, segment)
                sampled = _sampled_query(episode, key, batch[0], algorithm.batch)
                _, grads = engine.finish(algorithm.unroll(sampled, key), eta, stream, inner)
                updated = jax.tree.map(
                    lambda x, g, a, b: _updated(x, g, a, b, rate), eta, grads, low, high
                )
                return (updated, stream), eta

            start = eta, engine.start(unroll, eta)
            _, path = jax.lax.scan(step, start, batches)
            return jax.tree.map(lambda x: x[:, 0], path)

        return lambda rate, key: run(rate, problem.train, key)


def _sampled_query(episode: Episode, key: jax.Array, step: jax.Array, batch: int) -> Episode:
    """Return the episode with a random batch of its validation rows."""
    inputs, targets, rows = episode.query
    sample = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, len(rows))
    return episode._replace(query=(inputs, targets, rows[sample]))


def constant(algorithm: FDS) -> FDS:
    """Return the same algorithm with one window per hyperparameter, from the first start value."""
    single = {
        name: dataclasses.replace(h, windows=1, start=float(np.ravel(h.start)[0]))
        for name, h in algorithm.hyperparameters.items()
    }
    return dataclasses.replace(algorithm, hyperparameters=single)


def bounds(algorithm: FDS) -> tuple[Any, Any]:
    """Return the least and the largest coordinate of each hyperparameter, {name: ()}."""
    ends = {name: chosen.bounds() for name, chosen in algorithm.hyperparameters.items()}
    return {n: low for n, (low, _) in ends.items()}, {n: high for n, (_, high) in ends.items()}


def _updated(x: Any, grad: Any, low: Any, high: Any, rate: jax.Array) -> jax.Array:
    """Return x after one step in units of the range; a non-finite gradient changes nothing."""
    width = high - low
    step = jnp.where(jnp.isfinite(grad), rate * grad * width, 0.0) * width
    return jnp.clip(x - step, low, high)
