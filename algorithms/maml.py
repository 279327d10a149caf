"""Model-agnostic meta-learning: learn an initialisation that adapts in a few steps.

For a task with support set S and query set Q, from eta = theta_0,

    theta_{t+1} = theta_t - alpha grad L_S(theta_t)      t = 0 .. T-1
    F(eta)      = L_Q(theta_T)

Finn, Abbeel and Levine 2017 (arXiv:1703.03400). Three relatives are options, and combine:

- Meta-SGD, Li et al. 2017 (arXiv:1707.03141): alpha is a vector, one learned rate per
  parameter (`learned_rates`).
- First-order MAML, same paper as MAML: the inner gradient is taken as a constant
  (`first_order`); about a third of the work, and no Hessian products.
- ANIL, Raghu et al. 2020 (arXiv:1909.09157): only the head adapts, the body is reused
  (`adapt="head"`); the inner loop carries and differentiates the head alone.

The inner optimizer sees the model's own tree, so its labels and masks go by path
(`optax.multi_transform`, `optax.masked`, `optax.adamw(mask=)`); what does not adapt is an
`optax.MaskedNode` there, as `optax.masked` has it. What else it may ask
for: `metalearn.optimizers.updates`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import is_integer, pattern
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import split_by_path
from metalearn.algorithm import Algorithm
from metalearn.algorithms.batch_norm import batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Episode, ModelTraining, Unroll


class Eta(NamedTuple):
    """What MAML learns."""

    params: Any  # the initialisation, theta_0
    rates: Any  # Meta-SGD: one rate per adapted parameter, a list of arrays like them; else None


@dataclasses.dataclass(frozen=True)
class MAML(Algorithm):
    """Model-agnostic meta-learning: learn the initialisation. Finn et al. 2017."""

    model: Model
    objective: Objective = cross_entropy
    optimizer: optax.GradientTransformation = optax.sgd(0.4)  # the inner one
    inner_steps: int = 1
    eval_steps: int | None = None  # inner steps in evaluation; None: as in training
    # Meta-SGD: the initial value of learned rates. They multiply the inner optimizer's
    # update, so give that a rate of one: `optax.sgd(1.0)`.
    learned_rates: float | None = None
    first_order: bool = False
    # The parameter paths that adapt: a regular expression, see `checks.unusable`; "": all
    adapt: str = ""
    batch_norm: str = "transductive"  # see `metalearn.algorithms.batch_norm`

    def __post_init__(self) -> None:
        pattern("MAML", adapt=self.adapt)
        check_fields(self, "inner_steps", "eval_steps")
        batch_norm_policy(self.batch_norm)
        if not all(is_integer(n) and n >= 1 for n in (self.inner_steps, self.evaluation_steps)):
            raise ValueError(
                f"MAML adapts in at least one inner step, but inner_steps={self.inner_steps} "
                f"and eval_steps={self.eval_steps}."
            )

    @property
    def evaluation_steps(self) -> int:
        """Return the inner steps of evaluation."""
        return self.inner_steps if self.eval_steps is None else self.eval_steps

    def init(self, key: jax.Array) -> Eta:
        """Return the initialisation, with its learned rates if there are any."""
        params, _ = self.model.init(key)
        if self.learned_rates is None:
            return Eta(params, None)
        adapted, _, _ = split_by_path(params, self.adapt)
        return Eta(params, [jnp.full_like(leaf, self.learned_rates) for leaf in adapted])

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task. Support and query: (inputs, targets)."""
        policy = batch_norm_policy(self.batch_norm)

        def init(eta: Eta) -> ModelTraining:
            adapted, _, _ = split_by_path(eta.params, self.adapt)
            _, statistics = self.model.init(key)
            return ModelTraining(
                adapted, start(self.optimizer, self._seen(eta, adapted)), statistics
            )

        def step(eta: Eta, state: ModelTraining, key: jax.Array, grad: Any) -> ModelTraining:
            theta = self._seen(eta, state.params)

            def support_loss(theta: Any) -> Any:
                moved = state._replace(params=jax.tree.leaves(theta))
                return self._loss(eta, moved, episode.support, policy.train_on_support, key)

            found = evaluate(grad, support_loss, theta)
            statistics, _ = found.aux
            if self.first_order:
                constant = jax.lax.stop_gradient((found.grads, found.value))
                found = found._replace(grads=constant[0], value=constant[1])
            updates, optimizer = update(self.optimizer, found, state.optimizer, theta)
            changes = jax.tree.leaves(updates)
            if eta.rates is not None:
                changes = jax.tree.map(jnp.multiply, eta.rates, changes)
            kept = statistics if policy.carry_statistics else state.statistics
            return ModelTraining(optax.apply_updates(state.params, changes), optimizer, kept)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, dict[str, jax.Array]]:
            judged = evaluation_params(state.optimizer, self._seen(eta, state.params))
            state = state._replace(params=jax.tree.leaves(judged))
            value, (_, metrics) = self._loss(eta, state, episode.query, policy.train_on_query, key)
            return value, metrics

        return Unroll(init, step, loss)

    def _seen(self, eta: Eta, adapted: list[jax.Array]) -> Any:
        """Return adapted leaves as the optimizer sees them: in the model's tree, others masked."""
        _, fixed, join = split_by_path(eta.params, self.adapt)
        return join(adapted, [optax.MaskedNode()] * len(fixed))

    def _loss(
        self, eta: Eta, state: ModelTraining, data: Any, train: bool, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Return (loss (), (new statistics, metrics)) of the adapted model on some data."""
        _, fixed, join = split_by_path(eta.params, self.adapt)
        inputs, targets = data
        params = join(state.params, fixed)
        outputs, statistics = self.model.apply(
            params, state.statistics, inputs, train=train, key=key
        )
        loss, metrics = self.objective(outputs, targets)
        return loss, (statistics, metrics)

    def batches(self, episode: Episode, key: jax.Array) -> jax.Array:
        """Return one key per inner step [T]: every step reads the whole support set."""
        del episode
        return jax.random.split(key, self.inner_steps)

    def evaluation(self) -> MAML:
        """Return the same algorithm with the number of inner steps of evaluation."""
        return dataclasses.replace(self, inner_steps=self.evaluation_steps)
