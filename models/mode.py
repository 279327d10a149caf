"""How a network is told that it is training: every library and author has a word for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Mode = Callable[[bool], Mapping[str, Any]]  # train -> keyword arguments of the network


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
