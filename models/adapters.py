"""What the adapters share: checks of their arguments, and how `train` is passed to a network.

Libraries and authors have different names for the flag of training mode. With `mode=None` an
adapter finds the argument of the network that has one of the usual names (`WORDS`), and says which
in its repr and in a log line of level debug. Where two of them would do, it refuses:
`mode="training"` says which. Any other argument takes a function from `train` to keyword arguments:
`mode=lambda train: {"phase": "fit" if train else "test"}`.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from metalearn._utils.readable import show
from metalearn.model import ADAPTERS, KINDS, library_of

LOGGER = logging.getLogger("metalearn.models")
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


def flag_name(
    what: str, mode: Mode | str | None, network: Callable[..., Any], fields: Iterable[str] = ()
) -> str | None:
    """Return the name of the flag of training mode that an adapter sets; None: there is none.

    Args:
      what: the adapter and the network, for messages: "Linen(module=Net)".
      mode: of the adapter: a name of `WORDS`; None: whichever the network has; a function from
        `train` to keyword arguments sets the mode by itself, and the result is None.
      network: the function that is called.
      fields: names of attributes that set the mode, too.

    Raises:
      ValueError: where two names would do, or the network has no argument of the name `mode`.
    """
    if callable(mode):
        return None
    parameters = inspect.signature(network).parameters.values()
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    flags = [word for word in WORDS if word in names | set(fields)]
    adapter, _, network_name = what.rstrip(")").partition("(")
    network_name = network_name.rpartition("=")[2]
    if mode is None:
        if len(flags) > 1:
            both = ", ".join(f"{word!r}: {'' if WORDS[word] else 'not '}train" for word in flags)
            raise ValueError(
                f"`{what}`: {' and '.join(map(repr, flags))} would both set its mode of training. "
                f"Say which: `{adapter}(..., mode={flags[0]!r})`; or set both: "
                f"`mode=lambda train: {{{both}}}`."
            )
        name = flags[0] if flags else None
        LOGGER.debug("%s: its mode of training is set by %s", what, name or "no argument")
        return name
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if mode not in WORDS:
        raise ValueError(
            f"`{adapter}(mode={mode!r})`: the values of {mode!r} in training and in evaluation are "
            f"not known. Those of {', '.join(WORDS)} are; another flag takes a function: "
            f"`mode=lambda train: {{{mode!r}: ...}}`."
        )
    if mode not in flags and not any_name:
        has = f"It has {', '.join(map(repr, flags))}." if flags else "It has no flag of its mode."
        raise ValueError(
            f"`{adapter}(mode={mode!r})`: `{network_name}` has no argument of that name. {has}"
        )
    return mode


def flags(mode: Mode | str | None, name: str | None, train: bool) -> Mapping[str, Any]:
    """Return the keyword arguments of a network in the mode of `train`.

    Args:
      mode: of the adapter.
      name: of the flag, from `flag_name`.
      train: the mode.
    """
    if callable(mode):
        return mode(train)
    return {} if name is None else {name: WORDS[name] == train}


def shown(adapter: Any, name: str | None) -> str:
    """Return the repr of an adapter, a dataclass, with the flag that it sets as its `mode`."""
    values = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    if values["mode"] is None:
        values["mode"] = name
    text = ", ".join(f"{key}={show(value)}" for key, value in values.items())
    return f"{type(adapter).__name__}({' '.join(text.split())})"


EXPECTED = {
    "linen": "a linen module, an instance with its sizes",
    "nnx": "a function that builds the module from random streams, or its class: every task has "
    "parameters of its own",
    "haiku": "the forward function itself, which the adapter transforms",
    "equinox": "a function that builds the module from a key, or its class: every task has "
    "parameters of its own",
    "functions": "a plain function",
}


def not_wrapped(what: str, value: Any, expected: str) -> str:
    """Return the message for an argument that the adapter of a library cannot wrap.

    Args:
      what: the argument, as the user writes it: "Linen(module=)".
      value: the argument's value.
      expected: the library of the adapter: a key of `EXPECTED`.
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
