"""Algorithms: the base class of a meta-learning method.

A subclass is a frozen dataclass of pure functions. It never differentiates with respect to eta (the
engine does), and never calls `jax.grad` in its inner step (it calls the `grad` that it receives).
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp

from metalearn.unroll import Batch, Episode, Eta, Unroll


class Algorithm(abc.ABC):
    """A meta-learning method: meta-parameters, and an inner loop on one task."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Eta:
        """Return eta, the meta-parameters: any pytree of floating-point arrays."""

    @abc.abstractmethod
    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the inner loop on one task. Traced inside jit, vmapped over tasks."""

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the inputs of the inner steps: a pytree with leaves [T, ...], a slice per step.

        By default the support set itself, whose leading axis is then T. For a long horizon return
        indices or keys, and read the data in `step` instead of stacking it.
        """
        del key
        return episode.support

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Batch:
        """Return the inputs of some inner steps: those rows of `batches`, leaves [t, ...].

        Truncated and segmented unrolls read a few steps at a time. Override this where computing
        all `batches` of a long horizon is expensive.

        Args:
          episode: the task.
          key: as for `batches`.
          steps: [t], int32: consecutive numbers of inner steps.
        """
        return jax.tree.map(lambda x: jnp.asarray(x)[steps], self.batches(episode, key))

    def evaluation(self) -> Algorithm:
        """Return the algorithm to evaluate; by default itself."""
        return self
