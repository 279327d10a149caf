"""What the adapters share: checks of their arguments, and how `train` is passed to a network.

Libraries and authors have different names for the flag of training mode. The `mode` of an adapter
is a function from `train` to keyword arguments of the network; None passes those arguments of the
network that have one of the usual names (`WORDS`). Any other argument takes a function of one's
own: `mode=lambda train: {"phase": "fit" if train else "test"}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from metalearn.model import ADAPTERS, KINDS, library_of

Mode = Callable[[bool], Mapping[str, Any]]  # train -> keyword arguments of the network

WORDS = {  # the usual names of the flag, and their values in training
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


def no_flag(train: bool) -> Mapping[str, Any]:
    """Call `network(inputs)`: nothing in it depends on training."""
    del train
    return {}


def train_flag(train: bool) -> Mapping[str, Any]:
    """Call `network(inputs, train=...)`, as the networks of this package expect."""
    return {"train": train}


def deterministic_flag(train: bool) -> Mapping[str, Any]:
    """Call `network(inputs, deterministic=...)`, as many Flax networks expect."""
    return {"deterministic": not train}


def usual_flags(network: Callable[..., Any], train: bool) -> dict[str, bool]:
    """Return the keyword arguments of a function that have a usual name, with their values."""
    parameters = inspect.signature(network).parameters.values()
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {word: value == train for word, value in WORDS.items() if word in names}


EXPECTED = {
    "linen": "a linen module, an instance with its sizes",
    "nnx": "a function that builds the module from random streams, or its class: every task has "
    "parameters of its own",
    "haiku": "the forward function itself, which the adapter transforms",
}


def not_wrapped(what: str, value: Any, expected: str) -> str:
    """Return the message for an argument that the adapter of a library cannot wrap.

    Args:
      what: the argument, as the user writes it: "Linen(module=)".
      value: the argument's value.
      expected: the library of the adapter: "linen", "nnx" or "haiku".
    """
    library = library_of(value)
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    described = f"{KINDS[library]}, `{name}`" if library else f"a {name}"
    if library and isinstance(value, type):
        described = f"the class `{name}`"
    way_out = ADAPTERS[library or expected]
    if library == expected == "linen":
        way_out = f"`Linen({name}(...), inputs)`"
    return f"`{what}` takes {EXPECTED[expected]}; not {described}. Write {way_out}."


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
