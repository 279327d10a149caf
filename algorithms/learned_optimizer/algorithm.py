"""Learned optimizers: eta are the parameters of the optimizer that trains the inner model.

From a fresh theta_0 the inner loop takes T steps with the learned optimizer, and the outer loss is
the mean training loss over all steps (the default) or the validation loss at the end,

    theta_{t+1} = theta_t + u_t,   u_t = rule(eta)(grad L_t(theta_t), ...)      t = 0 .. T-1
    F(eta)      = mean over t of L_t(theta_t),  or  L_val(theta_T)

The optimizer is an `UpdateRule`, and what it trains is a `Problem`: any rule learns on any problem,
or on several side by side (`Together`).

A full unroll has the exact derivative and costs T steps for one update of eta;
`Trainer(truncation=Truncation(K))` updates eta every K steps. See `metalearn.Truncation` for the
bias of truncated unrolls, and `metalearn.PES` for an estimator without it. The mean training loss
is then over the steps of a truncated unroll.

References: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2019 (arXiv:1810.10180),
2020 (arXiv:2009.11243), 2022 (arXiv:2203.11860).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields
from metalearn.algorithm import TRAINING_RUN, Algorithm
from metalearn.algorithms import pictures
from metalearn.algorithms.learned_optimizer.export import save_optimizer
from metalearn.algorithms.learned_optimizer.problems import Problem
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Batch, Episode, Eta, GradFn, Metrics, Unroll

JUDGES = {
    "training": "the mean of the training losses of all steps",
    "validation": "the validation loss of the last theta",
}


class Optimization(NamedTuple):
    """The inner state of a training run by a learned optimizer.

    params: theta.
    optimizer: the state of the learned optimizer.
    statistics: the model's mutable state.
    total: (), the sum of the training losses so far, since the start of this (truncated) unroll.
    steps: (), int32: the number of losses in `total`.
    last: (), the last training loss.
    """

    params: Any
    optimizer: Any
    statistics: Any
    total: jax.Array
    steps: jax.Array
    last: jax.Array


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer(Algorithm):
    """Learn the inner optimizer. eta: the parameters of the rule.

    Args:
      problem: what is trained; it has to match the tasks.
      rule: the learned optimizer, as a function of eta.
      inner_steps: T.
      judge: the outer loss: "training" or "validation".
      cap: the upper bound of a training loss in the outer loss, with derivative zero above it: a
        diverging run then does not dominate the other tasks, nor the other parts of a mixture.
        None: no bound.
    """

    problem: Problem
    rule: UpdateRule
    inner_steps: int
    judge: str = "training"
    cap: float | None = None
    export_name: ClassVar[str] = "optimizer.safetensors"

    def __post_init__(self) -> None:
        check_fields(self, "rule", "inner_steps")
        pick(JUDGES, self.judge, "judge")
        if not isinstance(self.rule, UpdateRule):
            raise TypeError(
                f"`LearnedOptimizer(rule=)` takes an UpdateRule, not {type(self.rule).__name__}. "
                "Of an optax optimizer: "
                "`TunedRule(optax.adam, {'learning_rate': Hyperparameter(...)})`."
            )
        if not is_integer(self.inner_steps) or self.inner_steps < 1:
            raise ValueError(
                f"`LearnedOptimizer(inner_steps={self.inner_steps})`: An inner run takes at least "
                f"one step, not inner_steps={self.inner_steps}."
            )

    @property
    def reads_tasks(self) -> bool:
        """Whether the problem is the meta-training of an algorithm."""
        return self.problem.reads_tasks

    def init(self, key: jax.Array) -> Eta:
        """Return the initial parameters of the learned optimizer."""
        return self.rule.init(key)

    def constants(self) -> Any:
        """Return the arrays that the problem's models hold."""
        return self.problem.constants()

    def bind(self, constants: Any) -> LearnedOptimizer:
        """Return the same algorithm with these arrays."""
        if not jax.tree.leaves(constants):
            return self
        return dataclasses.replace(self, problem=self.problem.bind(constants))

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh theta, drawn with `key`."""

        def init(eta: Eta) -> Optimization:
            params, statistics = self.problem.init(key)
            optimizer = start(self.rule.optimizer(eta), params)
            zero = jnp.zeros((), jnp.result_type(float))
            return Optimization(params, optimizer, statistics, zero, jnp.zeros((), jnp.int32), zero)

        def step(eta: Eta, state: Optimization, batch: Batch, grad: GradFn) -> Optimization:
            data, step_key = batch

            def loss(params: Any) -> tuple[jax.Array, Any]:
                losses = self.problem.loss(
                    params, state.statistics, episode.support, data, step_key
                )
                return losses.loss, (losses.measure, losses.statistics)

            evaluated = evaluate(grad, loss, state.params)
            measure, statistics = evaluated.aux
            updates, optimizer = update(
                self.rule.optimizer(eta), evaluated, state.optimizer, state.params
            )
            params = optax.apply_updates(state.params, updates)
            capped = measure if self.cap is None else jnp.minimum(measure, self.cap)
            last = self.problem.combined(capped).astype(state.total.dtype)
            total, steps = state.total + last, state.steps + 1
            return Optimization(params, optimizer, statistics, total, steps, last)

        def loss(eta: Eta, state: Optimization) -> tuple[jax.Array, Metrics]:
            trained = self.trained(eta, state)
            validation, metrics = self.problem.validate(*trained, episode.query)
            mean = state.total / state.steps
            metrics = {"training_loss_last": state.last, "validation_loss": validation, **metrics}
            return (mean if self.judge == "training" else validation), metrics

        def resume(state: Optimization) -> Optimization:
            total, steps = jnp.zeros_like(state.total), jnp.zeros_like(state.steps)
            return state._replace(total=total, steps=steps)

        return Unroll(init, step, loss, resume=resume)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the batch of each step, and a key for it: leaves [T, ...]."""
        return self.batches_at(episode, key, jnp.arange(self.inner_steps, dtype=jnp.int32))

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Batch:
        """Return the batches of some steps, and a key for each: leaves [len(steps), ...]."""
        batch_key, noise_key = jax.random.split(key)
        self.problem.check(episode.support, self.inner_steps)
        step_keys = jax.vmap(lambda step: jax.random.fold_in(noise_key, step))(steps)
        return self.problem.batches(episode.support, steps, batch_key), step_keys

    def rows_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> jax.Array:
        """Return the rows of these steps, [t, batch], of `Supervised`."""
        batch_key, _ = jax.random.split(key)
        self.problem.check(episode.support, self.inner_steps)
        return self.problem.rows_at(episode.support, steps, batch_key)

    def shard_examples(self, episode: Episode, shard: Callable[[Any], Any]) -> Episode:
        """Return the episode with the examples of the query sharded, as the problem reads them."""
        return episode._replace(query=self.problem.shard_query(episode.query, shard))

    def with_steps(self, steps: int) -> LearnedOptimizer:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries."""
        return TRAINING_RUN

    def support_set(self, support: Any) -> Any:
        """Return a support set as the problem reads it: see `Problem`."""
        return self.problem.support_set(support)

    def trained(self, eta: Eta, state: Optimization) -> tuple[Any, Any]:
        """Return (theta for evaluation, the model's mutable state)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the trained model: see `Problem.predict`."""
        del key
        return self.problem.predict(params, statistics, inputs)

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "updates": see `metalearn.algorithms.pictures`."""
        return {"updates": pictures.updates}

    def export(self, eta: Any, path: pathlib.Path) -> str:
        """Write the optimizer, as `load_optimizer` reads it."""
        save_optimizer(path, self.rule, eta)
        return "the optimizer"
