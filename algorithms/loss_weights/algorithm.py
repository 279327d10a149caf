"""Learned loss weights: which data a model should learn from, and how much.

The inner loop trains a model from scratch on data of which some may be harmful. The loss l_i of
each token is multiplied by a weight, a function of eta; the outer loss is the unweighted
cross-entropy on clean held-out data,

    theta_{t+1} = theta_t - Phi(grad  1/n sum_i w(eta, x_i) l_i(theta_t))    t = 0 .. T-1
    F(eta)      = 1/m sum_j l_j(theta_T)                         j held-out, unweighted

and its derivative with respect to w_i is minus the inner product of example i's gradient with
that of the held-out loss: helpful examples get larger weights. Only the parameters of the weighting
are learned; theta_0 is drawn anew for every task, so the weights are not fitted to one run.

Ren et al. 2018, "Learning to Reweight Examples" (arXiv:1803.09050): one step, no network.
Shu et al. 2019, Meta-Weight-Net (arXiv:1902.07379): a small network on the example's loss.
Kemaev et al. 2025 (arXiv:2505.00793): weights of a language model's data, by mixed flow.

Batches have fields `inputs`, `targets`, `source` [batch] and, in the query, `corrupted`
[batch] bool or None, as `metalearn.datasets.Text` draws them. Corrupted query examples are left out
of the outer loss; they serve to measure how well the weights separate them from clean ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithm import TRAINING_RUN, Algorithm
from metalearn.algorithms import pictures
from metalearn.algorithms.loss_weights.features import Examples, WeightInputs, auc
from metalearn.algorithms.loss_weights.weighting import (
    Function,
    Weighting,
    bounded,
    check_normalize,
    check_squash,
    check_weighting,
)
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


@readable
@dataclasses.dataclass(frozen=True)
class LossWeights(Algorithm):
    """Learn how much each token, example or domain counts. eta: the weighting's parameters.

    Support: batches with leaves [T, batch, ...], one slice per inner step. Query: leaves [m, ...].

    Args:
      model: the network that is trained.
      weighting: from the examples of a batch to scores.
      optimizer: the inner optimizer. Adam divides by sqrt(v), whose derivative is infinite at
        zero: hence `eps_root`.
      squash: scores to weights, elementwise and positive.
      normalize: weights of a batch to weights, such as `mean_one`; None: the weights as they are.
      through_features: whether the meta-gradient includes the path from eta through theta to the
        features. Without it, as in Meta-Weight-Net, features are constants; with it the derivative
        is exact, and costs one more forward pass per step. Weights that do not depend on the loss
        are exact either way.
      loss_fn: outputs, targets -> losses [batch, ...].
    """

    model: Model
    weighting: Weighting
    optimizer: optax.GradientTransformation = described(optax.adam, 3e-3, eps_root=1e-8)
    squash: Function = bounded
    normalize: Function | None = None
    through_features: bool = False
    loss_fn: Callable[[Any, Any], jax.Array] = optax.softmax_cross_entropy_with_integer_labels

    def __post_init__(self) -> None:
        check_fields(self)
        check_squash(self.squash)
        check_weighting(self.weighting)
        if self.normalize is not None:
            check_normalize(self.normalize)

    def init(self, key: jax.Array) -> Eta:
        """Return the initial parameters of the weighting."""
        return self.weighting.init(key)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`."""
        params, statistics = self.model.init(key)

        def init(eta: Eta) -> ModelTraining:
            del eta
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
            batch, key = batch
            evaluated, statistics = self._evaluate(eta, state, batch, key, grad)
            updates, optimizer = update(self.optimizer, evaluated, state.optimizer, state.params)
            return ModelTraining(optax.apply_updates(state.params, updates), optimizer, statistics)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            return self._held_out_loss(eta, state, episode.query)

        return Unroll(init, step, loss)

    def batches(self, episode: Episode, key: jax.Array) -> Batch:
        """Return the support batches, leaves [T, batch, ...], and a key for each, [T]."""
        steps = jax.tree.leaves(episode.support)[0].shape[0]
        return episode.support, jax.random.split(key, steps)

    def weights(self, eta: Eta, losses: jax.Array, batch: Batch) -> jax.Array:
        """Return the weights of a batch, [batch, 1] or [batch, S], from its losses [batch, S]."""
        source = jnp.zeros(losses.shape[:1], jnp.int32) if batch.source is None else batch.source
        weights = self.squash(self.weighting(eta, WeightInputs(losses, source)))
        return weights if self.normalize is None else self.normalize(weights)

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
        check_pair("LossWeights", support, "[T, batch, ...]")
        if len(support) == 2:
            return Examples(*support)
        try:
            _ = support.inputs, support.targets, support.source
        except AttributeError:
            raise ValueError(
                f"`LossWeights.adapt(support=)` got a {type(support).__name__} of {len(support)}, "
                "but takes (inputs, targets), leaves [T, batch, ...], or batches with the fields "
                "`inputs`, `targets` and `source`, as `metalearn.datasets.Text` draws them."
            ) from None
        return support

    def pictures(self) -> Mapping[str, Callable[..., Mapping[str, Any]]]:
        """Return "weights": see `metalearn.algorithms.pictures`."""
        return {"weights": pictures.weights}

    def _evaluate(
        self, eta: Eta, state: ModelTraining, batch: Batch, key: jax.Array, grad: GradFn
    ) -> tuple[Evaluated, Any]:
        """Return (the weighted loss with its gradient, the model's next statistics).

        The gradient is taken with respect to `params`. The losses that the weights are computed
        from are those at `feature_params`, the same values as a separate argument.
        """

        def weighted(
            params: Any, feature_params: Any, batch: Batch, eta: Eta, key: jax.Array
        ) -> tuple[jax.Array, Any]:
            losses, statistics = self._losses(state._replace(params=params), batch, key)
            inputs = jax.lax.stop_gradient(losses)
            if self.through_features:
                moved = state._replace(params=feature_params)
                inputs, _ = self._losses(moved, batch, key)
            _, mean = unmasked(batch.targets)
            return mean(losses * self.weights(eta, inputs, batch)), statistics

        def example_loss(params: Any, example: Any, feature_params: Any, eta: Eta) -> jax.Array:
            batch, key = example
            batch = jax.tree.map(lambda x: x[None], batch)
            return weighted(params, feature_params, batch, eta, key)[0]

        masked = isinstance(batch.targets, Masked)
        if masked and self.normalize is not None:
            raise ValueError(
                "`LossWeights(normalize=)` gives the weights of a batch a mean, and with `Masked` "
                "targets the padding would have a part in it. Use normalize=None, or batches "
                "without padding."
            )
        if masked or self.normalize is not None or jax.tree.leaves(state.statistics):
            evaluated = evaluate(grad, weighted, state.params, state.params, batch, eta, key)
            return evaluated, evaluated.aux
        # No example depends on another, so engines may split the batch into micro-batches.
        examples = batch, jax.random.split(key, batch.targets.shape[0])
        mean = ExampleMean(example_loss)
        return evaluate(grad, mean, state.params, examples, state.params, eta), state.statistics

    def _losses(self, state: ModelTraining, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return (the losses [batch, S] of an inner step, the model's next statistics)."""
        outputs, statistics = self.model.apply(
            state.params, state.statistics, batch.inputs, train=True, key=key
        )
        return self.losses_of(outputs, batch), statistics

    def losses_of(self, outputs: Any, batch: Batch) -> jax.Array:
        """Return the losses [batch, S] of a model's outputs."""
        targets, _ = unmasked(batch.targets)
        if self.loss_fn is optax.softmax_cross_entropy_with_integer_labels:
            targets = check_labels("LossWeights", outputs, targets)
        losses = self.loss_fn(outputs, targets)
        return losses.reshape(losses.shape[0], -1)

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
                "`LossWeights` got a query set with `corrupted` and with `Masked` targets, of "
                "which each leaves examples out. Mark the padding as corrupted instead."
            )
        clean, example_weights = ~query.corrupted, weights.mean(1)
        metrics["weight_clean"] = _mean_where(clean, example_weights)
        metrics["weight_corrupted"] = _mean_where(query.corrupted, example_weights)
        metrics["weight_auc"] = auc(example_weights, clean)
        return _mean_where(clean, losses.mean(1)), metrics


def _mean_where(where: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(where, values, 0).sum() / where.sum()
