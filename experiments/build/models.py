"""From a config to a network of a library, sized for the inputs and outputs of a dataset.

The networks are the exports of `metalearn.models.linen_networks`, `nnx_networks` and
`haiku_networks`. What a dataset decides is found by the names of their arguments: `outputs`,
`inputs` (how many numbers an input has), `image` (its shape) and `architecture`, of a transformer,
whose own arguments are then the keys of a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from metalearn._utils.checks import pick
from metalearn.experiments.build.datasets import Splits
from metalearn.experiments.build.registry import (
    Exports,
    as_tuple,
    check_call,
    parameters,
    snake_case,
)
from metalearn.models import (
    NNX,
    Architecture,
    Haiku,
    Linen,
    Model,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)


class Library(NamedTuple):
    """The networks of a model library, and how one of them becomes a `Model`."""

    networks: Exports
    adapt: Callable[[Callable[..., Any], Splits], Model]  # of arguments of the call -> network


def model(config: Mapping[str, Any], splits: Splits) -> Model:
    """Build a network of a library, sized for the inputs and outputs of a dataset."""
    options = {key: as_tuple(value) for key, value in dict(config).items()}
    library = pick(LIBRARIES, options.pop("library"), "model library")
    network = pick(library.networks, options.pop("name"), "network")
    takes = parameters(network)
    if "architecture" in takes:
        what = f"network {snake_case(network.__name__)!r}"
        check_call(what, options, Architecture, filled=("vocabulary",))
        options = {"architecture": Architecture(splits.outputs, **options)}
        sizes = {}
    else:
        sizes = {name: size for name, size in _sizes(splits).items() if name in takes}
        check_call(f"network {network.__name__!r}", options, network, filled=sizes)
    return library.adapt(lambda **given: network(**sizes, **options, **given), splits)


def _sizes(splits: Splits) -> dict[str, Any]:
    shape = splits.inputs.shape[1:]
    return {"outputs": splits.outputs, "inputs": splits.inputs.size, "image": shape}


def _linen(build: Callable[..., Any], splits: Splits) -> Model:
    return Linen(build(), splits.inputs, train_flag)


def _nnx(build: Callable[..., Any], splits: Splits) -> Model:
    del splits
    return NNX(lambda rngs: build(rngs=rngs), train_flag)


def _haiku(build: Callable[..., Any], splits: Splits) -> Model:
    def forward(x: jax.Array, train: bool) -> jax.Array:
        return build()(x, train)

    return Haiku(forward, splits.inputs, train_flag)


def _is_class(export: Any) -> bool:
    return isinstance(export, type)


LIBRARIES = {
    "linen": Library(Exports(linen_networks, _is_class), _linen),
    "nnx": Library(Exports(nnx_networks, _is_class), _nnx),
    "haiku": Library(Exports(haiku_networks, _is_class), _haiku),
}
