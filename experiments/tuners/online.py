"""Hypergradient descent along a single training run: greedy, and with a fading memory.

After every inner step the hyperparameters move against the hypergradient of the loss right
now. How much of the past it sees is a decay mu of the tangents,

    S_{t+1} = mu (d theta_{t+1} / d theta_t) S_t + d theta_{t+1} / d eta
    eta_{t+1} = eta_t - rate * grad L_val(theta_{t+1}) . S_{t+1}

    mu = 0    greedy: HD (Baydin et al. 2018, arXiv:1703.04782), on validation data
    mu = 1    RTHO (Franceschi et al. 2017, arXiv:1703.01785)
    between   MARTHE (Donini et al. 2020, arXiv:1910.08525), with a fixed mu

None looks ahead, and the gain of a smaller learning rate now hides the loss of it later: such
methods decay the learning rate too early (Wu et al. 2018, arXiv:1803.02021). The answer is the
schedule that was found along the way, a value for each step.
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
from metalearn.experiments.tuners.problem import Problem
from metalearn.experiments.tuners.tuner import Found, Tuner


@dataclasses.dataclass(frozen=True)
class Online(Tuner):
    """One run for each rate; the answer is that of the rate that ends best on validation."""

    decay: float  # mu
    # Each a run: how far a hyperparameter moves in one step, in shares of its range per unit of
    # the hypergradient with respect to such a share.
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def tune(self, problem: Problem, budget: float, key: jax.Array) -> Iterator[Found]:
        """Yield the best schedule so far, after each run."""
        algorithm = constant(problem.algorithm)
        replayed = problem.algorithm.unshared()
        run, check = self.along(problem, algorithm), problem.validator(replayed)
        engine, spent, best = Forward(inexact_decay=self.decay), 0.0, None
        # A tangent for each hyperparameter, a validation gradient a step, and a run to compare.
        price = problem.charge(engine, algorithm) + 2 * problem.algorithm.inner_steps
        for i, rate in enumerate(self.rates):
            if spent + price > budget:
                return
            run_key, check_key = jax.random.split(jax.random.fold_in(key, i))
            eta = run(jnp.asarray(rate), run_key)
            loss = float(check(jax.tree.map(lambda x: x[None], eta), check_key[None]).loss[0])
            spent += price
            if best is None or loss < best.loss:
                best = Found(spent, replayed, eta, loss)
            yield best._replace(spent=spent)

    def along(self, problem: Problem, algorithm: FDS) -> Any:
        """Return (rate (), key) -> the value of every step, {name: [T, ...]}. Compiled."""
        engine = Forward(inexact_decay=self.decay)
        low, high = bounds(algorithm)

        @jax.jit
        def run(rate: jax.Array, tasks: Any, key: jax.Array) -> Any:
            sample_key, unroll_key, batch_key = jax.random.split(key, 3)
            episode = tasks.sample(sample_key)
            unroll = algorithm.unroll(episode, unroll_key)
            eta = algorithm.init(key)

            def step(carry: Any, batch: Any) -> Any:
                eta, stream = carry
                now = jax.tree.map(lambda x: x[None], batch)
                stream, inner = engine.advance(unroll, eta, stream, now)
                judged = algorithm.unroll(_drawn(episode, key, batch[0], algorithm.batch), key)
                _, grads = engine.finish(judged, eta, stream, inner)
                moved = jax.tree.map(
                    lambda x, g, a, b: _moved(x, g, a, b, rate), eta, grads, low, high
                )
                return (moved, stream), eta

            start = eta, engine.start(unroll, eta)
            _, path = jax.lax.scan(step, start, algorithm.batches(episode, batch_key))
            return jax.tree.map(lambda x: x[:, 0], path)

        return lambda rate, key: run(rate, problem.train, key)


def _drawn(episode: Episode, key: jax.Array, step: jax.Array, batch: int) -> Episode:
    """Return the episode with a batch of its validation rows: what a step can afford."""
    inputs, targets, rows = episode.query
    picked = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, len(rows))
    return episode._replace(query=(inputs, targets, rows[picked]))


def constant(algorithm: FDS) -> FDS:
    """Return the same with one window for each hyperparameter, from the first one's start."""
    single = {
        name: dataclasses.replace(h, windows=1, start=float(np.ravel(h.start)[0]))
        for name, h in algorithm.hyperparameters.items()
    }
    return dataclasses.replace(algorithm, hyperparameters=single)


def bounds(algorithm: FDS) -> tuple[Any, Any]:
    """Return the least and the largest coordinate of each hyperparameter, {name: ()}."""
    ends = {name: chosen.bounds() for name, chosen in algorithm.hyperparameters.items()}
    return {n: low for n, (low, _) in ends.items()}, {n: high for n, (_, high) in ends.items()}


def _moved(x: Any, grad: Any, low: Any, high: Any, rate: jax.Array) -> jax.Array:
    """Take one step in shares of the range; one that is not finite is no move."""
    width = high - low
    step = jnp.where(jnp.isfinite(grad), rate * grad * width, 0.0) * width
    return jnp.clip(x - step, low, high)
