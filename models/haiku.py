"""The adapter of Haiku: a forward function as a `Model`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.engines.inner_loop import depends
from metalearn.model import Model, library_of
from metalearn.models.adapters import Mode, check_inputs, flag_name, flags, not_wrapped, shown
from metalearn.models.haiku_networks import Norm


@dataclasses.dataclass(frozen=True)
class Haiku(Model):
    """A Haiku forward function, as one would pass it to `hk.transform_with_state`.

    A function without a flag of training mode computes the same in training and evaluation.
    `apply(train=False)` refuses an `hk.BatchNorm` that is still in training mode; it cannot detect
    an `hk.dropout`. With a function as `mode` there is no such check.

    `hk.dropout` is a function, which cannot be switched off from outside. So `apply(train=True,
    dropout=False)` calls a function that draws random numbers in evaluation mode, and gives batch
    statistics to its `hk.BatchNorm` (and those of `haiku_networks`), not to other layers.

    Args:
      forward: the function, inputs -> outputs.
      inputs: one batch to initialise with: a `jax.ShapeDtypeStruct`, or a pytree of them.
      mode: the name of the argument of `forward` that sets the mode: "train", "training",
        "is_training", "deterministic", "use_running_average" or "inference"; None: the one that it
        has, which the repr shows. Or a function, train -> keyword arguments of `forward`.
    """

    forward: Callable[..., Any]
    inputs: Any
    mode: Mode | str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "forward")
        transformed = isinstance(self.forward, hk.Transformed | hk.TransformedWithState)
        if transformed or not callable(self.forward) or library_of(self.forward):
            raise TypeError(not_wrapped("Haiku(forward=)", self.forward, "haiku"))
        check_inputs("Haiku", self.inputs)
        _ = self._flag

    def __repr__(self) -> str:
        return shown(self, self._flag)

    @functools.cached_property
    def _transformed(self) -> hk.TransformedWithState:
        return hk.transform_with_state(self.forward)

    @functools.cached_property
    def _evaluating(self) -> hk.TransformedWithState:
        """The transformed function, which refuses a batch normalisation in training mode."""
        return self._intercepted(_refuse_training)

    @functools.cached_property
    def _normalising(self) -> hk.TransformedWithState:
        """The transformed function, its batch normalisation in training mode."""
        return self._intercepted(_in_training)

    def _intercepted(self, interceptor: Callable[..., Any]) -> hk.TransformedWithState:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with hk.intercept_methods(interceptor):
                return self.forward(*args, **kwargs)

        return hk.transform_with_state(forward)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
        return self._transformed.init(key, inputs, **self._flags(True))

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
        """Return (outputs, new state)."""
        flags = self._flags(train)
        if train and not dropout and self._draws(params, state, inputs):
            return self._undropped(params, state, inputs, key)
        if train or callable(self.mode):
            return self._transformed.apply(params, state, key, inputs, **flags)
        return self._evaluating.apply(params, state, key, inputs, **flags)

    def _draws(self, params: Any, state: Any, inputs: Any) -> bool:
        """Return whether the function draws random numbers in training mode, as a dropout does."""
        flags = self._flags(True)

        def outputs(key: jax.Array) -> Any:
            return self._transformed.apply(params, state, key, inputs, **flags)

        return depends(outputs, jax.random.key(0))

    def _undropped(
        self, params: Any, state: Any, inputs: Any, key: jax.Array | None
    ) -> tuple[Any, Any]:
        """Apply the function in evaluation mode, its batch normalisation in training mode."""
        flags = self._flags(False)
        if flags == self._flags(True):
            raise ValueError(
                "The model is applied in training mode without dropout, for batch statistics, but "
                "its forward function draws random numbers and has no argument that says whether "
                "it trains. Give it one, such as `is_training`, and call `hk.dropout` where it is "
                "true."
            )
        return self._normalising.apply(params, state, key, inputs, **flags)

    def _flags(self, train: bool) -> Mapping[str, Any]:
        return flags(self.mode, self._flag, train)

    @functools.cached_property
    def _flag(self) -> str | None:
        """The argument that sets the mode."""
        name = getattr(self.forward, "__name__", type(self.forward).__name__)
        return flag_name(f"Haiku(forward={name})", self.mode, self.forward)


def _in_training(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module, a batch normalisation with batch statistics."""
    if isinstance(context.module, hk.BatchNorm | Norm) and context.method_name == "__call__":
        if len(args) > 1:
            args = (args[0], True, *args[2:])
        else:
            kwargs = {**kwargs, "is_training": True}
    return next_fun(*args, **kwargs)


def _refuse_training(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module; ValueError for a batch normalisation in training mode."""
    if isinstance(context.module, hk.BatchNorm) and context.method_name == "__call__":
        training = args[1] if len(args) > 1 else kwargs.get("is_training")
        if training is True:
            raise ValueError(
                f"The model is applied with train=False, but its BatchNorm "
                f"{context.module.module_name} has is_training=True. Give the forward function an "
                "argument `is_training` and hand it on; or say that this is meant: "
                "`Haiku(..., mode=no_flag)`."
            )
    return next_fun(*args, **kwargs)
