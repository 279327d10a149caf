"""A Haiku network as a `Model`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn.fields import check_fields
from metalearn.model import Model, library_of
from metalearn.models.given import check_inputs, not_wrapped
from metalearn.models.mode import Mode, no_flag


@dataclasses.dataclass(frozen=True)
class Haiku(Model):
    """A Haiku forward function, as one would pass it to `hk.transform_with_state`."""

    forward: Callable[..., Any]
    inputs: Any  # jax.ShapeDtypeStruct, or a pytree of them: one batch, to initialise with
    mode: Mode = no_flag  # how the function is told that it is training

    def __post_init__(self) -> None:
        check_fields(self, "forward")
        transformed = isinstance(self.forward, hk.Transformed | hk.TransformedWithState)
        if transformed or not callable(self.forward) or library_of(self.forward):
            raise TypeError(not_wrapped("Haiku(forward=)", self.forward, "haiku"))
        check_inputs("Haiku", self.inputs)

    @functools.cached_property
    def _transformed(self) -> hk.TransformedWithState:
        return hk.transform_with_state(self.forward)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
        return self._transformed.init(key, inputs, **self.mode(True))

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        return self._transformed.apply(params, state, key, inputs, **self.mode(train))
