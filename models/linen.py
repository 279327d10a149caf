"""A Flax linen module as a `Model`."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalearn.fields import check_fields
from metalearn.model import Model
from metalearn.models.given import check_inputs, not_wrapped
from metalearn.models.mode import Mode, no_flag


@dataclasses.dataclass(frozen=True)
class Linen(Model):
    """A linen module. State is every variable collection but "params"."""

    module: nn.Module
    inputs: Any  # jax.ShapeDtypeStruct, or a pytree of them: one batch, to initialise with
    mode: Mode = no_flag  # how the module is told that it is training
    rngs: tuple[str, ...] = ("dropout",)  # the random streams that `apply` feeds from its key

    def __post_init__(self) -> None:
        check_fields(self, "module")
        if not isinstance(self.module, nn.Module):
            raise TypeError(not_wrapped("Linen(module=)", self.module, "linen"))
        check_inputs("Linen", self.inputs)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
        streams = {name: key for name in ("params", *self.rngs)}
        state = dict(self.module.init(streams, inputs, **self.mode(True)))
        return state.pop("params"), state

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        streams = {} if key is None else dict.fromkeys(self.rngs, key)
        return self.module.apply(
            {"params": params, **state},
            inputs,
            rngs=streams,
            mutable=list(state),
            **self.mode(train),
        )
