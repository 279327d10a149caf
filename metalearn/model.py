"""What an algorithm needs of a model, whichever library it was written in.

A model is a pair of pure functions over explicit parameters and an explicit mutable
state (running statistics, random streams). `metalearn.models` has one adapter each for
Flax linen, Flax NNX, Haiku and plain functions.
"""

from __future__ import annotations

import abc
from typing import Any

import jax


class Model(abc.ABC):
    """A network as two pure functions. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state): what is learned, and what the forward pass updates."""

    @abc.abstractmethod
    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state).

        Args:
          params: from `init`, or adapted.
          state: from `init`, or from the call before. `()` for a model without one.
          inputs: [batch, ...], as the model takes them.
          train: batch statistics and dropout on; running statistics are updated.
          key: for dropout and the like; None where the model draws nothing.
        """
