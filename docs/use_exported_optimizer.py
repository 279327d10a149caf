"""A learned optimizer outside of metalearn: load the file, and use it as any optax optimizer.

    python docs/use_exported_optimizer.py learned.safetensors

The file is what `metalearn.algorithms.save_optimizer(path, rule, eta)` wrote. Here it trains
the same small network in Flax linen, Flax NNX and Haiku, each under `jax.jit`.
"""

import sys

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from metalearn.algorithms import load_optimizer

X = jnp.linspace(-2.0, 2.0, 64).reshape(-1, 1)
Y = jnp.sin(2 * X)


class LinenMLP(nn.Module):
    """Flax linen."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(16)(x)))


class NNXMLP(nnx.Module):
    """Flax NNX."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def linen_model():
    """Return (parameters, the function of them and of inputs)."""
    model = LinenMLP()
    return model.init(jax.random.key(0), X), model.apply


def nnx_model():
    """The same, of NNX: the model is split into its graph and its parameters."""
    graph, params = nnx.split(NNXMLP(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def haiku_model():
    """The same, of Haiku."""
    model = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([16, 1], activation=jnp.tanh)(x))
    )
    return model.init(jax.random.key(0), X), model.apply


def train(optimizer, params, apply, steps=200):
    """Return the loss before and after some steps."""

    def loss(params):
        return jnp.mean((apply(params, X) - Y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = loss(params), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return float(before), float(loss(params))


if __name__ == "__main__":
    learned = load_optimizer(sys.argv[1])
    for model in (linen_model, nnx_model, haiku_model):
        before, after = train(learned, *model())
        print(f"{model.__name__}: {before:.4f} -> {after:.4f}")
