"""Antithetic perturbations: the meta-gradient from losses alone, in pairs of particles.

Smooth the outer loss F by a Gaussian, F_sigma(eta) = E F(eta + eps) with eps ~ N(0, sigma^2 I).
Its derivative needs no derivative of F, and mirrored pairs of perturbations, eps and -eps, cancel
F(eta) itself, the largest part of the variance:

    dF_sigma/deta = E [ (F(eta + eps) - F(eta - eps)) / (2 sigma^2) eps ]

This estimates the derivative of F_sigma. It equals that of F where F is quadratic, differs from
it by O(sigma^2) where F is smooth, and exists where F has jumps or is chaotic.

Each perturbed point is a particle: one inner loop is run from it, forward only. `ES` and `PES`
differ in the inner state that a particle starts from and in the direction that the difference of
a pair is multiplied with; the rest is in this module. With n pairs, the variance of the mean is
about |eta| / n times the squared gradient.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.flatten_util
import jax.numpy as jnp

from metalearn._utils.checks import at_most, is_integer
from metalearn._utils.fields import check_fields
from metalearn._utils.trees import precision
from metalearn.engines.base import Aux, MetaGradient, check_eta
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.inner_loop import rollout
from metalearn.unroll import Batch, Eta, InnerState, Unroll

Result = TypeVar("Result")
MOST_PAIRS = 1_000_000


class Particles(NamedTuple):
    """The perturbed points of one call, and the inner states that are carried to it.

    Args:
      points: like eta, leaves [2n, ...]: eta + eps_i, then eta - eps_i.
      directions: like eta, leaves [n, ...]: the loss difference of pair i is multiplied with them.
      states: inner states carried from the call before, leaves [2n, ...]; () if there are none.
      key: () of the next call.
    """

    points: Eta
    directions: Eta
    states: InnerState
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Antithetic(MetaGradient):
    """Estimates the meta-gradient from the losses of mirrored pairs of particles.

    Args:
      pairs: n, mirrored pairs of perturbations; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations, in the units of eta. Large: a smoother loss,
        and a bias of O(sigma^2). Small: differences of losses are lost to rounding.
    """

    pairs: int = 1
    sigma: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        name = type(self).__name__
        if not is_integer(self.pairs) or self.pairs < 1:
            raise ValueError(
                f"`{name}(pairs={self.pairs})`: the loss is evaluated at pairs of points, eta + "
                "eps and eta - eps. Use at least one pair."
            )
        at_most(name, MOST_PAIRS, pairs=self.pairs)
        if not 0 < self.sigma < float("inf"):
            raise ValueError(
                f"`{name}(sigma={self.sigma})` is the standard deviation of perturbations of eta, "
                "and differences of losses are divided by its square. Use a finite number above "
                "0, such as 0.01."
            )

    @abc.abstractmethod
    def draw(self, eta: Eta, state: Any) -> Particles:
        """Draw the particles of one call; `state` is the engine's own."""

    @abc.abstractmethod
    def particle_unroll(self, unroll: Unroll, state: Any, particle: InnerState) -> Unroll:
        """Return the unroll of one particle, whose carried inner state is `particle`."""

    @abc.abstractmethod
    def next_state(self, particles: Particles, states: InnerState) -> Any:
        """Return the engine's next state, of the particles' final inner `states` [2n, ...]."""

    def value_and_grad(
        self, unroll: Unroll, eta: Eta, batches: Batch, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Eta]:
        """Return ((loss (), aux), an estimate of the meta-gradient like eta).

        The loss, the metrics and `aux.inner` are means over the particles; `aux.state` is the inner
        state of the first particle.
        """

        def solve(unroll: Unroll, point: Eta) -> tuple[jax.Array, Aux]:
            return rollout(unroll, point, batches)

        particles = self.draw_particles(eta, state)
        losses, aux = self.at_particles(particles, solve, unroll, state)
        grads = mean(self.pair_estimates(particles, losses))
        return (losses.mean(), self.mean_aux(particles, aux)), grads

    def draw_particles(self, eta: Eta, state: Any) -> Particles:
        """Draw the particles of one call, after the checks of eta and of the key."""
        check_eta(eta)
        self._check_precision(eta)
        if not jax.tree.leaves(state):
            raise ValueError(
                f"`{self!r}` draws random perturbations and needs a key: pass "
                "`state=engine.init(key, unroll, eta)`, as the Trainer does."
            )
        return self.draw(eta, state)

    def _check_precision(self, eta: Eta) -> None:
        """Raise TypeError for a leaf of half precision, which rounds perturbations away."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(eta):
            dtype = jnp.result_type(leaf)
            if precision(leaf) != dtype:
                raise TypeError(
                    f"`eta{jax.tree_util.keystr(path)}` has dtype {dtype}, and "
                    f"`{type(self).__name__}` adds perturbations of about sigma={self.sigma}, "
                    "which its rounding changes or takes away. Keep eta in float32 and compute in "
                    f"{dtype}, as `Precision(model, compute=...)` does."
                )

    def at_particles(
        self,
        particles: Particles,
        solve: Callable[[Unroll, Eta], Result],
        unroll: Unroll,
        state: Any,
    ) -> Result:
        """Return `solve(unroll, point)` for every particle: leaves [2n, ...]."""

        def one(point: Eta, particle: InnerState) -> Result:
            return solve(self.particle_unroll(unroll, state, particle), point)

        return jax.vmap(one)(particles.points, particles.states)

    def pair_estimates(self, particles: Particles, losses: jax.Array) -> Eta:
        """Return the estimate of each pair from losses [2n]: like eta, leaves [n, ...]."""
        if precision(losses) != losses.dtype:
            raise TypeError(
                f"`{type(self).__name__}` divides differences of outer losses by sigma^2, and this "
                f"outer loss is {losses.dtype}, whose rounding they would be. Return it in float32."
            )
        plus, minus = losses[: self.pairs], losses[self.pairs :]
        slopes = (plus - minus) / (2 * self.sigma**2)

        def scaled(slope: jax.Array, direction: Eta) -> Eta:
            return jax.tree.map(lambda x: (slope * x).astype(x.dtype), direction)

        return jax.vmap(scaled)(slopes, particles.directions)

    def mean_aux(self, particles: Particles, aux: Aux) -> Aux:
        """Return one `Aux` for all particles, from one with leaves [2n, ...]."""
        inner = Inner(*(x.all(0) if x.dtype == bool else x.mean(0) for x in aux.inner))
        first = jax.tree.map(lambda x: x[0], aux.state)
        return Aux(mean(aux.metrics), first, inner, self.next_state(particles, aux.state))

    def perturbations(self, key: jax.Array, eta: Eta) -> Eta:
        """Draw eps_i ~ N(0, sigma^2 I): like eta, leaves [n, ...]."""
        flat, unravel = jax.flatten_util.ravel_pytree(eta)
        rows = self.sigma * jax.random.normal(key, (self.pairs, flat.size), flat.dtype)
        return jax.vmap(unravel)(rows)


def mirrored(eta: Eta, perturbations: Eta) -> Eta:
    """Return eta + eps_i, then eta - eps_i: like eta, leaves [2n, ...]."""

    def both(x: Any, eps: jax.Array) -> jax.Array:
        x = jnp.asarray(x)[None]
        return jnp.concatenate([x + eps, x - eps])

    return jax.tree.map(both, eta, perturbations)


def mean(tree: Any) -> Any:
    """Return the mean over the leading axis of every leaf."""
    return jax.tree.map(lambda x: x.mean(0), tree)
