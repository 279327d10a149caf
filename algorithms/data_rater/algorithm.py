"""DataRater: a network that rates training examples, learned through the training they are for.

The rater phi gives every example x (its inputs and its targets) a score, eta are its parameters,
and an inner step weights the examples of its batch B_t by the softmax of their scores over the
batch, so that they compete for a step of constant size:

    theta_{t+1} = theta_t - Phi(sum_{i in B_t} w_i grad l_i(theta_t)),  w = softmax(phi(x_i; eta))
    F(eta)      = 1/m sum_j l_j(theta_T)                          j held-out, unweighted

A score is a function of the example alone, of neither theta nor the step: once learned, the rater
scores any number of examples, and the best share of them is what other models train on
(`metalearn.algorithms.rate_examples`, `top_fraction`). `LossWeights` learns weights that follow the
loss of the model that is trained; `DataWeights` has a number for each example and no network.

The paper's recipe is truncated unrolls of K = 2 steps, of a population of inner models whose ages
differ and which are replaced after a lifetime of T steps, each meta-gradient through an Adam of its
own before the mean:

    Trainer(
        DataRater(model, rater),
        MixedFlow(),
        optax.sgd(1e-3),
        tasks_per_step=8,
        truncation=Truncation(2, transform=optax.scale_by_adam()),
    )

T is the number of inner steps of the tasks. Two things differ from the paper. The loss of an
example is the mean over its tokens, in the paper their sum; for Adam as the inner optimizer the two
are the same. And the outer loss of an inner model is on the same m examples, those of its task, in
all of its T steps, where the paper draws new ones for each outer step; more `queries`, or a larger
population, make up for it.

Calian et al. 2025, "DataRater: Meta-Learned Dataset Curation" (arXiv:2505.17895).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithms.loss_weights.weighted_training import (
    WeightedTraining,
    weighted_mean_gradient,
)
from metalearn.model import Model
from metalearn.optimizers.updates import Evaluated
from metalearn.unroll import Batch, Eta, GradFn, Masked, ModelTraining


@readable
@dataclasses.dataclass(frozen=True)
class DataRater(WeightedTraining):
    """Learn a network that scores training examples. eta: the parameters of the rater.

    Support: batches with leaves [T, batch, ...], one slice per inner step. Query: leaves [m, ...].

    Args:
      model: the network that is trained.
      rater: scores examples: called with (inputs [batch, ...], targets [batch, ...]), it returns
        [batch] or [batch, 1], such as `text_rater(vocabulary)`. It is applied in evaluation mode,
        with the statistics it was initialised with, so that the score of an example does not
        depend on other examples. With initial scores of zero the weights begin as equal ones.
      optimizer: the inner optimizer. Adam divides by sqrt(v), whose derivative is infinite at
        zero: hence `eps_root`.
      loss_fn: outputs, targets -> losses [batch, ...].
    """

    model: Model
    rater: Model
    optimizer: optax.GradientTransformation = described(optax.adam, 3e-3, eps_root=1e-8)
    loss_fn: Callable[[Any, Any], jax.Array] = optax.softmax_cross_entropy_with_integer_labels

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> Eta:
        """Return the initial parameters of the rater."""
        return self.rater.init(key)[0]

    def scores(self, eta: Eta, batch: Batch) -> Float[Array, " batch"]:
        """Return the score of each example of a batch: [batch], any real numbers.

        Args:
          eta: the parameters of the rater.
          batch: with fields `inputs` and `targets`, leaves [batch, ...].

        Raises:
          ValueError: unless the rater returns one number for each example; for `Masked` targets.
        """
        if isinstance(batch.targets, Masked):
            raise ValueError(
                "`DataRater` weights the examples of a batch by a softmax of their scores, and "
                "with `Masked` targets the padding would have a part in it. Use batches without "
                "padding."
            )
        statistics = self._statistics
        if jax.tree.leaves(statistics):  # values, which may be those of a pretrained rater
            _, statistics = self.rater.init(jax.random.key(0))
        pair = batch.inputs, batch.targets
        scores, _ = self.rater.apply(eta, statistics, pair, train=False)
        count = jax.tree.leaves(batch.inputs)[0].shape[0]
        if jnp.shape(scores) not in ((count,), (count, 1)):
            raise ValueError(
                f"`DataRater(rater={type(self.rater).__name__})` returned scores of the shape "
                f"{[*jnp.shape(scores)]} for {count} examples, but a score is one number per "
                f"example: [{count}] or [{count}, 1]. Let the network of the rater end in one "
                "output, and take the mean over the tokens of an example."
            )
        return scores.reshape(count)

    @functools.cached_property
    def _statistics(self) -> Any:
        """The shapes of the rater's statistics; no leaves for most, whose `init` is not needed."""
        return jax.eval_shape(self.rater.init, jax.eval_shape(lambda: jax.random.key(0)))[1]

    def weights(self, eta: Eta, losses: jax.Array | None, batch: Batch) -> jax.Array:
        """Return the weights of a batch, [batch, 1]: a softmax of scores, times batch: mean one."""
        del losses
        scores = self.scores(eta, batch)
        return scores.size * jax.nn.softmax(scores)[:, None]

    def weighted_gradient(
        self, eta: Eta, state: ModelTraining, batch: Batch, key: jax.Array, grad: GradFn
    ) -> tuple[Evaluated, Any]:
        """Return (the weighted loss with its gradient by params, the model's next statistics).

        The weights do not depend on params: the inner gradient and its Hessian products leave the
        rater out.
        """

        def losses(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            return self._losses(state._replace(params=params), batch, key)

        weights = self.weights(eta, None, batch)
        return weighted_mean_gradient(grad, losses, state, batch, weights, key)
