"""R2-D2: the head of a task is a ridge regression on the embeddings of its support set.

With the support embeddings X [n, d + 1], a column of ones appended, and one-hot labels Y [n, ways],

    W = argmin |X W - Y|^2 + lambda |W|^2 = X^T (X X^T + lambda I_n)^-1 Y
    logits of a query x = alpha [f_eta(x), 1] W

and lambda and alpha are learned with the embedding f_eta, as their logarithms. Bertinetto,
Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers"
(arXiv:1805.08136). The second form of W (Woodbury's identity) solves a system of the n support
examples, few, instead of the d + 1 features, many; whichever is smaller is solved, by Cholesky's
decomposition. The paper's learned offset beta of all logits is left out: a softmax does not see it.

It costs a forward and a backward pass of the network over support and query set, and a solve of
O(min(n, d)^3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from metalearn._utils.checks import above
from metalearn._utils.readable import readable
from metalearn.algorithms.closed_form import ClosedFormHead, Members
from metalearn.unroll import Eta


class RidgeEmbedding(NamedTuple):
    """The meta-parameters eta of R2-D2.

    params: of the network, its own tree.
    log_penalty: (), the logarithm of lambda.
    log_scale: (), the logarithm of alpha.
    """

    params: Any
    log_penalty: jax.Array
    log_scale: jax.Array


@readable
@dataclasses.dataclass(frozen=True)
class R2D2(ClosedFormHead):
    """R2-D2: a differentiable ridge regression as the head. Bertinetto et al. 2019.

    Support and query: (inputs [n, ...], labels [n] int). Labels may be `metalearn.Masked`; a class
    without support examples is never predicted.

    Args:
      model: the network: inputs [n, ...] -> embeddings [n, ...], flattened to [n, d].
      ways: classes of a task.
      objective: logits [n, ways], labels -> loss (), metrics; the outer loss.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.closed_form`.
      penalty: lambda before the first outer step.
      scale: alpha before the first outer step. A regression on one-hot labels returns values
        between about 0 and 1, which are too close for a softmax.
    """

    penalty: float = 1.0
    scale: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above("R2D2", 0, penalty=self.penalty, scale=self.scale)

    def init(self, key: jax.Array) -> RidgeEmbedding:
        """Return the network, and the logarithms of lambda and alpha."""
        logs = (jnp.asarray(math.log(value), float) for value in (self.penalty, self.scale))
        return RidgeEmbedding(self.model.init(key)[0], *logs)

    def head(self, eta: Eta, embeddings: jax.Array, members: Members) -> dict[str, jax.Array]:
        """Return the weights alpha W, [d + 1, ways]; the last row is of the column of ones."""
        counted = members.one_hot.sum(1)[:, None]  # rows of padding are zero, and have no effect
        x, penalty = _with_ones(embeddings) * counted, jnp.exp(eta.log_penalty)
        n, features = x.shape
        if n <= features:
            weights = x.T @ _solve(x @ x.T, penalty, members.one_hot)
        else:
            weights = _solve(x.T @ x, penalty, x.T @ members.one_hot)
        return {"weights": jnp.exp(eta.log_scale).astype(weights.dtype) * weights}

    def logits(self, head: dict[str, jax.Array], embeddings: jax.Array) -> jax.Array:
        """Return the scaled predictions of the regression, [m, ways]."""
        return _with_ones(embeddings) @ head["weights"]


def _with_ones(embeddings: jax.Array) -> jax.Array:
    return jnp.concatenate([embeddings, jnp.ones_like(embeddings[:, :1])], 1)


def _solve(gram: jax.Array, penalty: jax.Array, targets: jax.Array) -> jax.Array:
    """Return (gram + penalty I)^-1 targets, for a symmetric positive semi-definite gram [n, n]."""
    matrix = gram + penalty.astype(gram.dtype) * jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve(matrix, targets, assume_a="pos")
