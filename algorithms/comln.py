"""COMLN: the head of a task follows a gradient flow, for a time that is learned.

With embeddings f_eta of the support set S, the weights W of a linear classifier are the solution of

    dW/dt = - grad_W L_S(W; f_eta),    W(0) = W_0,        0 <= t <= tau
    F(eta) = L_Q(W(tau); f_eta)

so that the length of the adaptation is a number, not a count, and is learned with the network as
its logarithm. Deleu et al. 2022, "Continuous-Time Meta-Learning with Forward Mode Differentiation"
(COMLN, arXiv:2203.01443).

The flow is solved by the classical Runge-Kutta method in T steps of length tau / T, each of four
inner gradients: the error is O(T^-4), and the derivative with respect to tau, W_0 and the
embeddings is that of the computed solution, exactly, under every engine. An adaptive solver
(`diffrax`, `jax.experimental.ode`) takes as many steps as it must, in a `while_loop` that has no
backward pass of its own, and differentiates its vector field itself, where engines differentiate
inner gradients: its step would be out of their reach. The price of fixed steps is that tau has a
limit: a step is stable where tau / T times the largest curvature of L_S is below 2.78. That
product's upper bound, of a cross-entropy, is the metric `flow_step`; where it exceeds that, more
steps are safer.

A step sees embeddings, not the network: they are computed once, and are part of the inner state
with W. The paper's own algorithm, forward mode in the space of the support examples, keeps memory
flat in the number of steps; here `Reverse` saves T states of W and logits, and
`MixedFlow(remat="nested")` about sqrt(T). Engines that do not see theta_0 (`Truncated`, `Implicit`,
`SAMA`) would not see how the embeddings of the support set depend on the network, and refuse it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import above, at_least, counts
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.algorithms.maml import SupportAlgorithm, batch_norm_policy
from metalearn.algorithms.objectives import Objective, cross_entropy
from metalearn.model import Model, check_dropout
from metalearn.unroll import Batch, Episode, GradFn, Masked, Metrics, Unroll


class FlowEmbedding(NamedTuple):
    """The meta-parameters eta of COMLN.

    params: of the network, its own tree.
    head: W_0 [d, ways]; None: zeros, not learned.
    log_time: (), the logarithm of tau.
    """

    params: Any
    head: jax.Array | None
    log_time: jax.Array


class Flow(NamedTuple):
    """The inner state of COMLN.

    params: W(t), [d, ways].
    embeddings: of the support set, [n, d].
    statistics: the network's mutable state.
    """

    params: jax.Array
    embeddings: jax.Array
    statistics: Any


@readable
@dataclasses.dataclass(frozen=True)
class COMLN(SupportAlgorithm):
    """COMLN: adapt the head by a gradient flow of learned length. Deleu et al. 2022.

    Support and query: (inputs [n, ...], labels [n] int).

    Args:
      model: the network: inputs [n, ...] -> embeddings [n, ...], flattened to [n, d].
      ways: classes of a task.
      objective: logits [n, ways], labels -> loss (), metrics; of the flow and of the outer loss.
      time: tau before the first outer step.
      inner_steps: T, steps of the solver.
      eval_steps: steps of the solver in evaluation; None: as in training. tau is the same.
      features: d, to learn W_0, from a small random one; None: W_0 is zero.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
    """

    own_head: ClassVar[bool] = True

    model: Model
    ways: int
    objective: Objective = cross_entropy
    time: float = 1.0
    inner_steps: int = 10
    eval_steps: int | None = None
    features: int | None = None
    batch_norm: str = "transductive"

    def __post_init__(self) -> None:
        check_fields(self, "ways", "inner_steps", "eval_steps", "features")
        check_dropout("COMLN", self.model)
        batch_norm_policy(self.batch_norm)
        above("COMLN", 0, time=self.time)
        counts("COMLN", 2, ways=self.ways)
        counts("COMLN", 1, inner_steps=self.inner_steps)
        at_least("COMLN", 1, eval_steps=self.eval_steps, features=self.features)

    def init(self, key: jax.Array) -> FlowEmbedding:
        """Return the network, the initial head and the logarithm of tau."""
        params, _ = self.model.init(key)
        head = None
        if self.features is not None:
            shape = self.features, self.ways
            head = jax.random.normal(jax.random.fold_in(key, 1), shape) / math.sqrt(self.features)
        return FlowEmbedding(params, head, jnp.asarray(math.log(self.time), float))

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the gradient flow of one task."""
        policy = batch_norm_policy(self.batch_norm)
        inputs, labels = episode.support

        def init(eta: FlowEmbedding) -> Flow:
            _, statistics = self.model.init(key)
            outputs, updated = self.model.apply(
                eta.params, statistics, inputs, train=policy.train_on_support, key=key
            )
            embeddings = outputs.reshape(outputs.shape[0], -1)
            carried = updated if policy.carry_statistics else statistics
            return Flow(self._head(eta, embeddings), embeddings, carried)

        def step(eta: FlowEmbedding, state: Flow, batch: Batch, grad: GradFn) -> Flow:
            del batch

            def support_loss(head: jax.Array) -> jax.Array:
                return self.objective(state.embeddings @ head, labels)[0]

            def slope(head: jax.Array) -> jax.Array:
                return -grad(support_loss)(head)

            dt = (jnp.exp(eta.log_time) / self.inner_steps).astype(state.params.dtype)
            k1 = slope(state.params)
            k2 = slope(state.params + dt / 2 * k1)
            k3 = slope(state.params + dt / 2 * k2)
            k4 = slope(state.params + dt * k3)
            return state._replace(params=state.params + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))

        def loss(eta: FlowEmbedding, state: Flow) -> tuple[jax.Array, Metrics]:
            queries, targets = episode.query
            outputs = self.predict(*self.trained(eta, state), queries, key)
            value, metrics = self.objective(outputs, targets)
            time = jax.lax.stop_gradient(jnp.exp(eta.log_time))
            step = time / self.inner_steps * _curvature(state.embeddings, labels)
            return value, {**metrics, "flow_time": time, "flow_step": step}

        return Unroll(init, step, loss)

    def _head(self, eta: FlowEmbedding, embeddings: jax.Array) -> jax.Array:
        d = embeddings.shape[-1]
        if eta.head is None:
            return jnp.zeros((d, self.ways), embeddings.dtype)
        if eta.head.shape[0] != d:
            raise ValueError(
                f"`COMLN(features={eta.head.shape[0]})` learns the head of embeddings of that "
                f"size, but those of this network have {d} numbers. Set features={d}, or None for "
                "a head that begins at zero."
            )
        if eta.head.shape[1] != self.ways:
            raise ValueError(
                f"`COMLN(ways={self.ways})` got a learned head of {eta.head.shape[1]} classes. "
                "Take that many, or train with features=None, whose eta fits any number."
            )
        return eta.head

    def batches(self, episode: Episode, key: jax.Array) -> jax.Array:
        """Return the numbers of the steps, [T]: every step reads the whole support set."""
        del episode, key
        return jnp.arange(self.inner_steps)

    def trained(self, eta: FlowEmbedding, state: Flow) -> tuple[Any, Any]:
        """Return ({"embedding": parameters of the network, "head": W(tau)}, its statistics)."""
        return {"embedding": eta.params, "head": state.params}, state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the logits [m, ways] of queries, under the policy of batch normalisation."""
        outputs = super().predict(params["embedding"], statistics, inputs, key)
        return outputs.reshape(outputs.shape[0], -1) @ params["head"]

    def evaluation(self) -> COMLN:
        """Return the same algorithm with `eval_steps` steps of the solver."""
        return self if self.eval_steps is None else self.with_steps(self.eval_steps)

    def with_steps(self, steps: int) -> COMLN:
        """Return the same algorithm with another number of steps for the same time."""
        return dataclasses.replace(self, inner_steps=steps)


def _curvature(embeddings: jax.Array, labels: jax.Array | Masked) -> jax.Array:
    """Return a bound () of the largest curvature of the cross-entropy of a linear classifier.

    The Hessian of a softmax is 1/2 at most, and |X X^T| its Frobenius norm at most.

    Args:
      embeddings: X, [n, d].
      labels: [n], of which padding does not count.
    """
    counted = labels.mask if isinstance(labels, Masked) else jnp.ones(len(embeddings), bool)
    x = jax.lax.stop_gradient(jnp.where(counted[:, None], embeddings, 0))
    return 0.5 * jnp.linalg.norm(x @ x.T) / jnp.maximum(counted.sum(), 1)
