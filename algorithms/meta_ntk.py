"""Adaptation in closed form with the neural tangent kernel of the network.

To first order in its parameters a network f_eta is linear, with the features of its Jacobian
J(x) = df_eta(x) / d eta and the kernel K(x, x') = J(x) J(x')^T. Its least-squares adaptation to a
support set (X, Y) is a kernel ridge regression, which starts at the network itself:

    delta   = J(X)^T (K(X, X) + lambda k I)^-1 (Y - f_eta(X))
    f(x)    = f_eta(x) + J(x) delta
    F(eta)  = L_Q(alpha f)

with k the mean diagonal of K(X, X), so that lambda has no unit. It is where gradient descent on the
squared error of the linearised network ends, with a weight decay of lambda k: MAML with T going to
infinity, in the limit of wide networks, without an inner loop (T = 0). Zhou et al. 2021,
"Meta-Learning with Neural Tangent Kernels" (arXiv:2102.03909); their Meta-RKHS-II has the
closed form of that descent stopped early, at a finite time, in place of a lambda. lambda and, for
classes, the scale alpha of the logits are learned, as in R2-D2, whose kernel is that of the last
layer alone (`adapted="head"` here).

With n support examples of c outputs, J(X) has n c rows of all adapted parameters: memory
n c |theta|, and n c backward passes; the solve is O((n c)^3). A query costs two forward passes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from metalearn._utils.checks import above, pattern
from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import precise, split_by_path
from metalearn.algorithms.closed_form import ClosedForm, no_step
from metalearn.algorithms.maml import batch_norm_policy
from metalearn.algorithms.objectives import Objective, check_labels, cross_entropy, unmasked
from metalearn.model import Model, check_dropout
from metalearn.unroll import Episode, Masked, Metrics, ModelTraining, Unroll


class TangentNetwork(NamedTuple):
    """The meta-parameters eta of MetaNTK.

    params: of the network, its own tree.
    log_penalty: (), the logarithm of lambda.
    log_scale: (), the logarithm of alpha; None: alpha is 1, and not learned.
    """

    params: Any
    log_penalty: jax.Array
    log_scale: jax.Array | None


@readable
@dataclasses.dataclass(frozen=True)
class MetaNTK(ClosedForm):
    """Kernel ridge regression with the network's neural tangent kernel. Zhou et al. 2021.

    Support and query: (inputs [n, ...], targets): labels [n] int, or targets like the outputs.

    Args:
      model: the network, with an output for each class.
      objective: outputs, targets -> loss (), metrics; the outer loss.
      adapted: a regular expression that the paths of the parameters in the kernel match, such as
        "head"; "": all.
      batch_norm: "transductive", "running" or "frozen": see `metalearn.algorithms.maml`.
      penalty: lambda before the first outer step, relative to the mean diagonal of the kernel.
      scale: alpha before the first outer step, for classes: a regression on one-hot labels returns
        values between about 0 and 1, which are too close for a softmax. None: alpha = 1, not
        learned, for a regression.
    """

    model: Model
    objective: Objective = cross_entropy
    adapted: str = ""
    batch_norm: str = "transductive"
    penalty: float = 0.1
    scale: float | None = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_dropout("MetaNTK", self.model)
        pattern("MetaNTK", adapted=self.adapted)
        batch_norm_policy(self.batch_norm)
        above("MetaNTK", 0, penalty=self.penalty, scale=self.scale)

    def init(self, key: jax.Array) -> TangentNetwork:
        """Return the network, and the logarithms of lambda and alpha."""
        scale = None if self.scale is None else jnp.asarray(math.log(self.scale), float)
        params, _ = self.model.init(key)
        return TangentNetwork(params, jnp.asarray(math.log(self.penalty), float), scale)

    def unroll(self, episode: Episode, key: jax.Array) -> Unroll:
        """Return the regression on one task: all of it is in `init`."""
        policy = batch_norm_policy(self.batch_norm)

        def init(eta: TangentNetwork) -> ModelTraining:
            inputs, targets = episode.support
            _, statistics = self.model.init(key)
            tangent, fixed, join = split_by_path(eta.params, self.adapted)

            def network(tangent: list[jax.Array]) -> tuple[jax.Array, Any]:
                outputs, updated = self.model.apply(
                    join(tangent, fixed),
                    statistics,
                    inputs,
                    train=policy.train_on_support,
                    key=key,
                )
                return precise(outputs), updated

            outputs, pull, updated = jax.vjp(network, tangent, has_aux=True)
            residuals, counted = _residuals(outputs, targets)
            basis = jnp.eye(outputs.size, dtype=outputs.dtype) * counted.reshape(-1, 1)
            (jacobian,) = jax.vmap(lambda row: pull(row.reshape(outputs.shape)))(basis)
            delta = _ridge(jacobian, jnp.exp(eta.log_penalty), residuals, counted)
            return ModelTraining(delta, (), updated if policy.carry_statistics else statistics)

        def loss(eta: TangentNetwork, state: ModelTraining) -> tuple[jax.Array, Metrics]:
            inputs, targets = episode.query
            outputs = self.predict(*self.trained(eta, state), inputs, key)
            return self.objective(outputs, targets)

        return Unroll(init, no_step, loss)

    def trained(self, eta: TangentNetwork, state: ModelTraining) -> tuple[Any, Any]:
        """Return ({"network": its parameters, "delta": their change, "log_scale"}, statistics)."""
        params = {"network": eta.params, "delta": state.params, "log_scale": eta.log_scale}
        return params, state.statistics

    def predict(self, params: Any, statistics: Any, inputs: Any, key: jax.Array | None) -> Any:
        """Return the outputs of the linearised network for queries [n, ...], scaled by alpha."""
        train = batch_norm_policy(self.batch_norm).train_on_query
        tangent, fixed, join = split_by_path(params["network"], self.adapted)

        def network(tangent: list[jax.Array]) -> jax.Array:
            theta = join(tangent, fixed)
            outputs, _ = self.model.apply(
                theta, statistics, inputs, train=train, dropout=False, key=key
            )
            return precise(outputs)

        outputs, change = jax.jvp(network, (tangent,), (params["delta"],))
        if params["log_scale"] is None:
            return outputs + change
        return jnp.exp(params["log_scale"]).astype(outputs.dtype) * (outputs + change)


def _residuals(outputs: jax.Array, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Return (targets - outputs, zero for padding; 1 for what counts, 0 for padding), as outputs.

    Labels become one-hot.
    """
    mask = targets.mask if isinstance(targets, Masked) else jnp.ones(len(outputs), bool)
    values, _ = unmasked(targets)
    if jnp.issubdtype(values.dtype, jnp.integer):
        values = check_labels("MetaNTK", outputs, values)
        values = jax.nn.one_hot(values, outputs.shape[-1], dtype=outputs.dtype)
    if values.shape != outputs.shape:
        raise ValueError(
            f"`MetaNTK` fits each output to its target, but the outputs are {list(outputs.shape)} "
            f"and the targets {list(values.shape)}. Give them one shape, or integer labels [n] to "
            "outputs [n, classes]."
        )
    counted = mask.reshape(mask.shape + (1,) * (outputs.ndim - mask.ndim)).astype(outputs.dtype)
    counted = jnp.broadcast_to(counted, outputs.shape)
    return (values.astype(outputs.dtype) - outputs) * counted, counted


def _ridge(
    jacobian: list[jax.Array], penalty: jax.Array, residuals: jax.Array, counted: jax.Array
) -> list[jax.Array]:
    """Return J^T (J J^T + penalty k I)^-1 residuals, like the parameters; k: the mean diagonal.

    Args:
      jacobian: J, leaves [m, ...]; rows of padding are zero.
      penalty: ().
      residuals: m numbers.
      counted: the same, 0 for padding, which the mean leaves out.
    """
    flat = [precise(leaf).reshape(len(leaf), -1) for leaf in jacobian]
    kernel = sum(leaf @ leaf.T for leaf in flat[1:]) + flat[0] @ flat[0].T
    ridge = penalty.astype(kernel.dtype) * jnp.trace(kernel) / jnp.maximum(counted.sum(), 1)
    matrix = kernel + ridge * jnp.eye(len(kernel), dtype=kernel.dtype)
    weights = jax.scipy.linalg.solve(matrix, residuals.reshape(-1), assume_a="pos")
    return [jnp.tensordot(weights, leaf, 1).astype(leaf.dtype) for leaf in jacobian]
