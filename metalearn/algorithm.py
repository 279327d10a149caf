"""Algorithms: the base class of a meta-learning method.

A subclass is a frozen dataclass of pure functions. It never differentiates with respect to eta (the
engine does), and never calls `jax.grad` in its inner step (it calls the `grad` that it receives).

`init` and `unroll` are abstract. The other methods have defaults: `batches` and `batches_at` (the
inputs of the inner steps), `rows_at` (which rows of a dataset on the host they read), `evaluation`,
`constants` and `bind` (arrays that nobody learns), and what the command line asks an algorithm for
beyond training: `outer_optimizer`, `outer_rules`, `export` and `pictures`.

`adapt` applies what was learned to a support set: it runs the inner loop of an evaluation, and
returns the model that came out, a `Learner`. An algorithm supplies two pieces for it, which its
outer loss uses as well: `trained`, the model's parameters in an inner state, and `predict`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from metalearn._utils import labels
from metalearn._utils.checks import at_least
from metalearn.engines.inner_loop import inner_loop
from metalearn.learner import Learner, check_eta_of, check_key, check_support
from metalearn.model import bound, constants_of
from metalearn.unroll import Batch, Episode, Eta, InnerState, Unroll, horizon, task_keys

# What `Algorithm.model_mode` says of one that trains a fresh model.
TRAINING_RUN = (
    "batch statistics and dropout in inner steps; running statistics without dropout for queries"
)


class Algorithm(abc.ABC):
    """A meta-learning method: meta-parameters, and an inner loop on one task."""

    # The name of the file that `export` writes, such as "schedules.json"; None: nothing to export
    export_name: ClassVar[str | None] = None
    # Whether the algorithm puts a head of its own on what `model` returns, and has a field `ways`:
    # a config then builds the network without its head, and fills `ways` in.
    own_head: ClassVar[bool] = False
    # The name of the field that says how many features the algorithm appends to the inputs of
    # `model`, for which a config then builds the network; "": it appends none
    extra_inputs: ClassVar[str] = ""
    # Whether the inner loop or the outer loss depends on the number of the outer step: the Trainer
    # then draws the tasks of an outer step with `at_outer_step`
    anneals: ClassVar[bool] = False

    @property
    def reads_tasks(self) -> bool:
        """Whether the support set of an episode is a distribution over tasks. False, the default.

        True for a level above, whose inner steps are outer steps of another algorithm: its tasks
        are `metalearn.datasets.MetaTrainingRuns`, which every other algorithm refuses.
        """
        return False

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

    def rows_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> jax.Array:
        """Return the numbers of the rows that some inner steps read: [t, batch], int32.

        For data on the host, such as `metalearn.datasets.HostTrainingRuns`: the rows of the next
        steps are read before their program runs. By default refused: most algorithms read their
        support set, not rows of a dataset.

        Args:
          episode: its support is (data, data, rows [m]); only the row numbers may be read.
          key: as for `batches`.
          steps: [t], int32: consecutive numbers of inner steps.
        """
        name = type(self).__name__
        raise TypeError(
            f"These tasks are training runs on data of the host, of which {name} would read rows, "
            f"but it does not say which: `{name}.rows_at(episode, key, steps)` is not defined. "
            "FDS and LearnedOptimizer define it; in an algorithm of your own return what `step` "
            "passes to `metalearn.algorithms.read_rows`, such as `epochs(episode.support[2], "
            "steps, batch, key)`. Others take tasks with a support set: `HostFewShot`, `HostText`."
        )

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return an episode whose examples are sharded over the devices that share an inner run.

        Called where a mesh has an axis "data" (`metalearn.make_mesh`). `shard` shards every leaf of
        a pytree along its first axis; one that does not divide stays as it is. Inner batches, which
        `batches` returns, are sharded by themselves. By default the query is: its leaves are
        [m, ...]. Override this where inner steps read examples of the support that are no part of a
        batch (shard these too), or where the query is a whole dataset with the numbers of its rows
        (shard only these numbers).

        Args:
          episode: the task.
          shard: pytree -> the same pytree, sharded.
        """
        return episode._replace(query=shard(episode.query))

    def at_outer_step(self, step: jax.Array) -> Algorithm:
        """Return the algorithm as it is in an outer step; by default itself.

        Called inside a compiled outer step, where the class `anneals`. Everywhere else, as in
        evaluations, the algorithm itself is what annealing ends in.

        Args:
          step: (), int32: outer steps taken before.
        """
        del step
        return self

    def evaluation(self) -> Algorithm:
        """Return the algorithm to evaluate; by default itself."""
        return self

    def with_steps(self, steps: int) -> Algorithm:
        """Return the algorithm with another number of inner steps, for `adapt(steps=)`.

        By default refused: where `batches` are the support set, its length is their number.
        """
        name = type(self).__name__
        raise ValueError(
            f"`{name}.adapt(steps={steps})`: {name} takes an inner step for each of its batches. "
            f"Pass a support set of {steps} batches and leave `steps`; or, in an algorithm of "
            "your own, override `with_steps`."
        )

    def adapt(self, eta: Eta, support: Any, key: jax.Array, *, steps: int | None = None) -> Learner:
        """Adapt to a support set, as an evaluation does: run the inner loop, return the model.

        Compiled, once for each shape of `support` and number of `steps`, and `vmap` goes over it.
        With the support set and the key of a task that `Trainer.evaluate` draws (its keys are
        `jax.random.split(key, count)`), the learner's predictions for the queries are those whose
        metrics it averages.

        Args:
          eta: the meta-parameters: `Trainer.learned(state)`.
          support: what an episode of the algorithm's tasks has as its support set; see the
            algorithm's class.
          key: (), of whatever is random in the inner loop: a fresh theta_0, batches, dropout.
          steps: inner steps; None: as many as in an evaluation (`evaluation()`).

        Raises:
          ValueError: for an eta of another model, a support set that does not suit the algorithm
            or is empty, or labels beyond the model's outputs.
          TypeError: for an algorithm without `trained` and `predict`.
        """
        name = type(self).__name__
        at_least(f"{name}.adapt", 1, steps=steps)
        check_key(f"{name}.adapt(key=)", key)
        check_eta_of(name, eta, self._shapes)
        support = self.support_set(support)
        check_support(f"{name}.adapt(support=)", support)
        with labels.known(labels.range_of(support), self._labels_seen):
            return self._adapting(steps)(eta, support, key)

    def _adapting(self, steps: int | None) -> Callable[[Eta, Any, jax.Array], Learner]:
        """Return the compiled inner loop of an evaluation, or of so many steps."""
        if steps not in self._programs:
            with jax.ensure_compile_time_eval():  # `adapt` may be called inside a jit or a vmap
                evaluation = self.evaluation()
                algorithm = evaluation if steps is None else evaluation.with_steps(steps)
                constants = jax.tree.map(jnp.asarray, algorithm.constants())

            def adapted(constants: Any, eta: Eta, support: Any, key: jax.Array) -> Learner:
                learner = algorithm.bind(constants)._adapted(eta, support, key)
                return dataclasses.replace(learner, apply=algorithm.predict)

            self._programs[steps] = functools.partial(jax.jit(adapted), constants)
        return self._programs[steps]

    def _adapted(self, eta: Eta, support: Any, key: jax.Array) -> Learner:
        keys, episode = task_keys(key), Episode(support, None)
        batches = self.batches(episode, keys.batches)
        state, _ = inner_loop(unroll_of(self, episode, keys.unroll), eta, batches)
        return Learner(*self.trained(eta, state), keys.unroll, horizon(batches), self.predict)

    @functools.cached_property
    def _programs(self) -> dict[int | None, Callable[[Eta, Any, jax.Array], Learner]]:
        return {}

    @functools.cached_property
    def _shapes(self) -> Eta:
        return jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))

    @functools.cached_property
    def _labels_seen(self) -> labels.Seen:
        return set()

    def support_set(self, support: Any) -> Any:
        """Return a support set as `unroll` reads it; ValueError for one that it cannot read.

        `adapt` calls it. By default the support set itself.
        """
        return support

    def trained(self, eta: Eta, state: InnerState) -> tuple[Any, Any]:
        """Return (params, statistics): the model in an inner state, in its own trees.

        Args:
          eta: the meta-parameters.
          state: after the inner loop.
        """
        raise TypeError(self._cannot_adapt())

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the model for inputs [n, ...], as the outer loss takes them.

        Args:
          params: of the model, from `trained`.
          statistics: its mutable state, from `trained`.
          inputs: [n, ...].
          key: (), of the unroll, for random layers other than dropout.
        """
        raise TypeError(self._cannot_adapt())

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries; "": unknown."""
        return ""

    def _cannot_adapt(self) -> str:
        name = type(self).__name__
        return (
            f"`{name}.adapt` returns a trained model, and {name} does not say what that is. Give "
            "it the methods `trained(eta, state) -> (params, statistics)` and `predict(params, "
            "statistics, inputs, key) -> outputs`; see `metalearn.Algorithm`."
        )

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


def unroll_of(algorithm: Algorithm, episode: Episode, key: jax.Array) -> Unroll:
    """Return the inner loop on one task; TypeError where `unroll` returns something else."""
    unroll = algorithm.unroll(episode, key)
    if not isinstance(unroll, Unroll):
        raise TypeError(
            f"`{type(algorithm).__name__}.unroll` returns a `metalearn.Unroll(init, step, loss)`, "
            f"not a {type(unroll).__name__}."
        )
    return unroll
