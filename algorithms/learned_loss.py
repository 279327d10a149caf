"""A learned loss: descending it for a few steps makes the real loss small.

eta are the weights of a small network that looks at a prediction and its target. From a fresh
theta_0 of every task, the inner loop descends that network,

    L_eta(theta) = mean over support examples and outputs of softplus(net_eta(prediction, target))
    theta_{t+1}  = theta_t - alpha grad_theta L_eta(theta_t)        t = 0 .. T-1
    F(eta)       = L_Q(theta_T),  the real loss on the query set

Bechtle et al. 2019, "Meta-Learning via Learned Loss" (ML3, arXiv:1906.05374). No initialisation is
learned: the loss has to lead anywhere from any theta_0.

The network is the same for every output of the model. A prediction and its target are the output
and the target of a regression; with integer labels they are the probability of a class and 1 or 0,
so that the loss does not depend on which number a class has in a task. With one output that is the
paper's loss.

An inner step costs a gradient of the model and of the loss network; the meta-gradient with respect
to a few thousand weights of the latter, mixed second derivatives of both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import at_least, counts, widths
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import described, readable
from metalearn.algorithms.loss_weights.weighting import init_mlp, mlp
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, check_labels, squared_error, unmasked
from metalearn.model import Model, check_dropout
from metalearn.optimizers.updates import evaluate, evaluation_params, start, update
from metalearn.unroll import Batch, Episode, GradFn, Masked, Metrics, ModelTraining, Unroll


class LossNetwork(NamedTuple):
    """The meta-parameters eta of a learned loss.

    layers: of the network, [{"w": [a, b], "b": [b]}]: (prediction, target) -> a number.
    """

    layers: list[dict[str, jax.Array]]


@readable
@dataclasses.dataclass(frozen=True)
class LearnedLoss(SupportAlgorithm):
    """ML3: learn the loss that the inner loop descends. Bechtle et al. 2019.

    Support and query: (inputs [n, ...], targets [n, ...]).

    Args:
      model: the network that is trained, from a fresh initialisation in every task.
      objective: outputs, targets -> loss (), metrics; of the outer loss. The inner loop does not
        see it.
      optimizer: the inner optimizer.
      inner_steps: T, inner steps in training.
      eval_steps: inner steps in evaluation; None: as in training.
      hidden: the widths of the hidden layers of the loss network, with tanh between them.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
    """

    model: Model
    objective: Objective = squared_error
    optimizer: optax.GradientTransformation = described(optax.sgd, 0.1)
    inner_steps: int = 10
    eval_steps: int | None = None
    hidden: tuple[int, ...] = (40, 40)
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "inner_steps", "eval_steps")
        check_dropout("LearnedLoss", self.model)
        batch_norm_policy(self.batch_norm)
        widths("LearnedLoss", hidden=self.hidden)
        counts("LearnedLoss", 1, inner_steps=self.inner_steps)
        at_least("LearnedLoss", 1, eval_steps=self.eval_steps)

    def init(self, key: jax.Array) -> LossNetwork:
        """Return the weights of the loss network, all of them random."""
        *layers, last = init_mlp(key, (2, *self.hidden, 1))
        width = last["w"].shape[0]
        weights = jax.random.normal(jax.random.fold_in(key, 1), last["w"].shape)
        return LossNetwork([*layers, {**last, "w": weights / width**0.5}])

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the training of a fresh model, drawn with `key`, on the learned loss."""
        policy = batch_norm_policy(self.batch_norm)
        inputs, targets = episode.support

        def init(eta: LossNetwork) -> ModelTraining:
            del eta
            params, statistics = self.model.init(key)
            return ModelTraining(params, start(self.optimizer, params), statistics)

        def step(eta: LossNetwork, state: ModelTraining, key: Batch, grad: GradFn) -> ModelTraining:
            def support_loss(theta: Any) -> Any:
                outputs, statistics = self.model.apply(
                    theta, state.statistics, inputs, train=policy.train_on_support, key=key
                )
                return learned_loss(eta.layers, outputs, targets), statistics

            evaluated = evaluate(grad, support_loss, state.params)
            updates, optimizer = update(self.optimizer, evaluated, state.optimizer, state.params)
            carried = evaluated.aux if policy.carry_statistics else state.statistics
            return ModelTraining(optax.apply_updates(state.params, updates), optimizer, carried)

        def loss(eta: LossNetwork, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            queries, labels = episode.query
            outputs = self.predict(*self.trained(eta, state), queries, key)
            return self.objective(outputs, labels)

        return Unroll(init, step, loss)

    def trained(self, eta: LossNetwork, state: ModelTraining) -> tuple[Any, Any]:
        """Return (the parameters of the trained model, its running statistics)."""
        del eta
        return evaluation_params(state.optimizer, state.params), state.statistics

    def evaluation(self) -> LearnedLoss:
        """Return the same algorithm with `eval_steps` inner steps."""
        return self if self.eval_steps is None else self.with_steps(self.eval_steps)

    def with_steps(self, steps: int) -> LearnedLoss:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)


def learned_loss(
    layers: list[dict[str, jax.Array]], outputs: jax.Array, targets: jax.Array | Masked
) -> jax.Array:
    """Return the learned loss (), a mean over examples and outputs, positive.

    Args:
      layers: of the loss network.
      outputs: of the model: [n, ...], or logits [n, classes] where targets are labels.
      targets: like the outputs, or labels [n] int; or `metalearn.Masked` of either.
    """
    values, mean = unmasked(targets)
    predictions = outputs
    if jnp.issubdtype(values.dtype, jnp.integer):
        values = check_labels("LearnedLoss", outputs, values)
        values = jax.nn.one_hot(values, outputs.shape[-1], dtype=outputs.dtype)
        predictions = jax.nn.softmax(outputs)
    elif values.shape != outputs.shape:
        raise ValueError(
            f"`LearnedLoss` compares each output with its target, but the outputs are "
            f"{list(outputs.shape)} and the targets {list(values.shape)}. Give them one shape, or "
            "integer labels [n] to logits [n, classes]."
        )
    pairs = jnp.stack([predictions, values.astype(predictions.dtype)], -1)
    return mean(jax.nn.softplus(mlp(layers, pairs)[..., 0]))
