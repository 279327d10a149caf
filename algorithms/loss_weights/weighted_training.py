"""Training of a fresh model on weighted losses, what learned weights of examples have in common.

The inner loop trains a model from scratch, the loss of each example multiplied by a weight that is
a function of eta; the outer loss is the unweighted one of clean held-out examples. What weights are
computed from is the algorithm's: `LossWeights` reads the losses of the examples, `DataRater` the
examples themselves.

Batches have fields `inputs`, `targets`, `source` [batch] and, in the query, `corrupted`
[batch] bool or None, as `metalearn.datasets.Text` draws them. Corrupted query examples are left out
of the outer loss; they serve to measure how well the weights separate them from clean ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn.algorithm import TRAINING_RUN, Algorithm
from metalearn.algorithms import pictures
from metalearn.algorithms.loss_weights.features import Examples, auc
from metalearn.algorithms.objectives import check_labels, unmasked
from metalearn.algorithms.support import check_pair
from metalearn.model import Model
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


class WeightedTraining(Algorithm):
    """Training of a fresh model, each loss multiplied by a function of eta. Abstract.

    `model`, `optimizer` and `loss_fn` are fields of it. Support: batches with leaves
    [T, batch, ...], one slice per inner step. Query: leaves [m, ...].
    """

    model: Model
    optimizer: optax.GradientTransformation
    loss_fn: Callable[[Any, Any], jax.Array]

    @abc.abstractmethod
    def weights(self, eta: Eta, losses: jax.Array, batch: Batch) -> jax.Array:
        """Return the weights of a batch, [batch, 1] or [batch, S], whose losses are [batch, S]."""

    @abc.abstractmethod
    def weighted_gradient(
        self, eta: Eta, state: ModelTraining, batch: Batch, key: jax.Array, grad: GradFn
    ) -> tuple[Evaluated, Any]:
        """Return (the weighted loss with its gradient by params, the model's next statistics)."""

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""
        params, statistics = self.model.init(key)

        def init(eta: Eta) -> ModelTraining:
            del eta
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
            batch, key = batch
            evaluated, statistics = self.weighted_gradient(eta, state, batch, key, grad)
            updates, optimizer = update(self.optimizer, evaluated, state.optimizer, state.params)
            return ModelTraining(optax.apply_updates(state.params, updates), optimizer, statistics)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            return self._held_out_loss(eta, state, episode.query)

        return Unroll(init, step, loss)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the support batches, leaves [T, batch, ...], and a key for each, [T]."""
        steps = jax.tree.leaves(episode.support)[0].shape[0]
        return episode.support, jax.random.split(key, steps)

    def losses(self, state: ModelTraining, batch: Batch) -> jax.Array:
        """Return the unweighted losses of a batch, with the evaluation parameters: [batch, S]."""
        outputs = self.predict(*self.trained(None, state), batch.inputs, None)
        return self.losses_of(outputs, batch)

    def trained(self, eta: Eta, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the trained model, its running statistics)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the trained model in evaluation mode, for inputs [n, ...]."""
        del key
        return self.model.apply(params, statistics, inputs, train=False)[0]

    def model_mode(self) -> str:
        """Say in which mode the model is in inner steps and for queries."""
        return TRAINING_RUN

    def support_set(self, support: Any) -> Any:
        """Return batches with the fields that the losses need; of a pair, all of one source."""
        check_pair(type(self).__name__, support, "[T, batch, ...]")
        if len(support) == 2:
            return Examples(*support)
        try:
            _ = support.inputs, support.targets, support.source
        except AttributeError:
            name = type(self).__name__
            raise ValueError(
                f"`{name}.adapt(support=)` got a {type(support).__name__} of {len(support)}, "
                "but takes (inputs, targets), leaves [T, batch, ...], or batches with the fields "
                "`inputs`, `targets` and `source`, as `metalearn.datasets.Text` draws them."
            ) from None
        return support

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "weights": see `metalearn.algorithms.pictures`."""
        return {"weights": pictures.weights}

    def losses_of(self, outputs: Any, batch: Batch) -> jax.Array:
        """Return the losses [batch, S] of a model's outputs."""
        targets, _ = unmasked(batch.targets)
        if self.loss_fn is optax.softmax_cross_entropy_with_integer_labels:
            targets = check_labels(type(self).__name__, outputs, targets)
        losses = self.loss_fn(outputs, targets)
        return losses.reshape(losses.shape[0], -1)

    def _losses(self, state: ModelTraining, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return (the losses [batch, S] of an inner step, the model's next statistics)."""
        outputs, statistics = self.model.apply(
            state.params, state.statistics, batch.inputs, train=True, key=key
        )
        return self.losses_of(outputs, batch), statistics

    def _held_out_loss(
        self, eta: Eta, state: ModelTraining, query: Batch
    ) -> tuple[jax.Array, Metrics]:
        """Return (mean unweighted loss of the clean examples (), metrics of the weights)."""
        losses = self.losses(state, query)
        weights = self.weights(eta, losses, query)
        metrics = {"weight_min": weights.min(), "weight_mean": weights.mean()}
        _, mean = unmasked(query.targets)
        if query.corrupted is None:
            return mean(losses), metrics
        if isinstance(query.targets, Masked):
            raise ValueError(
                f"`{type(self).__name__}` got a query set with `corrupted` and with `Masked` "
                "targets, of which each leaves examples out. Mark the padding as corrupted instead."
            )
        clean, example_weights = ~query.corrupted, weights.mean(1)
        metrics["weight_clean"] = _mean_where(clean, example_weights)
        metrics["weight_corrupted"] = _mean_where(query.corrupted, example_weights)
        metrics["weight_auc"] = auc(example_weights, clean)
        return _mean_where(clean, losses.mean(1)), metrics


def weighted_mean_gradient(
    grad: GradFn,
    losses: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]],
    state: ModelTraining,
    examples: Any,
    weights: jax.Array,
    key: jax.Array,
) -> tuple[Evaluated, Any]:
    """Return (the mean of weights times losses with its gradient, the model's next statistics).

    The weights do not depend on the parameters, so that no example depends on another unless the
    model has batch statistics: engines may then split the batch into micro-batches.

    Args:
      grad: the one that a step receives.
      losses: params, examples, key -> (losses [batch, ...], next statistics).
      state: of the inner loop.
      examples: leaves [batch, ...].
      weights: [batch, ...], broadcast against the losses.
      key: (), of dropout.
    """

    def weighted(
        params: Any, examples: Any, weights: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        each, statistics = losses(params, examples, key)
        return (weights * each).mean(), statistics

    def example_loss(params: Any, example: Any) -> jax.Array:
        *parts, key = example
        examples, weights = jax.tree.map(lambda leaf: leaf[None], parts)
        return weighted(params, examples, weights, key)[0]

    if jax.tree.leaves(state.statistics):
        evaluated = evaluate(grad, weighted, state.params, examples, weights, key)
        return evaluated, evaluated.aux
    keys = jax.random.split(key, weights.shape[0])
    mean = ExampleMean(example_loss)
    return evaluate(grad, mean, state.params, (examples, weights, keys)), state.statistics


def _mean_where(where: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(where, values, 0).sum() / where.sum()
