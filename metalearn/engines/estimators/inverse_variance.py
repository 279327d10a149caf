"""Two estimates of one derivative, mixed by how sure each is.

Through a smooth inner loop the pathwise derivative (backpropagation, or any exact engine) has far
less variance than evolution strategies. Through a chaotic one it explodes, and they do not. Which
it is changes with eta, so both are taken at the same perturbed points, and the samples tell:

    h_i = (dF(eta + eps_i) + dF(eta - eps_i)) / 2                     pathwise
    g_i = (F(eta + eps_i) - F(eta - eps_i)) / (2 sigma^2) xi_i        `ES` or `PES`
    V   = sum over eta of the variance over i, / n                    of the mean of each
    dF  ~ (mean h / V_h + mean g / V_g) / (1 / V_h + 1 / V_g)

For `ES`, E h_i = E g_i = dF_sigma / deta where F is differentiable, so no weight between is wrong,
and these give least variance of all if the two are independent. A pathwise gradient that is not
finite gets no weight, nor do pathwise gradients that are all exactly zero while the losses of a
pair differ: F has steps that a derivative cannot see.

| n pairs           | memory                  | time, in forward passes        |
|-------------------|-------------------------|--------------------------------|
| `InverseVariance` | 2n times the pathwise's | 2n times the pathwise engine's |

What it is not: unbiased to the letter. The weights come from the same samples as the estimates
they weigh, which biases the result where an estimate and its variance are correlated; the more
pairs, the less. Gradients that explode are heavy-tailed, and a few samples may all miss the tail.
And in truncated training the pathwise part leaves out what came before the truncation: its bias
is in the result with its weight, which is nearly all where the loss is smooth, even with `PES`,
whose own part has none.

References: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned
optimizers" (arXiv:1810.10180), who mix per parameter; Parmas et al. 2018, "PIPPS" (total
propagation, arXiv:1902.01240), who take one weight for all, as we do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.engines.base import Aux, MetaGradient
from metalearn.engines.estimators.antithetic import Antithetic, mean
from metalearn.engines.estimators.es import ES
from metalearn.engines.mixed_flow.custom_rules import Plan
from metalearn.engines.mixed_flow.engine import MixedFlow
from metalearn.unroll import Unroll


@dataclasses.dataclass(frozen=True)
class InverseVariance(MetaGradient):
    """Evolution strategies and the pathwise derivative, each with the weight it deserves.

    The weight of the pathwise part is in the metrics, as `pathwise_weight`.

    Args:
      estimator: `ES` or `PES`, of at least two pairs: the variances are those between them.
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
                f"`InverseVariance` takes variances over pairs, and `{self.estimator!r}` has but "
                "one. Take at least `pairs=2`; 4 or more tell more."
            )

    @property
    def commutes(self) -> bool:
        """Whether the pathwise engine does."""
        return self.pathwise.commutes

    def plan(self, call: Any) -> Plan:
        """Return what the pathwise engine says."""
        return self.pathwise.plan(call)

    def init(self, key: jax.Array, unroll: Unroll, eta: Any) -> Any:
        """Return the estimator's state; ValueError where the pathwise engine has one too."""
        if jax.tree.leaves(self.pathwise.init(key, unroll, eta)):
            raise ValueError(
                f"`InverseVariance(pathwise={self.pathwise!r})`: an engine that carries a state of "
                "its own, such as random directions, cannot be the pathwise part. Take an exact "
                "one, such as `MixedFlow()`."
            )
        return self.estimator.init(key, unroll, eta)

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), an estimate of the meta-gradient like eta).

        The loss and what is in `aux` are means over the particles; `aux.state` is the first one's.
        """

        def solve(unroll: Unroll, point: Any) -> tuple[tuple[jax.Array, Aux], Any]:
            return self.pathwise.value_and_grad(unroll, point, batches)

        particles = self.estimator.draw_particles(eta, state)
        (losses, aux), slopes = self.estimator.at_particles(particles, solve, unroll, state)
        estimates = self.estimator.pair_estimates(particles, losses)
        grads, weight = mix_by_inverse_variance(_mean_of_pairs(slopes), estimates)
        summary = self.estimator.mean_aux(particles, aux)
        metrics = {**summary.metrics, "pathwise_weight": weight}
        return (losses.mean(), summary._replace(metrics=metrics)), grads


def mix_by_inverse_variance(pathwise: Any, estimates: Any) -> tuple[Any, jax.Array]:
    """Mix the means of samples, of leaves [n, ...], by inverse variance: (mean, weight ()).

    The weight is that of `pathwise`: 0 where its variance is not finite, or where it is zero
    everywhere; else 1 where the estimates' variance is not finite, or they are zero. Where
    neither can be trusted the result is what `estimates` say, NaN and all.
    """
    ours, theirs = _variance_of_mean(pathwise), _variance_of_mean(estimates)
    share = jnp.where(ours == 0, 1.0, theirs / (ours + theirs))
    share = jnp.where(jnp.isfinite(theirs), share, 1.0)
    share = jnp.where(_silent(estimates), 1.0, share)  # differences lost to rounding
    share = jnp.where(jnp.isfinite(ours) & ~_silent(pathwise), share, 0.0)

    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        return _weighted(share, x.mean(0)) + _weighted(1 - share, y.mean(0))

    return jax.tree.map(mix, pathwise, estimates), share


def _silent(samples: Any) -> jax.Array:
    """Say whether all samples are zero everywhere: no variance, and nothing said."""
    return jnp.stack([(x == 0).all() for x in jax.tree.leaves(samples)]).all()


def _weighted(share: jax.Array, x: jax.Array) -> jax.Array:
    """Return share * x, and 0 where the share is 0, whatever x."""
    return jnp.where(share == 0, 0, share * x).astype(x.dtype)


def _mean_of_pairs(grads: Any) -> Any:
    """Return the mean of each pair of leaves [2n, ...]: leaves [n, ...]."""
    return mean(jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), grads))


def _variance_of_mean(samples: Any) -> jax.Array:
    """Return the total variance of the mean of samples, of leaves [n, ...]: ()."""

    def total(x: jax.Array) -> jax.Array:
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return precise.var(0, ddof=1).sum() / x.shape[0]

    return jnp.asarray(sum(map(total, jax.tree.leaves(samples))))
