"""CAVIA: fast context adaptation. A small vector adapts, the network is shared by all tasks.

The network f_eta reads a context phi [size] beside its inputs, and

    phi_0 = 0,   phi_{t+1} = phi_t - alpha grad_phi L_S(eta, phi_t)      t = 0 .. T-1
    F(eta) = L_Q(eta, phi_T)

Zintgraf et al. 2019 (arXiv:1810.03642). The inner state is phi alone: no copy of the network, no
gradient of it in the inner loop, and `Forward` or long horizons cost little in memory. phi is
appended to the last axis of the inputs: features for a vector, channels for an image, the same at
every position. (The paper's networks for images read it by FiLM in a later layer.)

The first weights of phi decide how far it moves: with phi_0 = 0 its gradient goes through them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import above, at_least, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import Batch, Episode, GradFn, Metrics, ModelTraining, Unroll


class SharedNetwork(NamedTuple):
    """The meta-parameters eta of CAVIA.

    params: of the network, its own tree.
    """

    params: Any


@readable
@dataclasses.dataclass(frozen=True)
class CAVIA(SupportAlgorithm):
    """CAVIA: adapt a context vector, share the network. Zintgraf et al. 2019.

    Support and query: (inputs [n, ..., c], targets [n, ...]).

    Args:
      model: the network: inputs [n, ..., c + context] -> outputs.
      objective: outputs, targets -> loss (), metrics; of the inner and of the outer loss.
      context: numbers of the context phi.
      rate: alpha, the inner learning rate.
      inner_steps: T, inner steps in training.
      eval_steps: inner steps in evaluation; None: as in training.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
    """

    extra_inputs: ClassVar[str] = "context"

    model: Model
    objective: Objective = cross_entropy
    context: int = 5
    rate: float = 1.0
    inner_steps: int = 2
    eval_steps: int | None = None
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "context", "inner_steps", "eval_steps")
        check_dropout("CAVIA", self.model)
        batch_norm_policy(self.batch_norm)
        above("CAVIA", 0, rate=self.rate)
        counts("CAVIA", 1, context=self.context, inner_steps=self.inner_steps)
        at_least("CAVIA", 1, eval_steps=self.eval_steps)

    def init(self, key: jax.Array) -> SharedNetwork:
        """Return the network."""
        return SharedNetwork(self.model.init(key)[0])

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the adaptation to one task."""
        policy = batch_norm_policy(self.batch_norm)
        inputs, targets = episode.support

        def init(eta: SharedNetwork) -> ModelTraining:
            phi = jnp.zeros(self.context, jnp.result_type(*jax.tree.leaves(eta.params)))
            return ModelTraining(phi, (), self.model.init(key)[1])

        def step(
            eta: SharedNetwork, state: ModelTraining, key: Batch, grad: GradFn
        ) -> ModelTraining:
            def support_loss(phi: jax.Array) -> Any:
                outputs, statistics = self.model.apply(
                    eta.params,
                    state.statistics,
                    with_context(inputs, phi),
                    train=policy.train_on_support,
                    key=key,
                )
                return self.objective(outputs, targets)[0], statistics

            grads, statistics = grad(support_loss, has_aux=True)(state.params)
            carried = statistics if policy.carry_statistics else state.statistics
            return ModelTraining(state.params - self.rate * grads, (), carried)

        def loss(eta: SharedNetwork, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            queries, labels = episode.query
            outputs = self.predict(*self.trained(eta, state), queries, key)
            return self.objective(outputs, labels)

        return Unroll(init, step, loss)

    def trained(self, eta: SharedNetwork, state: ModelTraining) -> tuple[Any, Any]:
        """Return ({"network": its parameters, "context": phi [size]}, running statistics)."""
        return {"network": eta.params, "context": state.params}, state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs for queries [n, ...], under the policy of batch normalisation."""
        inputs = with_context(inputs, params["context"])
        return super().predict(params["network"], statistics, inputs, key)

    def evaluation(self) -> CAVIA:
        """Return the same algorithm with `eval_steps` inner steps."""
        return self if self.eval_steps is None else self.with_steps(self.eval_steps)

    def with_steps(self, steps: int) -> CAVIA:
        """Return the same algorithm with another number of inner steps."""
        return dataclasses.replace(self, inner_steps=steps)


def with_context(inputs: jax.Array, context: jax.Array) -> jax.Array:
    """Return inputs [n, ..., c] with a context [size] appended: [n, ..., c + size].

    Their dtype is the wider of the two: a context is not rounded to the inputs' precision.

    Raises:
      ValueError: for inputs without an axis of features, or that are integers, such as tokens.
    """
    inputs = jnp.asarray(inputs)
    if inputs.ndim < 2 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"`CAVIA` appends its context to the features of inputs [n, ..., c], and these are "
            f"{inputs.dtype}{list(inputs.shape)}. Give them an axis of features, as floats; tokens "
            "have none to append to."
        )
    beside = jnp.broadcast_to(context, (*inputs.shape[:-1], context.size))
    return jnp.concatenate([inputs, beside], -1)
