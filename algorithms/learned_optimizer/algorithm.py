"""Learned optimizers: eta is the optimizer that trains the inner model.

From a fresh theta_0 the inner loop takes steps with the optimizer that eta stands for, and the
outer loss is how well that went, by default all along the way,

    theta_{t+1} = theta_t + u_t,   u_t = rule(eta)(grad L_t(theta_t), ...)      t = 0 .. T-1
    F(eta)      = mean over t of L_t(theta_t),  or  L_val(theta_T)

What the optimizer is, is an `UpdateRule`; what it trains is a `Problem`. Both are parts: any
rule learns on any problem, or on several side by side (`Together`).

A run of T steps unrolled whole is the exact derivative and costs T steps for one update of eta;
`Trainer(truncation=Truncation(K))` updates it every K. See `metalearn.Truncation` for what that
costs in bias, and `metalearn.PES` for an estimator without it. The mean is then that over the
steps of a truncation.

References: Andrychowicz et al. 2016 (arXiv:1606.04474); Metz et al. 2019 (arXiv:1810.10180),
2020 (arXiv:2009.11243), 2022 (arXiv:2203.11860).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import is_integer, pick
from metalearn._utils.fields import check_fields
from metalearn.algorithm import Algorithm
from metalearn.algorithms.learned_optimizer.problems import Problem
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Episode, Unroll

JUDGES = {
    "training": "the mean of the training losses of all steps",
    "validation": "the validation loss of the last theta",
}


class Optimization(NamedTuple):
    """What the inner training run carries."""

    params: Any  # theta
    optimizer: Any  # the learned optimizer's state
    statistics: Any  # the model's mutable state
    total: jax.Array  # (): training losses so far, of this truncation
    steps: jax.Array  # (), int32: how many
    last: jax.Array  # (): the last of them


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer(Algorithm):
    """Learn the inner optimizer. eta: that of the rule.

    Args:
      problem: what is trained; it goes with the tasks.
      rule: the optimizer, but for its eta.
      inner_steps: T.
      judge: the outer loss, "training" or "validation".
      cap: a training loss above this counts as this, with no derivative: a run that blows up
        shall not drown the others, nor the other parts of a mixture. None: no cap.
    """

    problem: Problem
    rule: UpdateRule
    inner_steps: int
    judge: str = "training"
    cap: float | None = None

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

    def init(self, key: jax.Array) -> Any:
        """Return the optimizer before it is trained."""
        return self.rule.init(key)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh theta, drawn with `key`."""

        def init(eta: Any) -> Optimization:
            params, statistics = self.problem.init(key)
            optimizer = start(self.rule.optimizer(eta), params)
            zero = jnp.zeros((), jnp.result_type(float))
            return Optimization(params, optimizer, statistics, zero, jnp.zeros((), jnp.int32), zero)

        def step(eta: Any, state: Optimization, batch: Any, grad: Any) -> Optimization:
            data, noise = batch

            def loss(params: Any) -> tuple[jax.Array, Any]:
                said = self.problem.loss(params, state.statistics, episode.support, data, noise)
                return said.loss, (said.measure, said.statistics)

            found = evaluate(grad, loss, state.params)
            measure, statistics = found.aux
            updates, optimizer = update(
                self.rule.optimizer(eta), found, state.optimizer, state.params
            )
            params = optax.apply_updates(state.params, updates)
            capped = measure if self.cap is None else jnp.minimum(measure, self.cap)
            counted = self.problem.combined(capped).astype(state.total.dtype)
            total, steps = state.total + counted, state.steps + 1
            return Optimization(params, optimizer, statistics, total, steps, counted)

        def loss(eta: Any, state: Optimization) -> tuple[jax.Array, dict[str, jax.Array]]:
            del eta
            params = evaluation_params(state.optimizer, state.params)
            value, metrics = self.problem.validate(params, state.statistics, episode.query)
            mean = state.total / state.steps
            shown = {"training_loss_last": state.last, "validation_loss": value, **metrics}
            return (mean if self.judge == "training" else value), shown

        def resume(state: Optimization) -> Optimization:
            none = jnp.zeros_like(state.total), jnp.zeros_like(state.steps)
            return state._replace(total=none[0], steps=none[1])

        return Unroll(init, step, loss, resume=resume)

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return what each step reads, and a key for it: leaves [T, ...]."""
        return self.batches_at(episode, key, jnp.arange(self.inner_steps, dtype=jnp.int32))

    def batches_at(self, episode: Episode, key: jax.Array, steps: jax.Array) -> Any:
        """Return the same of these steps alone."""
        batch_key, noise_key = jax.random.split(key)
        self.problem.check(episode.support, self.inner_steps)
        noise = jax.vmap(lambda step: jax.random.fold_in(noise_key, step))(steps)
        return self.problem.batches(episode.support, steps, batch_key), noise
