"""Learned loss weights: which data a model should learn from, and how much.

The inner loop trains a model from scratch on data of which some may be harmful, each
token's loss l_i multiplied with a weight that eta decides; the outer loss is plain
cross-entropy on clean held-out data,

    theta_{t+1} = theta_t - Phi(grad  1/n sum_i w(eta, x_i) l_i(theta_t))    t = 0 .. T-1
    F(eta)      = 1/m sum_j l_j(theta_T)                         j held-out, unweighted

and its derivative with respect to w_i is minus the agreement of example i's gradient with
that of the held-out loss: what helps is weighted up. Only the weighting's parameters are
learned; theta_0 is drawn afresh for every task, so what is learned serves any run.

Ren et al. 2018, "Learning to Reweight Examples" (arXiv:1803.09050): one step, no network.
Shu et al. 2019, Meta-Weight-Net (arXiv:1902.07379): a small network on the example's loss.
Kemaev et al. 2025 (arXiv:2505.00793): weights of a language model's data, by mixed flow.

Batches have fields `inputs`, `targets`, `source` [batch] and, in the query, `corrupted`
[batch] bool or None, as `metalearn.datasets.Text` draws them. Corrupted query examples are
no part of the outer loss: they are there to measure how well the weights tell them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.fields import check_fields
from metalearn.algorithm import Algorithm
from metalearn.algorithms.loss_weights.features import Seen, auc
from metalearn.algorithms.loss_weights.weighting import (
    Function,
    Weighting,
    bounded,
    check_normalize,
    check_squash,
    check_weighting,
)
from metalearn.algorithms.objectives import check_labels
from metalearn.model import Model
from metalearn.optimizers.updates import Evaluated, evaluate, evaluation_params, start, update
from metalearn.unroll import Episode, ExampleMean, ModelTraining, Unroll


@dataclasses.dataclass(frozen=True)
class LossWeights(Algorithm):
    """Learn how much each token, example or domain counts. eta: the weighting's parameters."""

    model: Model
    weighting: Weighting
    # Adam divides by sqrt(v), whose derivative is infinite at zero: hence eps_root.
    optimizer: optax.GradientTransformation = optax.adam(3e-3, eps_root=1e-8)  # the inner one
    squash: Function = bounded  # scores to weights, elementwise and positive
    normalize: Function | None = None  # weights of a batch to weights, such as `mean_one`
    # Whether the meta-gradient sees that eta moves theta, and theta the features. Without it, as
    # in Meta-Weight-Net, that path is left out; with it the derivative is exact, at the price
    # of one more forward pass a step. Weights that read no loss are exact either way.
    through_features: bool = False
    loss_fn: Callable[[Any, Any], jax.Array] = (  # outputs, targets -> losses [batch, ...]
        optax.softmax_cross_entropy_with_integer_labels
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_squash(self.squash)
        check_weighting(self.weighting)
        if self.normalize is not None:
            check_normalize(self.normalize)

    def init(self, key: jax.Array) -> Any:
        """Return the weighting's parameters."""
        return self.weighting.init(key)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a model from scratch. Support [T, batch, ...], query [m, ...]."""
        params, statistics = self.model.init(key)

        def init(eta: Any) -> ModelTraining:
            del eta
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: Any, state: ModelTraining, batch: Any, grad: Any) -> ModelTraining:
            batch, key = batch
            found, statistics = self._evaluated(eta, state, batch, key, grad)
            updates, optimizer = update(self.optimizer, found, state.optimizer, state.params)
            return ModelTraining(optax.apply_updates(state.params, updates), optimizer, statistics)

        def loss(eta: Any, state: ModelTraining) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self._held_out(eta, state, episode.query)

        return Unroll(init, step, loss)

    def batches(self, episode: Episode, key: jax.Array) -> Any:
        """Return the support batches [T, batch, ...] and a key for each."""
        steps = jax.tree.leaves(episode.support)[0].shape[0]
        return episode.support, jax.random.split(key, steps)

    def weights(self, eta: Any, losses: jax.Array, batch: Any) -> jax.Array:
        """Return the weights of a batch, [batch, 1] or [batch, S], from its losses [batch, S]."""
        source = jnp.zeros(losses.shape[:1], jnp.int32) if batch.source is None else batch.source
        weights = self.squash(self.weighting(eta, Seen(losses, source)))
        return weights if self.normalize is None else self.normalize(weights)

    def losses(self, state: ModelTraining, batch: Any) -> jax.Array:
        """Return the plain losses of a batch by a trained model: [batch, S]."""
        params = evaluation_params(state.optimizer, state.params)
        return self._losses(state._replace(params=params), batch, False, None)[0]

    def _evaluated(
        self, eta: Any, state: ModelTraining, batch: Any, key: jax.Array, grad: Any
    ) -> tuple[Evaluated, Any]:
        """Return the inner gradient with its loss, and the model's next statistics."""

        def weighted(params: Any, seen: Any, batch: Any, eta: Any, key: jax.Array) -> Any:
            losses, statistics = self._losses(state._replace(params=params), batch, True, key)
            known = jax.lax.stop_gradient(losses)
            if self.through_features:
                known, _ = self._losses(state._replace(params=seen), batch, True, key)
            return (losses * self.weights(eta, known, batch)).mean(), statistics

        def of_one(params: Any, example: Any, seen: Any, eta: Any) -> jax.Array:
            batch, key = example
            batch = jax.tree.map(lambda x: x[None], batch)
            return weighted(params, seen, batch, eta, key)[0]

        if self.normalize is not None or jax.tree.leaves(state.statistics):
            found = evaluate(grad, weighted, state.params, state.params, batch, eta, key)
            return found, found.aux
        # No example depends on another, so an engine may take a few at a time.
        examples = batch, jax.random.split(key, batch.targets.shape[0])
        mean = ExampleMean(of_one)
        return evaluate(grad, mean, state.params, examples, state.params, eta), state.statistics

    def _losses(
        self, state: ModelTraining, batch: Any, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Return (losses [batch, S], the model's next statistics)."""
        outputs, statistics = self.model.apply(
            state.params, state.statistics, batch.inputs, train=train, key=key
        )
        targets = batch.targets
        if self.loss_fn is optax.softmax_cross_entropy_with_integer_labels:
            targets = check_labels("LossWeights", outputs, targets)
        losses = self.loss_fn(outputs, targets)
        return losses.reshape(losses.shape[0], -1), statistics

    def _held_out(
        self, eta: Any, state: ModelTraining, query: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = self.losses(state, query)
        weights = self.weights(eta, losses, query)
        metrics = {"weight_min": weights.min(), "weight_mean": weights.mean()}
        if query.corrupted is None:
            return losses.mean(), metrics
        clean, of_examples = ~query.corrupted, weights.mean(1)
        metrics["weight_clean"] = _mean_where(clean, of_examples)
        metrics["weight_corrupted"] = _mean_where(query.corrupted, of_examples)
        metrics["weight_auc"] = auc(of_examples, clean)
        return _mean_where(clean, losses.mean(1)), metrics


def _mean_where(where: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(where, values, 0).sum() / where.sum()
