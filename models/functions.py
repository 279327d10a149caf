"""The adapter of plain functions: an init and an apply function as a `Model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from metalearn._utils.fields import check_fields
from metalearn._utils.readable import readable
from metalearn.model import Model, library_of
from metalearn.models.adapters import not_wrapped


@readable
@dataclasses.dataclass(frozen=True)
class Functions(Model):
    """Two functions of a network without mutable state; one with state subclasses `Model`.

    Args:
      init_fn: key -> params.
      apply_fn: params, inputs -> outputs.
    """

    init_fn: Callable[[jax.Array], Any]
    apply_fn: Callable[[Any, Any], Any]

    def __post_init__(self) -> None:
        for name in ("init_fn", "apply_fn"):
            value = getattr(self, name)
            if library_of(value) not in (None, "equinox"):  # whose transformed functions are fine
                raise TypeError(not_wrapped(f"Functions({name}=)", value, "functions"))
        check_fields(self)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, ())."""
        return self.init_fn(key), ()

    def apply(
        self,
        params: Any,
        state: Any,
        inputs: Any,
        *,
        train: bool,
        dropout: bool = True,
        key: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return (outputs, state), the state unchanged."""
        del train, dropout, key
        return self.apply_fn(params, inputs), state
