"""What an outer training run is made of: all of it, and nothing else, is checkpointed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree. The data of step n is drawn from `fold_in(key, n)`, so it is in here too."""

    step: jax.Array  # (), int32: outer steps taken
    eta: Any  # the meta-parameters
    optimizer: Any  # the outer optimizer's state
    key: jax.Array  # (), PRNG key of the run; constant
    # The inner runs between two truncations, leaves [tasks, ...]; nothing in full unrolls.
    inner: Any = ()
    # (), float32: what outer updates are multiplied with; below 1 once a run has backed off.
    pace: Any = dataclasses.field(default_factory=lambda: jnp.ones((), jnp.float32))
