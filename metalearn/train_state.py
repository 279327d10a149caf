"""The state of an outer training run, which is what a checkpoint saves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.unroll import Eta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two outer steps, a pytree.

    The tasks of step n are drawn from `fold_in(key, n)`, so the state determines them too.

    Args:
      step: (), int32: outer steps taken.
      eta: the meta-parameters.
      optimizer: the outer optimizer's state.
      key: (), PRNG key of the run; constant.
      inner: inner states carried across truncations or segments, leaves [tasks, ...]; `()` for
        full unrolls.
      pace: (), float32: outer updates are multiplied by it; below 1 once a run has backed off.
    """

    step: jax.Array
    eta: Eta
    optimizer: Any
    key: jax.Array
    inner: Any = ()
    pace: Any = dataclasses.field(default_factory=lambda: jnp.ones((), jnp.float32))
