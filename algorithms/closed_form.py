"""Few-shot classifiers whose head is a closed-form function of the support set.

A network embeds inputs, and eta is the network (with a few numbers of the head). On a task with
support set S the head has no inner loop,

    w(eta, S) = head(eta, embeddings of S, labels of S)
    F(eta)    = L_Q(logits of the embeddings of Q by w)

so T = 0: `init` computes the head, no step is taken, and every engine differentiates `init` and the
outer loss alone. `ProtoNet` and `R2D2` say what the head is.

Batch normalisation in the embedding follows the policies of `metalearn.algorithms.maml`: queries
are normalised by their own batch ("transductive"), by the statistics of the support set ("running",
with a small momentum of the layer: 0 is the support set alone), or by pretrained ones ("frozen").
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import counts
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precise
from metalearn.algorithm import Algorithm
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, check_labels, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import (
    Batch,
    Episode,
    Eta,
    GradFn,
    Masked,
    Metrics,
    ModelTraining,
    Unroll,
)


class Members(NamedTuple):
    """Which support examples belong to which class.

    one_hot: [n, ways], 1 where an example is of a class; a row of padding is zero.
    present: [ways] bool, whether a class has an example.
    """

    one_hot: jax.Array
    present: jax.Array


class ClosedForm(SupportAlgorithm):
    """What algorithms share that adapt in closed form, in `Unroll.init`: T = 0. Abstract."""

    def batches(self, episode: Episode, key: jax.Array) -> jax.Array:
        """Return no batches: T = 0."""
        del episode, key
        return jnp.arange(0)

    def model_mode(self) -> str:
        """Say in which mode the network is for the support set and for queries."""
        return super().model_mode().replace("in inner steps", "for the support set")

    def with_steps(self, steps: int) -> Algorithm:
        """Refuse a number of inner steps: there are none."""
        name = type(self).__name__
        raise ValueError(
            f"`{name}.adapt(steps={steps})`: {name} adapts in closed form, without inner steps. "
            "Leave `steps`."
        )


def no_step(eta: Eta, state: ModelTraining, batch: Batch, grad: GradFn) -> ModelTraining:
    """Return the state: the inner step of an unroll that is never stepped."""
    del eta, batch, grad
    return state


@dataclasses.dataclass(frozen=True)
class ClosedFormHead(ClosedForm):
    """A learned embedding, and a head of it in closed form. Abstract.

    Support and query: (inputs [n, ...], labels [n] int). Labels may be `metalearn.Masked`; a class
    without support examples is never predicted.

    Args:
      model: the network: inputs [n, ...] -> embeddings [n, ...], flattened to [n, d].
      ways: classes of a task.
      objective: logits [n, ways], labels -> loss (), metrics; the outer loss.
      batch_norm: "transductive", "running" or "frozen".
    """

    own_head: ClassVar[bool] = True

    model: Model
    ways: int
    objective: Objective = cross_entropy
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "ways")
        counts(type(self).__name__, 2, ways=self.ways)
        check_dropout(type(self).__name__, self.model)
        batch_norm_policy(self.batch_norm)

    @abc.abstractmethod
    def head(self, eta: Eta, embeddings: jax.Array, members: Members) -> dict[str, jax.Array]:
        """Return the head of a task.

        Args:
          eta: the meta-parameters, whose field `params` is the network.
          embeddings: [n, d], of the support set.
          members: the classes of its examples.
        """

    @abc.abstractmethod
    def logits(self, head: dict[str, jax.Array], embeddings: jax.Array) -> jax.Array:
        """Return the logits [m, ways] of embeddings [m, d], by a head from `head`."""

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the head of one task: all of it is in `init`."""
        policy = batch_norm_policy(self.batch_norm)

        def init(eta: Eta) -> ModelTraining:
            inputs, labels = episode.support
            _, statistics = self.model.init(key)
            embeddings, updated = self._embed(
                eta.params, statistics, inputs, train=policy.train_on_support, key=key
            )
            members = self._members(labels, embeddings.dtype)
            head = {**self.head(eta, embeddings, members), "present": members.present}
            return ModelTraining(head, (), updated if policy.carry_statistics else statistics)

        def loss(eta: Eta, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, labels = episode.query
            logits = self.predict(*self.trained(eta, state), inputs, key)
            return self.objective(logits, labels)

        return Unroll(init, no_step, loss)

    def trained(self, eta: Eta, state: ModelTraining) -> tuple[Any, Any]:
        """Return ({"embedding": parameters of the network, and the head}, running statistics)."""
        return {"embedding": eta.params, **state.params}, state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the logits [m, ways] of queries, under the policy of batch normalisation."""
        train = batch_norm_policy(self.batch_norm).train_on_query
        embeddings, _ = self._embed(
            params["embedding"], statistics, inputs, train=train, dropout=False, key=key
        )
        logits = self.logits(params, embeddings)
        never = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
        return jnp.where(params["present"][None], logits, never)

    def _embed(self, params: Any, statistics: Any, inputs: Any, **mode: Any) -> tuple[Any, Any]:
        """Return (embeddings [n, d], the network's next statistics)."""
        outputs, statistics = self.model.apply(params, statistics, inputs, **mode)
        return precise(outputs).reshape(outputs.shape[0], -1), statistics  # a head is exact

    def _members(self, labels: Any, dtype: Any) -> Members:
        values, mask = labels if isinstance(labels, Masked) else (jnp.asarray(labels), None)
        places = jnp.zeros((*values.shape, self.ways), dtype)
        values = check_labels(type(self).__name__, places, values)
        one_hot = jax.nn.one_hot(values, self.ways, dtype=dtype)
        if mask is not None:
            one_hot = one_hot * mask[:, None].astype(dtype)
        return Members(one_hot, one_hot.any(0))
