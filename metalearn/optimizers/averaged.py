"""The average of the iterates of an optimizer, to be judged by.

A constant learning rate leaves the iterates moving about an optimum: their average is nearer to it
than any of them (Polyak & Juditsky 1992), as if the rate had fallen to zero, and the training is
the same. With n iterates before x_n, the first of them x_0, the average is

    a_n = a_{n-1} + w_n (x_n - a_{n-1})        w_n = max(1 / (n + 1), 1 - decay)

the mean of all iterates for the first 1 / (1 - decay) steps, and from then on an exponential
moving average of the last ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from metalearn._utils.trees import is_differentiable, nodes, precise

JUDGED_APART = (contrib.ScheduleFreeState, contrib.SAMState)  # at other points than it trains at


class Averaged(NamedTuple):
    """The state of `averaged`.

    Args:
      average: of the iterates before the present one, like the parameters; float32 at least.
      steps: (), int32: how many they are.
      least: (), the weight of an iterate, at least: 1 - decay.
      inner: the state of the optimizer.
    """

    average: Any
    steps: jax.Array
    least: jax.Array
    inner: Any


def averaged(
    optimizer: optax.GradientTransformation, decay: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose result is the moving average of its iterates.

    Its updates are those of `optimizer`: gradients are taken where they are without it. What is
    evaluated, saved and exported (`Trainer.learned`), or of an inner optimizer what the outer loss
    is taken at, is the average. It takes the memory of one more copy of the parameters, in each
    inner state of an inner loop. It goes inside `optax.MultiSteps`, not around it.

    Args:
      optimizer: any of optax that has no average of its own.
      decay: of the average, over about 1 / (1 - decay) steps; from 0, the last iterate, to below 1.

    Raises:
      ValueError: for another decay; by `init`, for an optimizer that is judged at a point of its
        own already (`optax.contrib.schedule_free`, `optax.contrib.sam`).
    """
    if not 0 <= decay < 1:
        raise ValueError(
            f"`averaged(decay={decay})`: it is from 0, the last iterate alone, to below 1. 0.999 "
            "averages about 1,000 steps."
        )
    extended = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Averaged:
        inner = optimizer.init(params)
        if _is_judged_apart(inner):
            raise ValueError(
                "`averaged` got an optimizer that trains at one point and is judged at another "
                "(`optax.contrib.schedule_free`, `optax.contrib.sam`, or `averaged` itself), of "
                "which an average of the points that it trains at is neither. Leave `averaged` "
                "away."
            )
        start = jax.tree.map(lambda x: _precise(jnp.array(x, copy=True)), params)
        return Averaged(start, jnp.zeros((), jnp.int32), jnp.float32(1 - decay), inner)

    def update(
        grads: Any, state: Averaged, params: Any = None, **extra: Any
    ) -> tuple[Any, Averaged]:
        if params is None:
            raise ValueError("`averaged` needs the parameters: `update(grads, state, params)`.")
        state = state._replace(least=jnp.float32(1 - decay))  # a run may go on with another
        updates, inner = extended.update(grads, state.inner, params, **extra)
        after = jax.tree.map(including(state), state.average, params)
        return updates, Averaged(after, state.steps + 1, state.least, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def including(state: Averaged) -> Callable[[Any, Any], jax.Array]:
    """Return the function (average, iterate) -> the average with the iterate in it."""
    weight = jnp.maximum(1 / (state.steps + 1), state.least)

    def include(average: Any, iterate: Any) -> jax.Array:
        if not is_differentiable(iterate):
            return jnp.asarray(iterate)
        iterate = precise(jnp.asarray(iterate))
        move = iterate - average
        mean = average + weight.astype(move.real.dtype) * move
        return jnp.where(weight < 1, mean, iterate)  # the sum alone would be rounded

    return include


def _precise(x: jax.Array) -> jax.Array:
    return precise(x) if is_differentiable(x) else x


def _is_judged_apart(state: Any) -> bool:
    """Return whether an optimizer's result is another point than the one it trains at."""

    def is_apart(node: Any) -> bool:
        if isinstance(node, contrib.SAMState) and node.cache is None:  # it moves in one step
            return _is_judged_apart(node.opt_state)
        return True

    return any(map(is_apart, nodes(state, (Averaged, *JUDGED_APART))))
