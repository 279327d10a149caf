"""Two estimates of one meta-gradient, weighted by the inverse of their variances.

Through a smooth inner loop the pathwise derivative (backpropagation, or any exact engine) has far
less variance than evolution strategies. Through a chaotic inner loop it explodes, and that of
evolution strategies does not. Which case holds changes with eta, so both are evaluated at the same
perturbed points, and weighted by the variances of the samples:

    h_i = (dF(eta + eps_i) + dF(eta - eps_i)) / 2                     pathwise
    g_i = (F(eta + eps_i) - F(eta - eps_i)) / (2 sigma^2) xi_i        `ES` or `PES`
    V   = sum over eta of the variance over i, / n                    of the mean of each
    dF  ~ (mean h / V_h + mean g / V_g) / (1 / V_h + 1 / V_g)

For `ES`, E h_i = E g_i = dF_sigma / deta where F is differentiable, so every weighting has the
right expectation, and these weights have the least variance if the two are independent. The
pathwise weight is 0 where a pathwise gradient is not finite, and where all pathwise gradients are
exactly zero while the losses of a pair differ: F then has jumps that a derivative does not show.

| n pairs           | memory                  | time, in forward passes        |
|-------------------|-------------------------|--------------------------------|
| `InverseVariance` | 2n times the pathwise's | 2n times the pathwise engine's |

The result is not exactly unbiased. The weights are computed from the samples that they weight,
which biases the result where an estimate and its variance are correlated; less with more pairs.
Exploding gradients are heavy-tailed, and a few samples may all miss the tail. And in truncated
unrolls the pathwise part ignores the steps before; its bias enters the result with its weight,
which is close to 1 where the loss is smooth, even with `PES`, which has no such bias itself.

References: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned
optimizers" (arXiv:1810.10180), with a weight per parameter; Parmas et al. 2018, "PIPPS" (total
propagation, arXiv:1902.01240), with one weight for all, as here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precise
from metalearn.engines.base import Aux, MetaGradient
from metalearn.engines.custom_rules import Plan
from metalearn.engines.estimators.antithetic import Antithetic, mean
from metalearn.engines.estimators.es import ES
from metalearn.engines.mixed_flow.engine import MixedFlow
from metalearn.unroll import Batch, Eta, Unroll


@dataclasses.dataclass(frozen=True)
class InverseVariance(MetaGradient):
    """Evolution strategies and the pathwise derivative, weighted by inverse variance.

    The weight of the pathwise part is in the metrics, as `pathwise_weight`.

    Args:
      estimator: `ES` or `PES`, with at least two pairs: variances are taken between pairs.
      pathwise: any engine without a state of its own.
    """

    estimator: Antithetic = ES(pairs=4)
    pathwise: MetaGradient = MixedFlow()

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        if not isinstance(self.estimator, Antithetic):
            raise TypeError(
                "`InverseVariance(estimator=)` takes `ES(pairs=n)` or `PES(pairs=n)`, not "
                f"{self.estimator!r}. The engine that differentiates goes in as `pathwise`."
            )
        if self.estimator.pairs < 2:
            raise ValueError(
                f"`InverseVariance` takes variances over pairs, and `{self.estimator!r}` has "
                "only one. Use at least `pairs=2`; with 4 or more they are more accurate."
            )

    @property
    def commutes(self) -> bool:
        """Whether the pathwise engine does."""
        return self.pathwise.commutes

    def plan(self, call: Any) -> Plan:
        """Return what the pathwise engine says."""
        return self.pathwise.plan(call)

    def doubts(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return what the pathwise engine says."""
        return self.pathwise.doubts(metrics)

    def init(self, key: jax.Array, unroll: Unroll, eta: Eta) -> Any:
        """Return the estimator's state; ValueError if the pathwise engine has one too."""
        if jax.tree.leaves(self.pathwise.init(key, unroll, eta)):
            raise ValueError(
                f"`InverseVariance(pathwise={self.pathwise!r})`: an engine that carries a state of "
                "its own, such as random directions, cannot be the pathwise part. Use an exact "
                "one, such as `MixedFlow()`."
            )
        return self.estimator.init(key, unroll, eta)

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), an estimate of the meta-gradient like eta).

        The loss, the metrics and `aux.inner` are means over the particles; `aux.state` is the inner
        state of the first particle.
        """

        def solve(unroll: Unroll, point: Eta) -> tuple[tuple[jax.Array, Aux], Eta]:
            return self.pathwise.value_and_grad(unroll, point, batches)

        particles = self.estimator.draw_particles(eta, state)
        (losses, aux), gradients = self.estimator.at_particles(particles, solve, unroll, state)
        estimates = self.estimator.pair_estimates(particles, losses)
        pathwise = mean(
            jax.tree.map(lambda x: x.reshape(2, x.shape[0] // 2, *x.shape[1:]), gradients)
        )
        grads, weight = mix_by_inverse_variance(pathwise, estimates)
        aux = self.estimator.mean_aux(particles, aux)
        metrics = {**aux.metrics, "pathwise_weight": weight}
        return (losses.mean(), aux._replace(metrics=metrics)), grads


def mix_by_inverse_variance(pathwise: Eta, estimates: Eta) -> tuple[Eta, jax.Array]:
    """Average the means of two sets of samples, weighted by inverse variance.

    The weight of `pathwise` is 0 if its variance is not finite or all of it is zero; else 1 if the
    variance of `estimates` is not finite or all of them are zero. If both are non-finite, the
    result is the mean of `estimates`, NaN or infinite.

    Args:
      pathwise: like eta, leaves [n, ...].
      estimates: like eta, leaves [n, ...].

    Returns:
      (the weighted mean, like eta; the weight () of `pathwise`).
    """
    pathwise_variance, variance = _variance_of_mean(pathwise), _variance_of_mean(estimates)
    weight = jnp.where(pathwise_variance == 0, 1.0, variance / (pathwise_variance + variance))
    weight = jnp.where(jnp.isfinite(variance), weight, 1.0)
    weight = jnp.where(_all_zero(estimates), 1.0, weight)  # differences lost to rounding
    weight = jnp.where(jnp.isfinite(pathwise_variance) & ~_all_zero(pathwise), weight, 0.0)

    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        return _weighted(weight, x.mean(0)) + _weighted(1 - weight, y.mean(0))

    return jax.tree.map(mix, pathwise, estimates), weight


def _all_zero(samples: Eta) -> jax.Array:
    """Say whether all samples are exactly zero: (), bool."""
    return jnp.stack([(x == 0).all() for x in jax.tree.leaves(samples)]).all()


def _weighted(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Return weight * x, and 0 where the weight is 0, even if x is not finite."""
    return jnp.where(weight == 0, 0, weight * x).astype(x.dtype)


def _variance_of_mean(samples: Eta) -> jax.Array:
    """Return the variance of the mean of samples, leaves [n, ...], summed over all entries: ()."""

    def total(x: jax.Array) -> jax.Array:
        return precise(x).var(0, ddof=1).sum() / x.shape[0]

    return jnp.asarray(sum(map(total, jax.tree.leaves(samples))))
