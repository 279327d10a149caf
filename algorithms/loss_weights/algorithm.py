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

What batches are, and the training itself: `metalearn.algorithms.loss_weights.weighted_training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithms.loss_weights.features import WeightInputs
from metalearn.algorithms.loss_weights.weighted_training import WeightedTraining
from metalearn.algorithms.loss_weights.weighting import (
    Function,
    Weighting,
    bounded,
    check_normalize,
    check_squash,
    check_weighting,
)
from metalearn.algorithms.objectives import unmasked
from metalearn.model import Model
from metalearn.optimizers.updates import Evaluated, evaluate
from metalearn.unroll import Batch, Eta, ExampleMean, GradFn, Masked, ModelTraining


@readable
@dataclasses.dataclass(frozen=True)
class LossWeights(WeightedTraining):
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

    def weights(self, eta: Eta, losses: jax.Array, batch: Batch) -> jax.Array:
        """Return the weights of a batch, [batch, 1] or [batch, S], from its losses [batch, S]."""
        source = jnp.zeros(losses.shape[:1], jnp.int32) if batch.source is None else batch.source
        weights = self.squash(self.weighting(eta, WeightInputs(losses, source)))
        return weights if self.normalize is None else self.normalize(weights)

    def weighted_gradient(
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
