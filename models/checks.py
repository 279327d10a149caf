"""What an adapter was given where it takes something else: what it is, and the way out."""

from __future__ import annotations

from typing import Any

import jax

from metalearn.model import ADAPTERS, KINDS, library_of

WHY = {
    "linen": "a linen module, an instance with its sizes",
    "nnx": "a function that builds the module from random streams, or its class: every task has "
    "parameters of its own",
    "haiku": "the forward function itself, which the adapter transforms",
}


def not_wrapped(what: str, value: Any, takes: str) -> str:
    """Say that an adapter of one library cannot take something.

    Args:
      what: the argument, as its user writes it: "Linen(module=)".
      value: what was given.
      takes: the library of the adapter: "linen", "nnx" or "haiku".
    """
    library = library_of(value)
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    found = f"{KINDS[library]}, `{name}`" if library else f"a {name}"
    if library and isinstance(value, type):
        found = f"the class `{name}`"
    way_out = ADAPTERS[library or takes]
    if library == takes == "linen":
        way_out = f"`Linen({name}(...), inputs)`"
    return f"`{what}` takes {WHY[takes]}; not {found}. Write {way_out}."


def check_inputs(adapter: str, inputs: Any) -> None:
    """Raise TypeError unless inputs are arrays, or their shapes."""
    leaves = jax.tree.leaves(inputs)
    for leaf in leaves or [inputs]:
        try:
            _ = leaf.shape, leaf.dtype
        except AttributeError:
            raise TypeError(
                f"`{adapter}(inputs={inputs!r})` is what a batch of inputs looks like: an array, "
                "or `jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)`, or a pytree of them."
            ) from None
