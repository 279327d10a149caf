"""An inner loop whose state has a leaf of every kind, for tests of segmented unrolls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn import Algorithm, Episode, MixedFlow, Tasks, Trainer, Unroll

MIXED = MixedFlow()
MIX = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0]], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aims(Tasks):
    """Points to go to."""

    def sample(self, key):
        return Episode(None, jax.random.normal(key, (3,)))


@dataclasses.dataclass(frozen=True)
class Walk(Algorithm):
    """Noisy descent with a state that has a leaf of every kind, each of which the steps read."""

    steps: int = 13

    def init(self, key):
        return {"rate": 0.02 + 0.01 * jax.random.uniform(key, (4,)), "start": jnp.ones(3)}

    def unroll(self, episode, key):
        def init(eta):
            theta = jnp.tanh(eta["start"]) + jax.random.normal(key, (3,))
            count, flag = jnp.zeros((), jnp.int32), jnp.asarray(False)
            return {"theta": theta, "count": count, "key": key, "flag": flag}

        def step(eta, state, batch, grad):
            key, noise_key = jax.random.split(state["key"])
            aim = episode.query + 0.1 * jax.random.normal(noise_key, (3,))
            slope = grad(lambda x: jnp.sum(jnp.tanh(MIX @ (x - aim)) ** 2))(state["theta"])
            rate = eta["rate"][state["count"] % 4] * (1 + batch / 100)
            theta = state["theta"] - jnp.where(state["flag"], rate, 2 * rate) * slope
            count, flag = state["count"] + 1, ~state["flag"]
            return {"theta": theta, "count": count, "key": key, "flag": flag}

        def loss(eta, state):
            return jnp.sum((state["theta"] - episode.query) ** 2) + eta["rate"].sum(), {}

        return Unroll(init, step, loss)

    def batches(self, episode, key):
        return jnp.arange(self.steps)


def trainer_of(walk, engine=MIXED, segment=2, **options):
    """A trainer of two tasks, whose outer update is the negative meta-gradient."""
    return Trainer(walk, engine, optax.sgd(1.0), tasks_per_step=2, segment=segment, **options)
