"""Outer updates for a handful of hyperparameters, as optax transformations.

A hypergradient through thousands of steps has a sign that can be trusted and a size that
cannot: it varies over orders of magnitude from one window to the next, and with theta_0.
`sign_steps` uses the sign alone, as FDS does (arXiv:2007.07869): each hyperparameter moves by
a step of its own, which is halved when its sign flips (Rprop, Riedmiller & Braun 1993, without
growth unless asked for). A hypergradient that is not finite moves nothing.

Bare signs walk off a cliff: a learning rate a little too large gives a run that explodes, and
a hypergradient without a meaning or without a number. With a `tolerance`, a move after which
the outer loss is that much worse than the best so far, or not finite, is taken back: eta goes
back to where it came from and leaves again in the same direction, by half the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalearn._utils.checks import above
from metalearn.algorithms.fds.hyperparameter import Hyperparameter


class SignSteps(NamedTuple):
    """The state of `sign_steps`; pytrees like eta, but for `best`."""

    size: Any  # of the next move
    sign: Any  # of the last finite hypergradient; 0: none yet
    done: Any  # bool: its step has become too small to matter
    base: Any  # the eta to go back to
    best: jax.Array  # (), the lowest outer loss so far
    taken: jax.Array  # (), int32: updates so far


def sign_steps(
    initial: Any,
    shrink: float = 0.5,
    grow: float = 1.0,
    largest: Any = jnp.inf,
    least: Callable[[Any], Any] | None = None,
    tolerance: float | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the sign rule.

    Args:
      initial: the first steps, a scalar or a tree prefix of eta.
      shrink: what a step is multiplied with when its sign flips, or a move is taken back.
      grow: and when it does not; 1 is FDS's rule.
      largest: steps do not grow beyond this; a scalar or a tree prefix of eta.
      least: eta -> the steps below which a hyperparameter no longer moves (a scalar or a tree
        prefix); None: the stop rule of FDS, 5% of the coordinate.
      tolerance: how much worse than the best an outer loss may be before its move is taken
        back; more than it varies from one draw of a task to the next. None: never. The loss
        is the extra argument `value` of `update`, which the Trainer passes.
      schedule: number of the update -> what its move is multiplied with; None: 1.
    """
    least = least or (lambda eta: jax.tree.map(lambda x: 0.05 * abs(x), eta))

    def init(eta: Any) -> SignSteps:
        size = jax.tree.map(lambda s, x: jnp.full_like(x, s), _full(initial, eta), eta)
        zero = jax.tree.map(jnp.zeros_like, eta)
        done = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), eta)
        return SignSteps(
            size,
            zero,
            done,
            eta,
            jnp.full((), jnp.inf, jnp.result_type(float)),
            jnp.zeros((), jnp.int32),
        )

    def update(
        grads: Any, state: SignSteps, eta: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, SignSteps]:
        del extra
        accepted = _accepted(value, state.best, tolerance)
        signs = jax.tree.map(lambda g: jnp.sign(jnp.where(jnp.isfinite(g), g, 0)), grads)
        factor = jax.tree.map(lambda a, b: _factor(a * b, shrink, grow), signs, state.sign)
        factor = jax.tree.map(lambda f: jnp.where(accepted, f, shrink), factor)
        size = jax.tree.map(
            lambda s, f, most: jnp.minimum(s * f, most).astype(s.dtype),
            *(state.size, factor, _full(largest, eta)),
        )
        sign = jax.tree.map(
            lambda now, last: jnp.where(accepted & (now != 0), now, last), signs, state.sign
        )
        base = jax.tree.map(lambda x, b: jnp.where(accepted, x, b), eta, state.base)
        limits = _full(least(base), eta)
        done = jax.tree.map(lambda d, s, limit: d | (s < limit), state.done, size, limits)
        # Where no sign is known now, an accepted point moves nothing; a refused one repeats.
        way = jax.tree.map(lambda now, kept: jnp.where(accepted, now, kept), signs, sign)
        scale = 1.0 if schedule is None else schedule(state.taken)
        there = jax.tree.map(
            lambda b, d, s, w: jnp.where(d, b, b - scale * s * w), *(base, done, size, way)
        )
        best = state.best if value is None else jnp.fmin(state.best, value)
        updates = jax.tree.map(jnp.subtract, there, eta)
        return updates, SignSteps(
            *(size, sign, done, base, best.astype(state.best.dtype), state.taken + 1)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _factor(agreement: jax.Array, shrink: float, grow: float) -> jax.Array:
    return jnp.where(agreement < 0, shrink, jnp.where(agreement > 0, grow, 1.0))


def _accepted(value: Any, best: jax.Array, tolerance: float | None) -> jax.Array:
    """Return whether eta may stay where it is: (), bool."""
    if tolerance is None:
        return jnp.asarray(True)
    if value is None:
        raise ValueError(
            "`sign_steps(tolerance=...)` compares outer losses, so its `update` takes the loss as "
            "`value=`. Pass it (the Trainer does), or take tolerance=None."
        )
    return jnp.isfinite(value) & (value <= best + tolerance)


def within(
    optimizer: optax.GradientTransformation, low: Any, high: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer, its updates cut so that eta stays between two bounds.

    Args:
      optimizer: any.
      low: the least eta, a scalar or a tree prefix of it.
      high: the largest.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, eta: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, eta, **extra)

        def cut(x: Any, u: Any, least: Any, most: Any) -> Any:
            return jnp.clip(x + u, least, most) - x

        return jax.tree.map(cut, eta, updates, _full(low, eta), _full(high, eta)), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def in_ranges(
    optimizer: optax.GradientTransformation, hyperparameters: Mapping[str, Hyperparameter]
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer, kept within the ranges of FDS's hyperparameters."""
    bounds = {name: chosen.bounds() for name, chosen in hyperparameters.items()}
    low, high = ({name: pair[i] for name, pair in bounds.items()} for i in (0, 1))
    return within(optimizer, low, high)


def fds_rule(
    hyperparameters: Mapping[str, Hyperparameter],
    share: float = 0.1,
    grow: float = 1.0,
    tolerance: float | None = 0.1,
    schedule: optax.Schedule | None = None,
    steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return signed steps that begin at a share of each range, and stay in it.

    A hyperparameter stops where its step has been halved and would change it by less than about
    5%. With `tolerance=None` the rule is that of arXiv:2007.07869; see `sign_steps`. The tolerance
    is in units of the outer loss. With one, run `Trainer.fit(faults=Faults(nonfinite="pass"))`:
    a run that explodes is then taken back instead of ending the training. What an update moves
    to has not been judged yet: give the number of outer steps as `steps`, and the last update goes
    back to where the outer loss was last accepted, which is then what was learned.

    Raises:
      ValueError: for a range without an end, of which there is no share.
    """
    above("fds_rule", 0, share=share, grow=grow)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"`fds_rule(tolerance={tolerance})`: it is 0 or more.")
    if steps is not None and tolerance is None:
        raise ValueError(
            f"`fds_rule(steps={steps}, tolerance=None)`: the last of these steps goes back to what "
            "was last accepted, and without a tolerance nothing is refused. Leave one of them out."
        )
    for name, chosen in hyperparameters.items():
        if not all(map(math.isfinite, chosen.bounds())):
            raise ValueError(
                f"`fds_rule` begins with a share of each range, and that of {name!r} goes from "
                f"{chosen.low} to {chosen.high}. Give it two ends."
            )
    ends = {name: chosen.bounds() for name, chosen in hyperparameters.items()}
    first = {name: share * (high - low) for name, (low, high) in ends.items()}
    raw = {name: chosen.space == "raw" for name, chosen in hyperparameters.items()}

    def least(eta: Any) -> Any:
        change = {n: 0.05 * (abs(x) if raw[n] else jnp.ones_like(x)) for n, x in eta.items()}
        return {n: jnp.minimum(x, 0.5 * first[n]) for n, x in change.items()}  # not at once

    def pace(update: Any) -> Any:
        now = 1.0 if schedule is None else schedule(update)
        if steps is None or steps == 1:  # a single one would learn nothing
            return now
        return jnp.where(update < steps - 1, now, 0.0)

    most = {name: 2 * step for name, step in first.items()}
    rule = sign_steps(
        first, grow=grow, largest=most, least=least, tolerance=tolerance, schedule=pace
    )
    return in_ranges(rule, hyperparameters)


def _full(prefix: Any, tree: Any) -> Any:
    """Return a tree whose leaves repeat those of a prefix of it."""
    return jax.tree.map(lambda p, part: jax.tree.map(lambda _: p, part), prefix, tree)
