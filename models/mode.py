"""How a network is told that it is training: every library and author has a word for it.

An adapter's `mode` says it; None looks for a word in `WORDS` among the arguments of the network.
A word of another kind is said by a function: `mode=lambda train: {"phase": "fit" if train else
"test"}`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Mode = Callable[[bool], Mapping[str, Any]]  # train -> keyword arguments of the network

# The usual words, and what they are when training.
WORDS = {
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
    """Call `network(inputs, train=...)`, as the networks of this package are."""
    return {"train": train}


def deterministic_flag(train: bool) -> Mapping[str, Any]:
    """Call `network(inputs, deterministic=...)`, as many Flax networks are."""
    return {"deterministic": not train}


def usual_flags(network: Callable[..., Any], train: bool) -> dict[str, bool]:
    """Return those of the usual words that are arguments of a function, as keyword arguments."""
    parameters = inspect.signature(network).parameters.values()
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {word: value == train for word, value in WORDS.items() if word in names}
