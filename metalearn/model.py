"""What an algorithm needs of a model, whichever library it was written in.

A model is a pair of pure functions over explicit parameters and an explicit mutable
state (running statistics, random streams). `metalearn.models` has one adapter each for
Flax linen, Flax NNX, Haiku and plain functions.
"""

from __future__ import annotations

import abc
from typing import Any

import jax


class Model(abc.ABC):
    """A network as two pure functions. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Return (params, state): what is learned, and what the forward pass updates."""

    @abc.abstractmethod
    def apply(
        self, params: Any, state: Any, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Return (outputs, new state).

        Args:
          params: from `init`, or adapted.
          state: from `init`, or from the call before. `()` for a model without one.
          inputs: [batch, ...], as the model takes them.
          train: batch statistics and dropout on; running statistics are updated.
          key: for dropout and the like; None where the model draws nothing.
        """


ADAPTERS = {
    "linen": "`Linen(module, inputs)`, with `inputs` such as "
    "`jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)`",
    "nnx": "`NNX(lambda rngs: Net(..., rngs=rngs))`, from what builds it",
    "haiku": "`Haiku(forward, inputs)`, from the function that one gives to `hk.transform`",
    "functions": "`Functions(init, apply)`, init(key) -> params, apply(params, inputs) -> outputs",
}


def no_model(what: str, value: Any) -> str:
    """Say that something is no `Model`, and which adapter makes one of it.

    Args:
      what: what got it, as its user writes it: "MAML(model=...)".
      value: what was given.
    """
    is_class = isinstance(value, type)
    name = value.__name__ if is_class else type(value).__name__
    if is_class and issubclass(value, Model):
        return f"`{what}`: it is a Model, not the class {name}. Make one: `{name}(...)`."
    library = library_of(value)
    kind = "a network" if library is None else f"{KINDS[library]}"
    found = f"the class {name}, of {kind}s" if is_class and library else f"{kind}, `{name}`"
    if library is None:
        found = "a function" if callable(value) and not is_class else f"`{name}`"
    ways = [ADAPTERS[library]] if library else list(ADAPTERS.values())
    return (
        f"`{what}`: it is a Model, two pure functions with explicit parameters, not {found}. "
        f"`metalearn.models` makes one of it: {'; or '.join(ways)}."
    )


KINDS = {"linen": "a linen module", "nnx": "an NNX module", "haiku": "a Haiku network"}


def library_of(value: Any) -> str | None:
    """Return "linen", "nnx" or "haiku" for a module of one, or its class; else None.

    Told by the modules of its classes, since this one imports none of the libraries.
    """
    classes = value.__mro__ if isinstance(value, type) else type(value).__mro__
    for module in (cls.__module__ for cls in classes):
        for start, library in (("flax.linen", "linen"), ("flax.nnx", "nnx"), ("haiku", "haiku")):
            if module == start or module.startswith(f"{start}."):
                return library
    return None
