"""Per-parameter learning rates of the inner optimizer.

From a fresh theta_0 the inner loop takes T steps on training batches, each with the
direction u_t of an optax optimizer and one learned rate per parameter,

    theta_{t+1} = theta_t + exp(eta) * u_t(grad L_t(theta_t))      t = 0 .. T-1
    F(eta)      = L_val(theta_T)

and eta is the logarithm of the rates, so that they stay positive. The first task of Kemaev
et al. 2025 (arXiv:2505.00793), and Meta-SGD (Li et al. 2017, arXiv:1707.09835) without its
learned initialisation. eta is as large as theta, so `Forward`, with a tangent for each entry of
eta, does not suit it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithm import TRAINING_RUN, Algorithm
from metalearn.algorithms import pictures
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.algorithms.support import check_pair
from metalearn.model import Model
from metalearn.optimizers.reversible import Reversible
from metalearn.optimizers.updates import Evaluated, evaluate, evaluation_params, start, update
from metalearn.unroll import (
    Batch,
    Episode,
    Eta,
    ExampleMean,
    GradFn,
    Masked,
    Metrics,
    ModelTraining,
    Unroll,
)


@readable
@dataclasses.dataclass(frozen=True)
class LearningRates(Algorithm):
    """Learn one learning rate per parameter. Kemaev et al. 2025.

    Support: (inputs, targets, ...), leaves [T, batch, ...], one slice per inner step. Query: the
    same with leaves [batch, ...].

    Args:
      model: the network that is trained.
      objective: outputs, targets -> loss (), metrics; of the inner and of the outer loss.
      optimizer: the inner optimizer. Its updates are multiplied by the learned rates, so its own
        rate is one. `eps_root` keeps the derivative of Adam's square root finite where a gradient
        is exactly zero.
      initial: the value of every learned rate before the first outer step.
      mean_over_examples: whether the objective is a mean over examples and no example's output
        depends on another example (no batch statistics). Engines may then split a batch into
        micro-batches (`ExampleMean`).
    """

    model: Model
    objective: Objective = cross_entropy
    optimizer: optax.GradientTransformation | Reversible = described(optax.adam, 1.0, eps_root=1e-8)
    initial: float = 1e-3
    mean_over_examples: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mean_over_examples and self._statistics(jax.random.key(0)):
            raise ValueError(
                "mean_over_examples=True, but the model has a mutable state, which ties the "
                "examples of a batch together. Use another model, or mean_over_examples=False."
            )
        if not self.initial > 0:
            raise ValueError(f"Learned rates are positive, so initial={self.initial} cannot be.")

    def init(self, key: jax.Array) -> Eta:
        """Return the logarithm of each parameter's learning rate, a tree like theta."""
        params, _ = jax.eval_shape(self.model.init, key)
        return jax.tree.map(lambda p: jnp.full(p.shape, math.log(self.initial), p.dtype), params)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""

        def init(eta: Eta) -> ModelTraining:
            del eta
            params, statistics = self.model.init(key)
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
            data, key = batch
            evaluated, statistics = self._evaluate(state, data, key, grad)
            updates, optimizer = update(self.optimizer, evaluated, state.optimizer, state.params)
            updates = _scaled(eta, updates)
            return ModelTraining(optax.apply_updates(state.params, updates), optimizer, statistics)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, targets, *_ = episode.query
            outputs = self.predict(*self.trained(eta, state), inputs, key)
            return self.objective(outputs, targets)

        reversible = isinstance(self.optimizer, Reversible) and not self._statistics(key)
        return Unroll(init, step, loss, self._undo if reversible else None)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the support batches, leaves [T, batch, ...], and a key for each, [T]."""
        steps = jax.tree.leaves(episode.support)[0].shape[0]
        return episode.support, jax.random.split(key, steps)

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "rates": see `metalearn.algorithms.pictures`."""
        return {"rates": pictures.rates}

    def _undo(self, eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
        """Return the state before a step of a reversible optimizer, from the state after it."""
        assert isinstance(self.optimizer, Reversible)
        updates = _scaled(eta, self.optimizer.last_update(state.optimizer))
        params = jax.tree.map(jnp.subtract, state.params, updates)
        data, key = batch
        evaluated, statistics = self._evaluate(state._replace(params=params), data, key, grad)
        optimizer = self.optimizer.before(state.optimizer, evaluated.grads)
        return ModelTraining(params, optimizer, statistics)

    def _statistics(self, key: jax.Array) -> list[Any]:
        """Return the shapes of the model's mutable state; empty for a model without one."""
        return jax.tree.leaves(jax.eval_shape(self.model.init, key)[1])

    def _evaluate(
        self, state: ModelTraining, batch: Batch, key: jax.Array, grad: GradFn
    ) -> tuple[Evaluated, Any]:
        """Return (the inner loss with its gradient, the model's next statistics)."""
        if not self.mean_over_examples:

            def batch_loss(params: Any) -> Any:
                return self._loss(state, params, batch, key)

            evaluated = evaluate(grad, batch_loss, state.params)
            return evaluated, evaluated.aux

        def example_loss(params: Any, example: Any) -> jax.Array:
            example, key = example
            batch_of_one = jax.tree.map(lambda x: x[None], example)
            return self._loss(state, params, batch_of_one, key)[0]

        if isinstance(batch[1], Masked):
            raise ValueError(
                "`LearningRates(mean_over_examples=True)` averages the losses of all examples, but "
                "these tasks have `Masked` targets, of which some do not count. Use "
                "mean_over_examples=False."
            )
        examples = batch, jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
        mean = ExampleMean(example_loss)
        return evaluate(grad, mean, state.params, examples), state.statistics

    def _loss(
        self, state: ModelTraining, params: Any, data: Any, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return (the inner loss (), the model's next statistics)."""
        inputs, targets, *_ = data
        outputs, statistics = self.model.apply(
            params, state.statistics, inputs, train=True, key=key
        )
        return self.objective(outputs, targets)[0], statistics

    def trained(self, eta: Eta, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the trained model, its running statistics)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the trained model in evaluation mode, for inputs [n, ...]."""
        return self.model.apply(params, statistics, inputs, train=False, key=key)[0]

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries."""
        return TRAINING_RUN

    def support_set(self, support: Any) -> Any:
        """Return a support set; ValueError unless its leaves are [T, batch, ...]."""
        check_pair("LearningRates", support, "[T, batch, ...]")
        return support


def _scaled(log_rates: Eta, updates: Any) -> Any:
    """Return the updates, each multiplied by its learned rate."""
    return jax.tree.map(lambda rate, u: jnp.exp(rate) * u, log_rates, updates)
