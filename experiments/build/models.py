"""From a config to a network of a library, sized for the inputs and outputs of a dataset.

For an algorithm with a head of its own (`Algorithm.own_head`) a network is built without its head.

The networks are the exports of `metalearn.models.linen_networks`, `nnx_networks` and
`haiku_networks`. What a dataset decides is found by the names of their arguments: `outputs`,
`inputs` (how many numbers an input has), `image` (its shape) and `architecture`, of a transformer,
whose own arguments are then the keys of a config.

A network of the user's own, `name = "my_package.my_file:MyNet"`, is a class of one of the libraries
or of `Model`; or a function that builds one. Its arguments with the names above are filled in too,
and one more, `example`: the shape and type of one batch of inputs, [1, ...]. The library is that of
the class; the key `library` is of functions, which do not show theirs until they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metalearn._utils.checks import pick
from metalearn.experiments.build.datasets import Sizes, Splits
from metalearn.experiments.build.registry import (
    Exports,
    as_tuple,
    check_call,
    parameters,
    snake_case,
)
from metalearn.experiments.cli.import_paths import is_import_path, load
from metalearn.model import library_of
from metalearn.models import (
    NNX,
    Architecture,
    Equinox,
    Haiku,
    Linen,
    LoRA,
    Model,
    Precision,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)
from metalearn.models.adapters import Mode, flag_name, flags

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
X64 = {"float64": jnp.float64}  # where JAX has it: `metalearn compare --x64`


def wrapped(network: Model, lora: Mapping[str, Any], precision: Mapping[str, Any]) -> Model:
    """Return a model with low-rank terms and in other floating-point types, where a config says so.

    Args:
      network: the model.
      lora: the arguments of `LoRA`; without a rank there are no terms.
      precision: the arguments of `Precision`, types by name, and "master_weights", which is for
        the optimizers.
    """
    if lora:
        check_call("section lora", lora, LoRA, filled=("model",))
    if lora.get("rank") is not None:
        network = LoRA(network, **lora)
    elif lora.get("paths"):
        raise ValueError(
            f"lora.paths={lora['paths']!r} chooses matrices for low-rank terms, but lora.rank is "
            "not set: there are none. Set it, such as --config.lora.rank=4, or leave both."
        )
    types = {key: value for key, value in precision.items() if key != "master_weights"}
    check_call("section precision", types, Precision, filled=("model",))
    dtypes = {**DTYPES, **X64} if jax.config.read("jax_enable_x64") else DTYPES
    chosen = {
        key: pick(dtypes, name, f"floating-point type (precision.{key})")
        for key, name in types.items()
        if name is not None
    }
    return Precision(network, **chosen) if chosen else network


class Library(NamedTuple):
    """The networks of a model library, and how one of them becomes a `Model`."""

    networks: Exports
    adapt: Callable[..., Model]  # what builds a network, sizes, its mode -> model


def model(config: Mapping[str, Any], sizes: Sizes | Splits) -> Model:
    """Build a network of a library, sized for the inputs and outputs of a dataset."""
    options = {key: as_tuple(value) for key, value in dict(config).items()}
    if is_import_path(options["name"]):
        return _own(options.pop("name"), options.pop("library", None), options, sizes)
    library = pick(LIBRARIES, options.pop("library", "linen"), "model library")
    network = pick(library.networks, options.pop("name"), "network")
    takes = parameters(network)
    if "architecture" in takes:
        what = f"network {snake_case(network.__name__)!r}"
        check_call(what, options, Architecture, filled=("vocabulary",))
        if sizes.outputs is None:
            raise ValueError(
                f"The {what} ends in logits of tokens, and this algorithm puts a head of its own "
                "on an embedding. Take a network that has one, such as 'conv_net' or 'mlp'."
            )
        options = {"architecture": Architecture(sizes.outputs, **options)}
        filled = {}
    else:
        filled = {name: size for name, size in _arguments(sizes).items() if name in takes}
        check_call(f"network {network.__name__!r}", options, network, filled=filled)
    return library.adapt(lambda **mode: network(**filled, **options, **mode), sizes)


FILLED = ("outputs", "inputs", "image", "example")  # arguments that do not come from the config


def _arguments(sizes: Sizes | Splits) -> dict[str, Any]:
    shape = sizes.inputs.shape[1:]
    return {"outputs": sizes.outputs, "inputs": sizes.inputs.size, "image": shape}


def _linen(
    build: Callable[..., Any], sizes: Sizes | Splits, mode: Mode | None = train_flag
) -> Model:
    return Linen(build(), sizes.inputs, mode)


def _nnx(build: Callable[..., Any], sizes: Sizes | Splits, mode: Mode | None = train_flag) -> Model:
    del sizes
    return NNX(lambda rngs: build(rngs=rngs), mode)


def _haiku(
    build: Callable[..., Any], sizes: Sizes | Splits, mode: Mode | None = train_flag
) -> Model:
    def forward(x: jax.Array, train: bool) -> jax.Array:
        module = build()
        name = flag_name(f"Haiku(forward={type(module).__name__})", mode, type(module).__call__)
        return module(x, **flags(mode, name, train))

    return Haiku(forward, sizes.inputs, train_flag)


def _own(
    name: str, library: str | None, options: Mapping[str, Any], sizes: Sizes | Splits
) -> Model:
    """Build a network of the user's own; the flag of training mode has any of the usual names."""
    network = load(name, "network")
    what = f"network {name!r}"
    if not callable(network) or (isinstance(network, type) and not _is_network(network)):
        raise ValueError(
            f"{name!r} is no network: {network!r:.80} is neither a class of Flax linen, Flax NNX, "
            "Haiku, Equinox or `metalearn.models.Model`, nor a function that builds one."
        )
    known = {**_arguments(sizes), "example": sizes.inputs}
    if sizes.outputs is None:  # an embedding, whose size is a key of the config
        del known["outputs"]
    filled = {key: size for key, size in known.items() if key in parameters(network)}
    check_call(what, options, network, filled=filled)

    def build(**streams: Any) -> Any:
        return network(**filled, **options, **streams)

    if isinstance(network, type):
        library = library_of(network)
    elif "rngs" in inspect.signature(network).parameters:
        library = "nnx"
    if library == "equinox":
        return Equinox(lambda key: build(key=key))
    if library in ("nnx", "haiku"):
        return LIBRARIES[library].adapt(build, sizes, None)
    module = build()
    if isinstance(module, Model):
        return module
    if library_of(module) == "linen":
        return LIBRARIES["linen"].adapt(lambda: module, sizes, None)
    raise ValueError(
        f"{name!r} is no network: it returned {module!r:.80}. A function returns a `Model` or a "
        "linen module; one that builds an NNX module takes `rngs`; for one that builds a Haiku "
        "module, set model.library='haiku'."
    )


def _is_network(cls: type) -> bool:
    return issubclass(cls, Model) or library_of(cls) in (*LIBRARIES, "equinox")


def _is_class(export: Any) -> bool:
    return isinstance(export, type)


LIBRARIES = {
    "linen": Library(Exports(linen_networks, _is_class), _linen),
    "nnx": Library(Exports(nnx_networks, _is_class), _nnx),
    "haiku": Library(Exports(haiku_networks, _is_class), _haiku),
}
