"""Networks that are applied to every parameter: from features to a direction and a magnitude.

One set of weights, a few thousand numbers, is shared by all parameters of all models: a parameter
is an element of a batch. The cost of an update is that of a small network on a batch of as many
elements as the model has parameters; it does not depend on the batch that the model is trained on.

The last layer is initially zero: an untrained rule with a base is equal to its base, and one
without a base has updates of zero.

References: Andrychowicz et al. 2016 (arXiv:1606.04474) for a recurrent network per parameter;
Metz et al. 2020 (arXiv:2009.11243) for features that make a small feed-forward one enough.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.checks import widths

OUTPUTS = 2  # a direction and the logarithm of a magnitude


class Network(abc.ABC):
    """A network for one parameter. Subclasses are frozen dataclasses of pure functions."""

    @abc.abstractmethod
    def init(self, key: jax.Array, features: int) -> Any:
        """Return weights for this number of features: any pytree of floating-point arrays."""

    def start(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the initial recurrent state for a tensor; by default there is none: `()`."""
        del shape, dtype
        return ()

    @abc.abstractmethod
    def apply(self, weights: Any, hidden: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Return (outputs [..., 2], next recurrent state) for features x [..., features].

        Weights, the recurrent state `hidden` and x have the same dtype.
        """


@dataclasses.dataclass(frozen=True)
class PointwiseMLP(Network):
    """Dense layers with ReLU between them.

    Args:
      hidden: the widths of the hidden layers.
    """

    hidden: tuple[int, ...] = (32, 32)

    def __post_init__(self) -> None:
        hidden: Any = self.hidden
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise TypeError(
                f"`PointwiseMLP(hidden={self.hidden!r})`: it is a tuple of widths, such as "
                "hidden=(32, 32)."
            )
        widths("PointwiseMLP", hidden=self.hidden)

    def init(self, key: jax.Array, features: int) -> list[dict[str, jax.Array]]:
        """Return the layers [{"w": [a, b], "b": [b]}]; the last is zero."""
        sizes = [features, *self.hidden]
        keys = jax.random.split(key, max(len(self.hidden), 1))
        layers = [_dense(k, a, b) for k, a, b in zip(keys, sizes, self.hidden, strict=False)]
        return [*layers, _zeros(sizes[-1], OUTPUTS)]

    def apply(self, weights: Any, hidden: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        for layer in weights[:-1]:
            x = jax.nn.relu(_affine(layer, x))
        return _affine(weights[-1], x), hidden


@dataclasses.dataclass(frozen=True)
class PointwiseGRU(Network):
    """A gated recurrent unit with a recurrent state per parameter.

    Args:
      hidden: the width of the recurrent state.
    """

    hidden: int = 8

    def __post_init__(self) -> None:
        widths("PointwiseGRU", hidden=(self.hidden,))

    def init(self, key: jax.Array, features: int) -> dict[str, Any]:
        """Return the layers "gates" (update and reset), "candidate" and "out", which is zero."""
        gates, candidate = jax.random.split(key)
        return {
            "gates": _dense(gates, features + self.hidden, 2 * self.hidden),
            "candidate": _dense(candidate, features + self.hidden, self.hidden),
            "out": _zeros(self.hidden, OUTPUTS),
        }

    def start(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros((*shape, self.hidden), dtype)

    def apply(self, weights: Any, hidden: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        gates = jax.nn.sigmoid(_affine(weights["gates"], jnp.concatenate([x, hidden], -1)))
        update, reset = jnp.split(gates, 2, -1)
        inputs = jnp.concatenate([x, reset * hidden], -1)
        candidate = jnp.tanh(_affine(weights["candidate"], inputs))
        hidden = hidden + update * (candidate - hidden)
        return _affine(weights["out"], hidden), hidden


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """Return a layer whose outputs are as large as its inputs, with random biases."""
    w, b = jax.random.split(key)
    scale = 1 / math.sqrt(inputs)
    return {
        "w": scale * jax.random.normal(w, (inputs, outputs)),
        "b": scale * jax.random.normal(b, (outputs,)),
    }


def _zeros(inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"w": jnp.zeros((inputs, outputs)), "b": jnp.zeros(outputs)}


def _affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"].reshape(*[1] * (x.ndim - 1), -1)
