"""A small network whose hyperparameters FDS learns over a long run."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metalearn import Episode
from metalearn.algorithms import (
    FDS,
    Hyperparameter,
    sgd,
    weighted_cross_entropy,
)
from metalearn.models import Functions

KEY = jax.random.key(0)
HORIZON = 200


def make_network():
    def init(key):
        keys = jax.random.split(key)
        return [jax.random.normal(k, s) / 3 for k, s in zip(keys, ((6, 5), (5, 3)), strict=True)]

    return Functions(init, lambda params, x: jnp.tanh(x @ params[0]) @ params[1])


def make_episode():
    inputs = jax.random.normal(jax.random.key(1), (60, 6))
    targets = jnp.argmax(inputs[:, :3] + inputs[:, 3:] ** 2, axis=1)
    return Episode((inputs, targets, jnp.arange(40)), (inputs, targets, jnp.arange(40, 60)))


def make(hyperparameters=None, inner_steps=HORIZON, optimizer=sgd, **options):
    chosen = hyperparameters or {"learning_rate": Hyperparameter(0.0, 1.0, 0.1)}
    options = {"objective": weighted_cross_entropy, **options}
    return FDS(make_network(), chosen, inner_steps, batch=8, optimizer=optimizer, **options)


def solve(algorithm, engine, eta=None, episode=None):
    eta = algorithm.init(KEY) if eta is None else eta
    episode = episode or make_episode()

    @jax.jit
    def run(eta):
        unroll = algorithm.unroll(episode, KEY)
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode, KEY))

    return run(eta)


def flat(tree):
    return ravel_pytree(tree)[0]
