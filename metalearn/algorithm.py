"""Algorithms: the base class of a meta-learning method.

A subclass is a frozen dataclass of pure functions. It never differentiates with respect to eta (the
engine does), and never calls `jax.grad` in its inner step (it calls the `grad` that it receives).

`init` and `unroll` are abstract. The other methods have defaults: `batches` and `batches_at` (the
inputs of the inner steps), `evaluation`, `constants` and `bind` (arrays that nobody learns), and
what the command line asks an algorithm for beyond training: `outer_optimizer`, `outer_rules`,
`export` and `pictures`.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from metalearn.model import bound, constants_of
from metalearn.unroll import Batch, Episode, Eta, Unroll


class Algorithm(abc.ABC):
    """A meta-learning method: meta-parameters, and an inner loop on one task."""

    # The name of the file that `export` writes, such as "schedules.json"; None: nothing to export
    export_name: ClassVar[str | None] = None

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

    def constants(self) -> Any:
        """Return the arrays that the algorithm holds and nobody learns: those of its models.

        The Trainer passes them to its compiled programs as arguments, and calls the algorithm that
        `bind` returns; arrays that a program closes over would be copied into it. An algorithm that
        has its model inside of a field overrides both.
        """
        return constants_of(self)

    def bind(self, constants: Any) -> Algorithm:
        """Return the same algorithm with these arrays for its `constants()`, a pytree like them."""
        return bound(self, constants)

    def outer_optimizer(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Return the outer optimizer to train with, from the one that a config names.

        By default that one. Override it where eta has constraints, such as ranges to stay in.
        `metalearn train` calls it; in Python call it for `Trainer(optimizer=)`.
        """
        return optimizer

    def outer_rules(self) -> Mapping[str, Callable[..., optax.GradientTransformation]]:
        """Return outer optimizers that are for this algorithm alone, by their names in configs.

        Each is called with `schedule` (number of the update -> what its step is multiplied with;
        None: 1), `steps` (outer steps of the run) and the other keys of `config.optimizer`.
        """
        return {}

    def export(self, eta: Any, path: pathlib.Path) -> str:
        """Write what was learned to a file, and say what it is, such as "the optimizer".

        `metalearn export` calls it, where `export_name` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to export.")

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return the kinds of pictures that there are of a run, and what draws each of them.

        A function takes (trainer, state, tasks, workdir) and returns {name of a file: a
        matplotlib figure, or text}. `metalearn draw` draws all kinds, `metalearn train` those that
        `config.pictures` names.
        """
        return {}
