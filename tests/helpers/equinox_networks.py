"""Two small networks as users of Equinox write them: for one example, with state and a key."""

import equinox as eqx
import jax
import jax.numpy as jnp


class MLP(eqx.Module):
    """A tanh network [width] -> [width]."""

    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width, *, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(width, 3, key=keys[0])
        self.head = eqx.nn.Linear(3, width, key=keys[1])

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


class ConvNet(eqx.Module):
    """A block of convolution, batch normalisation and ReLU, and a head, on [height, width, 1]."""

    convolution: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, image, outputs, filters, momentum=0.9, dropout=0.0, *, key):
        keys = jax.random.split(key)
        self.convolution = eqx.nn.Conv2d(1, filters, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(filters, "batch", momentum=momentum, mode="batch")
        size = filters * image[0] * image[1] // 4
        self.head = eqx.nn.Linear(size, outputs, key=keys[1])
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.convolution(jnp.moveaxis(x, -1, 0)), state)
        height, width = x.shape[1:]
        x = jnp.tanh(x).reshape(-1, height // 2, 2, width // 2, 2).mean((2, 4))
        return self.head(self.dropout(x.ravel(), key=key)), state
