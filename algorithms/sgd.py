"""SGD as training runs use it: `optax.sgd` with an optional weight decay."""

from __future__ import annotations

import optax


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float | None = None,
) -> optax.GradientTransformation:
    """Return v <- momentum v + g + weight_decay theta; theta <- theta - learning_rate v.

    Without `weight_decay` it is `optax.sgd`, and without `momentum` no v is kept.

    Args:
      learning_rate: a number, or a function of the step.
      momentum: the factor of v; None: no v.
      nesterov: whether the step looks ahead along v, as in Nesterov's momentum.
      weight_decay: the factor of theta in v; None: no decay.
    """
    plain = optax.sgd(learning_rate, momentum, nesterov)
    if weight_decay is None:
        return plain
    return optax.chain(optax.add_decayed_weights(weight_decay), plain)
