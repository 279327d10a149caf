"""SGD as training runs use it: `optax.sgd`, optionally with weight decay and a falling rate."""

from __future__ import annotations

import optax

from metalearn._utils.checks import at_least


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float | None = None,
    decay_steps: int | None = None,
) -> optax.GradientTransformation:
    """Return v <- momentum v + g + weight_decay theta; theta <- theta - learning_rate v.

    Without `weight_decay` it is `optax.sgd`, and without `momentum` no v is kept.

    Args:
      learning_rate: a number, or a function of the step.
      momentum: the factor of v; None: no v.
      nesterov: whether the step looks ahead along v, as in Nesterov's momentum.
      weight_decay: the factor of theta in v; None: no decay.
      decay_steps: steps after which the learning rate, a number, has fallen linearly to zero;
        None: it stays as it is.

    Raises:
      ValueError: for `decay_steps` that are not a positive integer, or beside a learning rate that
        is a function of the step itself.
    """
    at_least("sgd", 1, decay_steps=decay_steps)
    if decay_steps is not None:
        if callable(learning_rate):
            raise ValueError(
                f"`sgd(decay_steps={decay_steps})` lets a learning rate fall from a number to "
                "zero, but `learning_rate` is a function of the step. Put the decay into that "
                "function, and leave `decay_steps`."
            )
        learning_rate = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    plain = optax.sgd(learning_rate, momentum, nesterov)
    if weight_decay is None:
        return plain
    return optax.chain(optax.add_decayed_weights(weight_decay), plain)
