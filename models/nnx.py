"""A Flax NNX module as a `Model`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from metalearn.fields import check_fields
from metalearn.model import Model, library_of
from metalearn.models.given import not_wrapped
from metalearn.models.mode import Mode, no_flag


@dataclasses.dataclass(frozen=True)
class NNX(Model):
    """An NNX module, by the function that builds it.

    Params are the `nnx.Param` variables; state is every other variable (running
    statistics, random streams). Both are plain nested dicts.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    mode: Mode = no_flag  # how the module is told that it is training

    def __post_init__(self) -> None:
        check_fields(self, "build")
        is_module = isinstance(self.build, type) and issubclass(self.build, nnx.Module)
        if not callable(self.build) or (library_of(self.build) and not is_module):
            raise TypeError(not_wrapped("NNX(build=)", self.build, "nnx"))
        try:
            if is_module:  # whose own signature is that of any class of the library
                inspect.signature(self.build.__init__).bind(None, None)  # type: ignore[misc]
            else:
                inspect.signature(self.build).bind(None)
        except TypeError as error:
            name = getattr(self.build, "__name__", type(self.build).__name__)
            raise TypeError(
                f"`NNX(build=)` is called with one argument, the random streams, which `{name}` "
                f"does not take ({error}). Write `NNX(lambda rngs: {name}(..., rngs=rngs))`."
            ) from error
        except ValueError:
            pass  # of a function without a signature

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        _, params, state = _split(self.build(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        module = self._merge(params, state)
        if key is not None:
            nnx.reseed(module, default=key)
        outputs = module(inputs, **self.mode(train))
        _, _, new = _split(module)
        return outputs, nnx.to_pure_dict(new)

    def _merge(self, params: Any, state: Any) -> Any:
        """Put arrays back into the module, whose structure is built without any."""
        abstract = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        graph, param_slots, state_slots = _split(abstract)
        nnx.replace_by_pure_dict(param_slots, params)
        nnx.replace_by_pure_dict(state_slots, state)
        return nnx.merge(graph, param_slots, state_slots)


def _split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """Return (structure, the `nnx.Param` variables, all others)."""
    graph, params, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graph, params, others
