"""The adapter of Flax linen: a module as a `Model`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from metalearn._utils.checks import first_line
from metalearn._utils.fields import check_fields
from metalearn.engines.inner_loop import depends
from metalearn.model import Model
from metalearn.models.adapters import (
    WORDS,
    Mode,
    check_inputs,
    flag_name,
    flags,
    not_wrapped,
    shown,
)

RATES: dict[Any, str] = {nn.Dropout: "rate", nn.MultiHeadDotProductAttention: "dropout_rate"}
PER_CALL = ("intermediates", "perturbations")  # collections that `sow` and `perturb` write


@dataclasses.dataclass(frozen=True)
class Linen(Model):
    """A linen module. State is every variable collection but "params" and those that are sown.

    A collection that only `sow` or `perturb` write is not part of the state: such values last for
    one call, and are not computed here.

    `apply(train=False)` refuses an `nn.Dropout` or `nn.BatchNorm` that is still in training mode,
    as the module may not pass its flag to them; it does not check other layers. With a function as
    `mode` there is no such check.

    `apply(train=True, dropout=False)` sets the rates of `nn.Dropout` and of flax's attention to 0,
    however the module passes its flags on, and leaves the stream "dropout" out, so that a dropout
    written by hand is refused.

    Args:
      module: an instance, with its sizes.
      inputs: one batch to initialise with: a `jax.ShapeDtypeStruct`, or a pytree of them.
      mode: the name of the argument of the module's call, or of its field, that sets the mode:
        "train", "training", "is_training", "deterministic", "use_running_average" or "inference";
        None: the one that it has, which the repr shows. Or a function, train -> keyword arguments
        of the call, such as `no_flag`.
      rngs: the random streams for which `apply` uses its key.
    """

    module: nn.Module
    inputs: Any
    mode: Mode | str | None = None
    rngs: tuple[str, ...] = ("dropout",)

    def __post_init__(self) -> None:
        check_fields(self, "module")
        if not isinstance(self.module, nn.Module):
            raise TypeError(not_wrapped("Linen(module=)", self.module, "linen"))
        check_inputs("Linen", self.inputs)
        _ = self._flag

    def __repr__(self) -> str:
        return shown(self, self._flag)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        state = self._init(key)
        params = state.pop("params", {})
        sown = self._sown(params, state)
        return params, {name: state[name] for name in state if name not in sown}

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
        streams = {} if key is None else self._streams(key)
        module, flags = self._in_mode(train)
        with contextlib.ExitStack() as within:
            if train and not dropout:
                streams.pop("dropout", None)
                within.enter_context(_dropout_off())
            elif not train and not callable(self.mode):
                within.enter_context(nn.intercept_methods(_refuse_training))
            outputs, new = module.apply(
                {"params": params, **state},
                inputs,
                rngs=streams,
                mutable=list(state),
                **flags,
            )
        for name in state:
            _check_same(name, state[name], new[name])
        return outputs, new

    def _init(self, key: jax.Array) -> dict[str, Any]:
        module, flags = self._in_mode(True)
        streams = {**self._streams(key), "params": key}
        return dict(module.init(streams, self._zeros(), **flags))

    def _streams(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return a key for each random stream: Flax does not fold its name into a key."""
        return {n: jax.random.fold_in(key, i) if i else key for i, n in enumerate(self.rngs)}

    def _zeros(self) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)

    def _in_mode(self, train: bool) -> tuple[nn.Module, Mapping[str, Any]]:
        """Return the module in the mode of `train`, and the keyword arguments of its call."""
        name = self._flag
        is_argument = name in inspect.signature(type(self.module).__call__).parameters
        if name in self._fields and not is_argument:
            flag: dict[str, Any] = {str(name): WORDS[str(name)] == train}
            return self.module.clone(**flag), {}
        return self.module, flags(self.mode, name, train)

    @functools.cached_property
    def _fields(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.module) if field.init]

    @functools.cached_property
    def _flag(self) -> str | None:
        """The argument of the call, or else the field, that sets the mode."""
        what = f"Linen(module={type(self.module).__name__})"
        return flag_name(what, self.mode, type(self.module).__call__, self._fields)

    def _sown(self, params: Any, state: dict[str, Any]) -> frozenset[str]:
        """Return the collections that are not state: a call needs none of them to run."""
        candidates = [name for name in state if name not in PER_CALL]
        shapes = jax.eval_shape(lambda tree: tree, (params, state))
        return frozenset(PER_CALL) | {name for name in candidates if self._is_sown(name, *shapes)}

    def _is_sown(self, name: str, params: Any, state: dict[str, Any]) -> bool:
        """Say whether a call runs without a collection, and its outputs do not depend on it."""
        others = {key: state[key] for key in state if key != name and key not in PER_CALL}
        module, flags = self._in_mode(True)
        streams = dict.fromkeys(("params", *self.rngs), jax.random.key(0))

        def call(own: dict[str, Any]) -> Any:
            variables = _zeros_like({"params": params, **others})
            return module.apply(
                {**variables, **own}, self._zeros(), rngs=streams, mutable=list(others), **flags
            )

        try:
            jax.eval_shape(call, {})
            return not depends(call, _zeros_like({name: state[name]}))
        except Exception:  # the call fails without the collection, in any way
            return False


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _check_same(name: str, before: Any, after: Any) -> None:
    """Raise ValueError if a call has changed the structure of a collection."""
    structures = [jax.tree.structure(tree) for tree in (before, after)]
    if structures[0] == structures[1]:  # type: ignore[operator]
        return
    raise ValueError(
        f"A call of the module changes the structure of its collection {name!r}, which holds "
        "variables of its own too: `sow` adds to it at every call, say. Sow into a collection of "
        "another name, which is then no part of the model's state."
    )


@contextlib.contextmanager
def _dropout_off() -> Iterator[None]:
    """Switch off the dropout of all layers; ValueError for a layer that has one of its own."""
    try:
        with nn.intercept_methods(_without_dropout):
            yield
    except flax.errors.InvalidRngError as error:
        if '"dropout"' not in str(error):
            raise
        raise ValueError(
            "The model is applied in training mode without dropout, for batch statistics, and a "
            'layer other than `nn.Dropout` draws from the stream "dropout" '
            f"({first_line(error)}). Let it draw from a stream of another name, which stays on: "
            '`Linen(..., rngs=("dropout", "noise"))`; or multiply by the mask of an `nn.Dropout`.'
        ) from error


def _without_dropout(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module, with a dropout rate of 0."""
    for kind, rate in RATES.items():
        if isinstance(context.module, kind):
            # Flax makes a copy of the module for each call, and forbids to change it.
            object.__setattr__(context.module, rate, 0.0)
    return next_fun(*args, **kwargs)


def _refuse_training(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module; ValueError for a layer that is in training mode."""
    layer = context.module
    word = {nn.Dropout: "deterministic", nn.BatchNorm: "use_running_average"}.get(type(layer))
    if word is not None and context.method_name == "__call__":
        flag = args[1] if len(args) > 1 else kwargs.get(word)
        flag = getattr(layer, word) if flag is None else flag
        if flag is False and getattr(layer, "rate", 1.0) > 0:
            raise ValueError(
                f"The model is applied with train=False, but its {type(layer).__name__} at "
                f"{'/'.join(layer.path) or 'the top'} has {word}=False, its training mode. Give "
                "the module's call an argument, such as `train`, and the layer "
                f"`{word}=not train`; or say that this is meant: `Linen(..., mode=no_flag)`."
            )
    return next_fun(*args, **kwargs)
