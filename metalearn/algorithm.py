"""What is learned, and what one inner step is: the class a new method subclasses.

A subclass is a frozen dataclass of pure functions. It never takes a derivative with
respect to eta (the engine does) and never calls `jax.grad` in its inner step (it
calls the `grad` it is given).
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.unroll import Episode, Unroll


class Algorithm(abc.ABC):
    """A meta-learning method: meta-parameters, and an inner loop on one task."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """Return eta, the meta-parameters: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the inner loop on one task. Traced inside jit, vmapped over tasks."""

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return what the inner steps read: a pytree with leaves [T, ...], a slice a step.

        By default the support set itself, whose leading axis is then T. A long horizon
        returns indices or keys and reads the data in `step` instead of stacking it.
        """
        del key
        return episode.support

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Any:
        """Return what these steps read: the same as `batches`, leaves [len(steps), ...].

        `steps` are numbers, int32, one after the other. Truncated training asks for a few at a
        time; where `batches` draws a lot for a long horizon, draw here what is asked for alone.
        """
        return jax.tree.map(lambda x: jnp.asarray(x)[steps], self.batches(episode, key))

    def evaluation(self) -> Algorithm:
        """Return the algorithm as it is evaluated: itself, unless it says otherwise."""
        return self
