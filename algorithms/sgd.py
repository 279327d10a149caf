"""SGD as training runs use it, its three hyperparameters as arguments."""

from __future__ import annotations

import optax


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Return v <- momentum v + g + weight_decay theta; theta <- theta - learning_rate v."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
