"""Prototypical networks: a class is the mean of the embeddings of its support examples.

With an embedding f_eta, the prototype of class k and the logits of a query x are

    c_k       = mean of f_eta(x_i) over the support examples of class k
    logits_k  = -|f_eta(x) - c_k|^2

and the outer loss is the cross-entropy of the queries. Snell, Swersky and Zemel 2017
(arXiv:1703.05175). With one shot and squared distances it is a matching network with that distance
(Vinyals et al. 2016, arXiv:1606.04080). The paper trains on tasks with more classes than those it
is tested on: `dataclasses.replace(algorithm, ways=5)` evaluates what was learned with `ways=60`.

It costs one forward and one backward pass of the network over support and query set.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.readable import readable
from metalearn.algorithms.closed_form import ClosedFormHead, Members
from metalearn.unroll import Eta


class Embedding(NamedTuple):
    """The meta-parameters eta of prototypical networks.

    params: of the network, its own tree.
    """

    params: Any


@readable
@dataclasses.dataclass(frozen=True)
class ProtoNet(ClosedFormHead):
    """Prototypical networks: classify by the nearest class mean. Snell et al. 2017.

    Support and query: (inputs [n, ...], labels [n] int). Labels may be `metalearn.Masked`; a class
    without support examples is never predicted.

    Args:
      model: the network: inputs [n, ...] -> embeddings [n, ...], flattened to [n, d].
      ways: classes of a task.
      objective: logits [n, ways], labels -> loss (), metrics; the outer loss.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.closed_form`.
    """

    def init(self, key: jax.Array) -> Embedding:
        """Return the network."""
        return Embedding(self.model.init(key)[0])

    def head(self, eta: Eta, embeddings: jax.Array, members: Members) -> dict[str, jax.Array]:
        """Return the prototypes, [ways, d]; zeros for a class without examples."""
        del eta
        shots = jnp.maximum(members.one_hot.sum(0), 1)
        return {"prototypes": (members.one_hot.T @ embeddings) / shots[:, None]}

    def logits(self, head: dict[str, jax.Array], embeddings: jax.Array) -> jax.Array:
        """Return the negative squared distances to the prototypes, [m, ways]."""
        centre = head["prototypes"].mean(0, keepdims=True)  # far from zero, squares would cancel
        embeddings, prototypes = embeddings - centre, head["prototypes"] - centre
        lengths = (embeddings**2).sum(1)[:, None] + (prototypes**2).sum(1)[None]
        return 2 * embeddings @ prototypes.T - lengths
