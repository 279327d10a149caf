"""A network that is a pair of plain functions, as a `Model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from metalearn._utils.fields import check_fields
from metalearn.model import Model


@dataclasses.dataclass(frozen=True)
class Functions(Model):
    """Two functions and no state; a network with state subclasses `Model`."""

    init_fn: Callable[[jax.Array], Any]  # key -> params
    apply_fn: Callable[[Any, Any], Any]  # params, inputs -> outputs

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, ())."""
        return self.init_fn(key), ()

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, state); the state passes through."""
        del train, key
        return self.apply_fn(params, inputs), state
