"""Interface between algorithms and models of any library.

A model is a pair of pure functions of explicit parameters and an explicit mutable state (running
statistics, random streams). `metalearn.models` has an adapter each for Flax linen, Flax NNX, Haiku,
Equinox and plain functions.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

Part = TypeVar("Part")


class Model(abc.ABC):
    """A network as two pure functions. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state): the parameters, and the mutable state of the forward pass."""

    @abc.abstractmethod
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
        """Return (outputs, new state).

        Args:
          params: from `init`, or adapted.
          state: from `init`, or from the previous call. `()` for a model without one.
          inputs: [batch, ...], as the model expects them.
          train: use batch statistics and dropout, and update running statistics.
          dropout: False: no dropout in training mode either, as for queries that are normalised by
            their own statistics. In evaluation mode there is none anyway.
          key: for dropout and other random operations; None if there are none.
        """

    def constants(self) -> Any:
        """Return the arrays that the model holds and nobody learns, such as a pretrained body.

        The Trainer passes them to its compiled programs as arguments. By default those of the
        models among its fields.
        """
        return constants_of(self)

    def bind(self, constants: Any) -> Model:
        """Return the same model with these arrays for its `constants()`, a pytree like them."""
        return bound(self, constants)


def check_dropout(what: str, model: Model) -> None:
    """Raise TypeError if `apply` of a model, or of one inside it, lacks the argument `dropout`.

    Args:
      what: the class that calls it: "MAML".
      model: of the user.
    """
    takes = inspect.signature(model.apply).parameters
    rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    if "dropout" not in takes and not rest:
        name = type(model).__name__
        raise TypeError(
            f"`{what}(model=)` computes queries without dropout, but `{name}.apply` has no "
            f"argument `dropout`. Define it as `def apply(self, params, state, inputs, *, train, "
            "dropout=True, key=None)`, as `metalearn.models.Model` does; a model without dropout "
            "ignores it."
        )
    for inner in _models(model).values():
        check_dropout(what, inner)


def constants_of(part: Any) -> dict[str, Any]:
    """Return the constants of the models among the fields of a dataclass, by the field's name."""
    constants = {name: model.constants() for name, model in _models(part).items()}
    return {name: arrays for name, arrays in constants.items() if jax.tree.leaves(arrays)}


def bound(part: Part, constants: Mapping[str, Any]) -> Part:
    """Return a dataclass whose models are bound to constants, as from `constants_of`."""
    if not jax.tree.leaves(constants):
        return part
    models = {name: _models(part)[name].bind(arrays) for name, arrays in constants.items()}
    return dataclasses.replace(part, **models)  # type: ignore[type-var]


def _models(part: Any) -> dict[str, Model]:
    names = [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    values = {name: getattr(part, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Model)}


ADAPTERS = {
    "linen": "`Linen(module, inputs)`, with `inputs` such as "
    "`jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)`",
    "nnx": "`NNX(lambda rngs: Net(..., rngs=rngs))`, from what builds it",
    "haiku": "`Haiku(forward, inputs)`, from the function that one gives to `hk.transform`",
    "equinox": "`Equinox(lambda key: Net(..., key=key))`, from what builds it",
    "functions": "`Functions(init, apply)`, init(key) -> params, apply(params, inputs) -> outputs",
}


def no_model(what: str, value: Any) -> str:
    """Return a message that a value is not a `Model`, with the adapter that converts it.

    Args:
      what: the argument, as its user writes it: "MAML(model=...)".
      value: of the argument.
    """
    is_class = isinstance(value, type)
    name = value.__name__ if is_class else type(value).__name__
    if is_class and issubclass(value, Model):
        return f"`{what}`: it is a Model, not the class {name}. Make one: `{name}(...)`."
    library = library_of(value)
    kind = "a network" if library is None else f"{KINDS[library]}"
    given = f"the class {name}, of {kind}s" if is_class and library else f"{kind}, `{name}`"
    if library is None:
        given = "a function" if callable(value) and not is_class else f"`{name}`"
    ways = [ADAPTERS[library]] if library else list(ADAPTERS.values())
    return (
        f"`{what}`: it is a Model, two pure functions with explicit parameters, not {given}. "
        f"`metalearn.models` makes one of it: {'; or '.join(ways)}."
    )


KINDS = {
    "linen": "a linen module",
    "nnx": "an NNX module",
    "haiku": "a Haiku network",
    "equinox": "an Equinox module",
}
LIBRARIES = {"flax.linen": "linen", "flax.nnx": "nnx", "haiku": "haiku", "equinox": "equinox"}


def library_of(value: Any) -> str | None:
    """Return the key in `KINDS` of the library of a network, or of its class; else None.

    It is detected by the modules of its classes, without importing a library.
    """
    classes = value.__mro__ if isinstance(value, type) else type(value).__mro__
    for module in (cls.__module__ for cls in classes):
        for start, library in LIBRARIES.items():
            if module == start or module.startswith(f"{start}."):
                return library
    return None
