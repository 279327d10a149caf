"""What a learned loss weight must not be, found out before anything is trained.

Inside a compiled step nothing can be raised, and there it would be too late: a negative
weight raises its token's loss without bound, and weights that are all zero have no
derivative to come back by. So the function from scores to weights has to be positive
throughout, which can be seen beforehand, whatever the scores become in training.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metalearn.algorithms.loss_weights.loss_features import Seen
from metalearn.algorithms.loss_weights.weighting import Weighting

Function = Callable[[jax.Array], jax.Array]
LARGEST = 20.0  # 2 sigmoid(-20) is 4e-9: no float is zero up to here, and no weight counts


def check_squash(squash: Function) -> None:
    """Raise ValueError where a function from scores to weights is not positive throughout."""
    with jax.ensure_compile_time_eval():
        scores = jnp.linspace(-LARGEST, LARGEST, 401)
        weights = squash(scores)
        worst = int(jnp.nan_to_num(weights, nan=-jnp.inf).argmin())
        score, weight = float(scores[worst]), float(weights[worst])
    if not weight > 0:
        raise ValueError(
            f"`squash` turns the score {score:g} into the weight {weight:g}, but weights are "
            "positive: a negative one raises the loss of its tokens without bound, and where all "
            "are zero nothing is learned any more. Use `bounded`, `unbounded`, or another positive "
            "function, such as an exponential."
        )


def check_weighting(weighting: Weighting) -> None:
    """Raise ValueError where scores have the wrong shape, or vanish as weights, at the start."""
    with jax.ensure_compile_time_eval():
        seen = Seen(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
        scores = weighting(weighting.init(jax.random.key(0)), seen)
        shape, largest = jnp.shape(scores), float(jnp.max(scores))
    if shape not in ((2, 1), (2, 3)):
        raise ValueError(
            f"{type(weighting).__name__} returned scores of shape {list(shape)} for losses "
            "[2, 3], but scores are [batch, 1], one per example, or [batch, S], one per token."
        )
    if not -LARGEST < largest < float("inf"):
        raise ValueError(
            f"{type(weighting).__name__} begins with a largest score of {largest:g}, where all "
            "weights are zero (or nothing is a number) and no derivative leads away. Begin with "
            "scores around zero: a score of zero is a weight of one."
        )


def check_normalize(normalize: Function) -> None:
    """Raise ValueError where a normalisation makes positive weights negative or all zero."""
    with jax.ensure_compile_time_eval():
        weights = normalize(jnp.array([[0.5, 1.0], [1.5, 3.0]]))
        smallest, largest = float(weights.min()), float(weights.max())
    if not (smallest >= 0 and 0 < largest < float("inf")):
        raise ValueError(
            f"`normalize` turns the weights 0.5, 1, 1.5 and 3 into ones from {smallest:g} to "
            f"{largest:g}, but weights are not negative, and not all zero. Divide by something, "
            "as `mean_one` does, rather than subtract."
        )
