"""Antithetic perturbations: a derivative from losses alone, in pairs of particles.

Smooth the outer loss F by a Gaussian, F_sigma(eta) = E F(eta + eps) with eps ~ N(0, sigma^2 I).
Its derivative needs no derivative of F, and pairs of perturbations that mirror each other cancel
F(eta) itself, the largest part of the variance:

    dF_sigma/deta = E [ (F(eta + eps) - F(eta - eps)) / (2 sigma^2) eps ]

What is estimated is the derivative of F_sigma. It is that of F where F is quadratic, off by
O(sigma^2) where F is smooth, and exists where F has jumps or is chaotic.

Each point is a particle: the whole inner loop runs from it, forward only. `ES` and `PES` differ
in where a particle starts and in what the difference of a pair is multiplied with; all else is
here. Of n pairs, the variance of the mean is about |eta| / n times the squared gradient.
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
from metalearn.engines.base import Aux, MetaGradient, check_eta
from metalearn.engines.grad_recorder import Inner
from metalearn.engines.inner_loop import rollout
from metalearn.unroll import Unroll

Result = TypeVar("Result")
MOST_PAIRS = 1_000_000


class Particles(NamedTuple):
    """The points of one call, and where the inner loop starts from each."""

    points: Any  # like eta, leaves [2n, ...]: eta + eps_i, and then eta - eps_i
    directions: Any  # like eta, leaves [n, ...]: what the difference of pair i is multiplied with
    states: Any  # leaves [2n, ...]: what the particles carry from call to call
    key: jax.Array  # of the next call


@dataclasses.dataclass(frozen=True)
class Antithetic(MetaGradient):
    """Estimates the derivative from the losses of `pairs` pairs of particles.

    Args:
      pairs: n, of perturbations that mirror each other; 2n inner loops run, all at once.
      sigma: standard deviation of the perturbations, in the units of eta. Large: a smoother loss,
        and a bias of O(sigma^2). Small: differences of losses drown in rounding.
    """

    pairs: int = 1
    sigma: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        name = type(self).__name__
        if not is_integer(self.pairs) or self.pairs < 1:
            raise ValueError(
                f"`{name}(pairs={self.pairs})`: the loss is looked at in pairs of points, eta + "
                "eps and eta - eps. Take at least one."
            )
        at_most(name, MOST_PAIRS, pairs=self.pairs)
        if not 0 < self.sigma < float("inf"):
            raise ValueError(
                f"`{name}(sigma={self.sigma})` is the standard deviation of perturbations of eta, "
                "by whose square differences are divided. Take a finite number above 0, such as "
                "0.01."
            )

    @abc.abstractmethod
    def draw(self, eta: Any, state: Any) -> Particles:
        """Draw the particles of one call; `state` is the engine's own."""

    @abc.abstractmethod
    def particle_unroll(self, unroll: Unroll, state: Any, particle: Any) -> Unroll:
        """Return the unroll of one particle; `particle` is its slice of `Particles.states`."""

    @abc.abstractmethod
    def next_state(self, particles: Particles, states: Any) -> Any:
        """Return the engine's next state; `states` [2n, ...] are where the particles ended."""

    def value_and_grad(
        self, unroll: Unroll, eta: Any, batches: Any, state: Any = ()
    ) -> tuple[tuple[jax.Array, Aux], Any]:
        """Return ((loss (), aux), an estimate of the meta-gradient like eta).

        The loss and what is in `aux` are means over the particles; `aux.state` is the first one's.
        """

        def solve(unroll: Unroll, point: Any) -> tuple[jax.Array, Aux]:
            return rollout(unroll, point, batches)

        particles = self.draw_particles(eta, state)
        losses, aux = self.at_particles(particles, solve, unroll, state)
        grads = mean(self.pair_estimates(particles, losses))
        return (losses.mean(), self.mean_aux(particles, aux)), grads

    def draw_particles(self, eta: Any, state: Any) -> Particles:
        """Draw the particles of one call, or refuse what has no derivative or no key."""
        check_eta(eta)
        if not jax.tree.leaves(state):
            raise ValueError(
                f"`{self!r}` draws random perturbations and needs a key: pass "
                "`state=engine.init(key, unroll, eta)`, as the Trainer does."
            )
        return self.draw(eta, state)

    def at_particles(
        self, particles: Particles, solve: Callable[..., Result], unroll: Unroll, state: Any
    ) -> Result:
        """Return `solve(unroll, point)` of every particle: leaves [2n, ...]."""

        def one(point: Any, particle: Any) -> Result:
            return solve(self.particle_unroll(unroll, state, particle), point)

        return jax.vmap(one)(particles.points, particles.states)

    def pair_estimates(self, particles: Particles, losses: jax.Array) -> Any:
        """Return what each pair estimates, of losses [2n]: like eta, leaves [n, ...]."""
        plus, minus = losses[: self.pairs], losses[self.pairs :]
        slopes = (plus - minus) / (2 * self.sigma**2)

        def scaled(slope: jax.Array, direction: Any) -> Any:
            return jax.tree.map(lambda x: (slope * x).astype(x.dtype), direction)

        return jax.vmap(scaled)(slopes, particles.directions)

    def mean_aux(self, particles: Particles, aux: Aux) -> Aux:
        """Return one Aux for all particles, of leaves [2n, ...]."""
        inner = Inner(*(x.all(0) if x.dtype == bool else x.mean(0) for x in aux.inner))
        first = jax.tree.map(lambda x: x[0], aux.state)
        return Aux(mean(aux.metrics), first, inner, self.next_state(particles, aux.state))

    def perturbations(self, key: jax.Array, eta: Any) -> Any:
        """Draw eps_i ~ N(0, sigma^2 I): like eta, leaves [n, ...]."""
        flat, unravel = jax.flatten_util.ravel_pytree(eta)
        rows = self.sigma * jax.random.normal(key, (self.pairs, flat.size), flat.dtype)
        return jax.vmap(unravel)(rows)


def mirrored(eta: Any, perturbations: Any) -> Any:
    """Return eta + eps_i, and then eta - eps_i: like eta, leaves [2n, ...]."""

    def both(x: Any, eps: jax.Array) -> jax.Array:
        x = jnp.asarray(x)[None]
        return jnp.concatenate([x + eps, x - eps])

    return jax.tree.map(both, eta, perturbations)


def mean(tree: Any) -> Any:
    """Return the mean over the leading axis of every leaf."""
    return jax.tree.map(lambda x: x.mean(0), tree)
