"""A Flax linen module as a `Model`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metalearn._utils.fields import check_fields
from metalearn.engines.inner_loop import depends
from metalearn.model import Model
from metalearn.models.checks import check_inputs, not_wrapped
from metalearn.models.mode import WORDS, Mode, usual_flags

PASSING = ("intermediates", "perturbations")  # flax's own names for what a call adds


@dataclasses.dataclass(frozen=True)
class Linen(Model):
    """A linen module. State is every variable collection but "params" and those that are sown.

    A collection that `sow` or `perturb` alone write is no state: it would begin empty at each call
    and be dropped after it, so nothing is computed for it.

    The module is told that it is training by arguments of its call, those of `mode`. None passes
    those with the usual names (`metalearn.models.mode.WORDS`), or sets the fields of that name
    where the call takes none. What the module then tells its own layers is up to it: `apply`
    refuses an `nn.Dropout` or `nn.BatchNorm` that goes on training with train=False, and sees no
    others. With a `mode` it looks for neither; `no_flag` passes nothing.
    """

    module: nn.Module
    inputs: Any  # jax.ShapeDtypeStruct, or a pytree of them: one batch, to initialise with
    mode: Mode | None = None  # what the call takes when training; None: by the usual names
    rngs: tuple[str, ...] = ("dropout",)  # the random streams that `apply` feeds from its key

    def __post_init__(self) -> None:
        check_fields(self, "module")
        if not isinstance(self.module, nn.Module):
            raise TypeError(not_wrapped("Linen(module=)", self.module, "linen"))
        check_inputs("Linen", self.inputs)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state)."""
        state = self._init(key)
        params = state.pop("params", {})
        sown = self._sown(params, state)
        return params, {name: state[name] for name in state if name not in sown}

    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state)."""
        streams = {} if key is None else dict.fromkeys(self.rngs, key)
        module, flags = self._told(train)
        looks = self.mode is None and not train
        with nn.intercept_methods(_refuse_training) if looks else contextlib.nullcontext():
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
        module, flags = self._told(True)
        streams = {name: key for name in ("params", *self.rngs)}
        return dict(module.init(streams, self._zeros(), **flags))

    def _zeros(self) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)

    def _told(self, train: bool) -> tuple[nn.Module, Mapping[str, Any]]:
        """Return the module, and the arguments of its call."""
        if self.mode is not None:
            return self.module, self.mode(train)
        flags = usual_flags(type(self.module).__call__, train)
        fields = {field.name for field in dataclasses.fields(self.module) if field.init}
        if flags or not fields & WORDS.keys():
            return self.module, flags
        words: dict[str, Any] = {word: WORDS[word] == train for word in fields & WORDS.keys()}
        return self.module.clone(**words), {}

    def _sown(self, params: Any, state: dict[str, Any]) -> frozenset[str]:
        """Return the collections that a call can do without, and that make no difference."""
        candidates = [name for name in state if name not in PASSING]
        shapes = jax.eval_shape(lambda tree: tree, (params, state))
        return frozenset(PASSING) | {name for name in candidates if self._is_sown(name, *shapes)}

    def _is_sown(self, name: str, params: Any, state: dict[str, Any]) -> bool:
        others = {key: state[key] for key in state if key != name and key not in PASSING}
        module, flags = self._told(True)
        streams = dict.fromkeys(("params", *self.rngs), jax.random.key(0))

        def call(own: dict[str, Any]) -> Any:
            variables = _zeros_like({"params": params, **others})
            return module.apply(
                {**variables, **own}, self._zeros(), rngs=streams, mutable=list(others), **flags
            )

        try:
            jax.eval_shape(call, {})
            return not depends(call, _zeros_like({name: state[name]}))
        except Exception:  # whatever it misses: it is no bystander
            return False


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _check_same(name: str, before: Any, after: Any) -> None:
    structures = [jax.tree.structure(tree) for tree in (before, after)]
    if structures[0] == structures[1]:  # type: ignore[operator]
        return
    raise ValueError(
        f"A call of the module changes the structure of its collection {name!r}, which holds "
        "variables of its own too: `sow` adds to it at every call, say. Sow into a collection of "
        "another name, which is then no part of the model's state."
    )


def _refuse_training(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a method of a module in evaluation; ValueError where a layer is not told of it."""
    layer = context.module
    word = {nn.Dropout: "deterministic", nn.BatchNorm: "use_running_average"}.get(type(layer))
    if word is not None and context.method_name == "__call__":
        said = args[1] if len(args) > 1 else kwargs.get(word)
        said = getattr(layer, word) if said is None else said
        if said is False and getattr(layer, "rate", 1.0) > 0:
            raise ValueError(
                f"The model is applied with train=False, but its {type(layer).__name__} at "
                f"{'/'.join(layer.path) or 'the top'} has {word}=False and goes on training. Give "
                "the module's call an argument, such as `train`, and the layer "
                f"`{word}=not train`; or say that this is meant: `Linen(..., mode=no_flag)`."
            )
    return next_fun(*args, **kwargs)
