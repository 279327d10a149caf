"""Outer optimizers for a few hyperparameters, as optax transformations.

The sign of a hypergradient through thousands of steps is reliable, its size is not: it varies over
orders of magnitude from one window to the next, and with theta_0. `sign_steps` uses the sign only,
as FDS does (arXiv:2007.07869): each hyperparameter has a step size of its own, which is halved when
the sign flips (Rprop, Riedmiller & Braun 1993, without growth by default). A non-finite
hypergradient leaves its hyperparameter unchanged.

Plain sign steps can leave the stable region: with a learning rate slightly too large the inner loop
diverges, and its hypergradient is meaningless or NaN. With a `tolerance`, an update after which the
outer loss is worse than the best so far by more than the tolerance, or not finite, is reverted: eta
returns to the last accepted value, and the next update has the same direction and half the step.
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
    """The state of `sign_steps`; all fields are pytrees like eta, except `best` and `count`.

    size: the size of the next step.
    sign: of the last finite hypergradient; 0: none yet.
    done: bool: whether the step size has fallen below `least`, which ends its updates.
    base: the last accepted eta, to which a rejected update is reverted.
    best: (), the lowest outer loss so far.
    steps: (), int32: updates so far.
    """

    size: Any
    sign: Any
    done: Any
    base: Any
    best: jax.Array
    steps: jax.Array


def sign_steps(
    initial: Any,
    shrink: float = 0.5,
    grow: float = 1.0,
    largest: Any = jnp.inf,
    least: Callable[[Any], Any] | None = None,
    tolerance: float | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that moves each hyperparameter by the sign of its hypergradient.

    Args:
      initial: the initial step sizes, a scalar or a tree prefix of eta.
      shrink: the factor of a step size when the sign flips, or an update is reverted.
      grow: the factor of a step size when the sign stays the same; 1 is FDS's rule.
      largest: the upper bound of step sizes; a scalar or a tree prefix of eta.
      least: eta -> the step sizes below which a hyperparameter is no longer updated (a scalar or a
        tree prefix); None: the stop rule of FDS, 5% of the coordinate.
      tolerance: how much worse than the best the outer loss may be before an update is reverted;
        more than it varies from one drawn task to the next. None: never revert. The outer loss is
        the extra argument `value` of `update`, which the Trainer passes.
      schedule: number of the update -> factor of its steps; None: 1.
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
        # A non-finite hypergradient: no step from an accepted eta, the last direction otherwise.
        direction = jax.tree.map(lambda now, last: jnp.where(accepted, now, last), signs, sign)
        scale = 1.0 if schedule is None else schedule(state.steps)
        following = jax.tree.map(
            lambda b, d, s, w: jnp.where(d, b, b - scale * s * w), *(base, done, size, direction)
        )
        best = state.best if value is None else jnp.fmin(state.best, value)
        updates = jax.tree.map(jnp.subtract, following, eta)
        return updates, SignSteps(
            *(size, sign, done, base, best.astype(state.best.dtype), state.steps + 1)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _factor(agreement: jax.Array, shrink: float, grow: float) -> jax.Array:
    return jnp.where(agreement < 0, shrink, jnp.where(agreement > 0, grow, 1.0))


def _accepted(value: Any, best: jax.Array, tolerance: float | None) -> jax.Array:
    """Return whether the last update is accepted, by the outer loss after it: (), bool."""
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
    """Return the optimizer with its updates clipped so that eta stays between two bounds.

    Args:
      optimizer: any optax optimizer.
      low: the lower bound of eta, a scalar or a tree prefix of eta.
      high: the upper bound of eta, likewise.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, eta: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, eta, **extra)

        def clip(x: Any, u: Any, least: Any, most: Any) -> Any:
            return jnp.clip(x + u, least, most) - x

        return jax.tree.map(clip, eta, updates, _full(low, eta), _full(high, eta)), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def in_ranges(
    optimizer: optax.GradientTransformation, hyperparameters: Mapping[str, Hyperparameter]
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer with its updates clipped to the ranges of FDS's hyperparameters."""
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
    """Return sign steps that start at a share of each range, clipped to the range.

    A hyperparameter is no longer updated once its step has been halved and would change it by less
    than about 5%. With `tolerance=None` the rule is that of arXiv:2007.07869; see `sign_steps`.

    Args:
      hyperparameters: those of the FDS, by name.
      share: the initial step size, as a share of the range of the coordinate.
      grow: the factor of a step size when the sign stays the same.
      tolerance: in units of the outer loss, see `sign_steps`. With a tolerance, pass
        `Trainer.fit(faults=Faults(nonfinite="pass"))`, so that an update to where the inner loop
        diverges is reverted instead of ending the training.
      schedule: number of the update -> factor of its steps; None: 1.
      steps: the number of outer steps. The outer loss after the last update is never computed, so
        the last update then returns to the last accepted eta. None: it does not.

    Raises:
      ValueError: for a range that is not finite, which has no share.
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
        # Half the initial step at most, so that no hyperparameter stops before its first update.
        change = {n: 0.05 * (abs(x) if raw[n] else jnp.ones_like(x)) for n, x in eta.items()}
        return {n: jnp.minimum(x, 0.5 * first[n]) for n, x in change.items()}

    def scale(count: Any) -> Any:
        factor = 1.0 if schedule is None else schedule(count)
        if steps is None or steps == 1:  # a single update of size zero would learn nothing
            return factor
        return jnp.where(count < steps - 1, factor, 0.0)

    most = {name: 2 * step for name, step in first.items()}
    rule = sign_steps(
        first, grow=grow, largest=most, least=least, tolerance=tolerance, schedule=scale
    )
    return in_ranges(rule, hyperparameters)


def _full(prefix: Any, tree: Any) -> Any:
    """Return a tree whose leaves repeat those of a prefix of it."""
    return jax.tree.map(lambda p, part: jax.tree.map(lambda _: p, part), prefix, tree)
