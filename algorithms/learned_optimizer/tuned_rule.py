"""A hand-designed optimizer whose hyperparameters are learned.

The smallest of the update rules, and the baseline for larger ones, such as a network per parameter.
eta is one coordinate () per hyperparameter, in its space, so that a learning rate is searched over
orders of magnitude and a decay stays below one.

A hyperparameter has one value for all steps. Values that change during a run: the windows of
`metalearn.algorithms.FDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn._utils.trees import in_dtypes_of
from metalearn.algorithms.fds.hyperparameter import Hyperparameter, check_required, place
from metalearn.algorithms.learned_optimizer.update_rule import UpdateRule, check_params
from metalearn.optimizers.differentiable import differentiable_at_zero
from metalearn.unroll import Eta


@readable
@dataclasses.dataclass(frozen=True)
class TunedRule(UpdateRule):
    """Learn the hyperparameters of an optimizer, by name. eta: {name: coordinate ()}.

    Updates have the dtype of the gradients, not of eta.

    Args:
      make: **hyperparameters -> the optimizer, such as `optax.adamw`. Arguments with a fixed value:
        `functools.partial(optax.adamw, b1=0.95)`.
      hyperparameters: by name; a name is a numeric argument of `make`.
    """

    make: Callable[..., optax.GradientTransformation]
    hyperparameters: Mapping[str, Hyperparameter] = dataclasses.field(hash=False)

    def __post_init__(self) -> None:
        check_fields(self, "make")
        if not self.hyperparameters:
            raise ValueError("TunedRule learns hyperparameters, so it needs at least one of them.")
        if not callable(self.make):
            raise TypeError(
                "`TunedRule(make=)` takes what makes an optimizer from its hyperparameters, such "
                "as `optax.adamw`, not an optimizer. What stays fixed: "
                "`functools.partial(optax.adamw, b1=0.95)`."
            )
        place(self.hyperparameters, {"optimizer": self.make})
        check_required(self.make, self.hyperparameters)
        for name, chosen in self.hyperparameters.items():
            _check_single(name, chosen)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return the initial coordinates of the hyperparameters: {name: ()}."""
        del key
        return {name: _start(chosen) for name, chosen in self.hyperparameters.items()}

    def values(self, eta: Eta) -> dict[str, jax.Array]:
        """Return the values of the coordinates: {name: value ()}."""
        return {name: chosen.value(eta[name]) for name, chosen in self.hyperparameters.items()}

    def optimizer(self, eta: Eta) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer, with a finite derivative at every gradient."""
        inner = differentiable_at_zero(self.make(**self.values(eta)))

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            updates, slots = inner.update(grads, state, params, **extra)
            # A learned hyperparameter may have another dtype than the gradients and the state.
            return in_dtypes_of(grads, updates), in_dtypes_of(state, slots)

        def init(params: Any) -> Any:
            check_params(params, "TunedRule")
            return inner.init(params)

        return optax.GradientTransformationExtraArgs(init, update)


def _check_single(name: str, chosen: Hyperparameter) -> None:
    if chosen.windows != 1 or chosen.shape or np.size(chosen.start) != 1:
        raise ValueError(
            f"`TunedRule` learns one number for {name!r}, not windows={chosen.windows} of "
            f"shape={chosen.shape}. Values that change over a run: `FDS`."
        )


def _start(chosen: Hyperparameter) -> jax.Array:
    start = jnp.asarray(np.reshape(np.asarray(chosen.start, float), ()))
    return chosen.coordinate(start).astype(jnp.result_type(float))
