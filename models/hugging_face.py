"""Decoders of Hugging Face: their config.json and safetensors files as an `Architecture`.

`load_hugging_face(folder)` returns the architecture and its parameters, stacked over the layers, of

- GPT-2 (`model_type` "gpt2"), Radford et al. 2019: layer norm, learned positions, biases, a tied
  head, and matrices that are stored [in, out];
- Llama and what has its shape ("llama", "mistral", "qwen2"), Touvron et al. 2023
  (arXiv:2302.13971): RMSNorm, rotary positions, SwiGLU, grouped queries, matrices [out, in].

The logits are those of PyTorch's `transformers` (`experiments/benchmarks/pytorch_decoders.py`).
What a config asks for and an `Architecture` does not have is refused: scaled rotary positions,
sliding windows, attention divided by the number of the layer.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from metalearn._utils.checks import pick
from metalearn.models.transformer import Architecture, Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
# Buffers in files of older versions, which are no parameters.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def load_hugging_face(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, **options: Any
) -> tuple[Architecture, Params]:
    """Return (architecture, parameters) of a decoder, read from a folder.

    Args:
      folder: with config.json and model.safetensors, or its parts and model.safetensors.index.json.
      dtype: of the parameters.
      **options: further fields of the `Architecture`, such as `remat` and `attention`.

    Raises:
      FileNotFoundError: without those files.
      ValueError: for another kind of model, or tensors that do not belong to the config.
    """
    path = pathlib.Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no config.json in {path}. `load_hugging_face` reads a folder as "
            "`save_pretrained` writes it: config.json and model.safetensors."
        )
    config = json.loads((path / "config.json").read_text())
    describe, place = pick(KINDS, config.get("model_type"), "kind of decoder")
    architecture: Architecture = describe(config, options)
    tensors = Tensors(_read(path), path)
    params = place(architecture, tensors)
    tensors.check_empty(architecture.tied)
    return architecture, _checked(architecture, params, path, dtype)


class Tensors:
    """The tensors of a file by name, each of which is taken once."""

    def __init__(self, tensors: Mapping[str, np.ndarray], path: pathlib.Path):
        starts = ("transformer.", "model.")
        self.left = {
            next((n.removeprefix(s) for s in starts if n.startswith(s)), n): value
            for n, value in tensors.items()
            if not n.endswith(BUFFERS)
        }
        self.path = path

    def take(self, name: str) -> np.ndarray:
        """Return a tensor; ValueError if there is none of this name."""
        if name not in self.left:
            raise ValueError(
                f"{self.path} has no tensor called {name!r}, which its config.json asks for. There "
                f"are: {', '.join(sorted(self.left)[:12])}, ..."
            )
        return self.left.pop(name)

    def stack(self, name: str, layers: int, transposed: bool = False) -> np.ndarray:
        """Return the tensors of all layers, stacked; `{}` in the name is the layer."""
        each = [self.take(name.format(layer)) for layer in range(layers)]
        return np.stack([tensor.T if transposed else tensor for tensor in each])

    def check_empty(self, tied: bool) -> None:
        """Raise ValueError if a tensor is left that nothing has read."""
        left = sorted(name for name in self.left if not (tied and name == "lm_head.weight"))
        if left:
            raise ValueError(
                f"{self.path} holds tensors that its config.json has no place for: "
                f"{', '.join(left[:8])}. Is it a model with another head, or with adapters?"
            )


def _gpt2(config: Mapping[str, Any], options: Mapping[str, Any]) -> Architecture:
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _only(config, name, usual)
    fields: dict[str, Any] = {
        "vocabulary": config["vocab_size"],
        "width": config["n_embd"],
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "hidden": config.get("n_inner"),
        "norm": "layer",
        "tied": config.get("tie_word_embeddings", True),
        "activation": _activation(config.get("activation_function", "gelu_new")),
        "positions": "learned",
        "context": config["n_positions"],
        "biases": ("query", "key", "value", "out", "up", "down"),
        "epsilon": config.get("layer_norm_epsilon", 1e-5),
    }
    return Architecture(**{**fields, **options})


def _place_gpt2(architecture: Architecture, tensors: Tensors) -> dict[str, np.ndarray]:
    layers = architecture.layers
    params = {
        "embedding": tensors.take("wte.weight"),
        "positions": tensors.take("wpe.weight"),
        "final_norm": tensors.take("ln_f.weight"),
        "final_norm_shift": tensors.take("ln_f.bias"),
        "attention_norm": tensors.stack("h.{}.ln_1.weight", layers),
        "attention_norm_shift": tensors.stack("h.{}.ln_1.bias", layers),
        "mlp_norm": tensors.stack("h.{}.ln_2.weight", layers),
        "mlp_norm_shift": tensors.stack("h.{}.ln_2.bias", layers),
    }
    for kind, end in (("weight", ""), ("bias", "_bias")):
        joined = tensors.stack(f"h.{{}}.attn.c_attn.{kind}", layers)
        for name, part in zip(("query", "key", "value"), np.split(joined, 3, -1), strict=True):
            params[f"{name}{end}"] = part
        params[f"out{end}"] = tensors.stack(f"h.{{}}.attn.c_proj.{kind}", layers)
        params[f"up{end}"] = tensors.stack(f"h.{{}}.mlp.c_fc.{kind}", layers)
        params[f"down{end}"] = tensors.stack(f"h.{{}}.mlp.c_proj.{kind}", layers)
    if not architecture.tied:
        params["head"] = tensors.take("lm_head.weight").T
    return params


def _llama(config: Mapping[str, Any], options: Mapping[str, Any]) -> Architecture:
    rotary = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rotary
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise ValueError(
            f"The config asks for rotary positions of type {kind!r}, which an `Architecture` does "
            "not have: it has unscaled ones alone."
        )
    if config.get("use_sliding_window", True) and config.get("sliding_window") is not None:
        raise ValueError(
            f"The config asks for attention in a window of {config['sliding_window']} tokens, "
            "which an `Architecture` does not have. For shorter sequences than that it makes no "
            "difference: set `sliding_window` to null in config.json."
        )
    biases: tuple[str, ...] = ()
    if config["model_type"] == "qwen2":
        biases = ("query", "key", "value")
    elif config.get("attention_bias"):
        biases = ("query", "key", "value", "out")
    biases += ("gate", "up", "down") if config.get("mlp_bias") else ()
    fields: dict[str, Any] = {
        "vocabulary": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "hidden": config["intermediate_size"],
        "gated": True,
        "tied": config.get("tie_word_embeddings", False),
        "activation": _activation(config.get("hidden_act", "silu")),
        "rotary_base": rotary.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "biases": biases,
        "epsilon": config.get("rms_norm_eps", 1e-6),
    }
    return Architecture(**{**fields, **options})


def _place_llama(architecture: Architecture, tensors: Tensors) -> dict[str, np.ndarray]:
    layers = architecture.layers
    params = {
        "embedding": tensors.take("embed_tokens.weight"),
        "final_norm": tensors.take("norm.weight"),
        "attention_norm": tensors.stack("layers.{}.input_layernorm.weight", layers),
        "mlp_norm": tensors.stack("layers.{}.post_attention_layernorm.weight", layers),
    }
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    places = {name: f"layers.{{}}.self_attn.{theirs}" for name, theirs in names.items()}
    places |= {name: f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name, place in places.items():
        params[name] = tensors.stack(f"{place}.weight", layers, transposed=True)
        if name in architecture.biases:
            params[f"{name}_bias"] = tensors.stack(f"{place}.bias", layers)
    if not architecture.tied:
        params["head"] = tensors.take("lm_head.weight").T
    return params


KINDS: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gpt2": (_gpt2, _place_gpt2),
    "llama": (_llama, _place_llama),
    "mistral": (_llama, _place_llama),
    "qwen2": (_llama, _place_llama),
}


def _only(config: Mapping[str, Any], name: str, usual: Any) -> None:
    if config.get(name, usual) != usual:
        raise ValueError(
            f"The config has {name}={config[name]}, which an `Architecture` does not have: it is "
            f"as {name}={usual}."
        )


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return pick(ACTIVATIONS, name, "activation")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return all tensors of the files of a folder."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Any] = {}
    for name in files:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"There is no {name} in {path}. A model in PyTorch's own format (*.bin) is written "
                "as safetensors by `model.save_pretrained(folder)` of `transformers`."
            )
        with safetensors.safe_open(path / name, framework="flax") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def _checked(
    architecture: Architecture, params: Mapping[str, np.ndarray], path: pathlib.Path, dtype: Any
) -> Params:
    """Return the parameters on the device; ValueError where a shape is not the architecture's."""
    for name, (shape, _) in architecture.declare().items():
        if params[name].shape != shape:
            raise ValueError(
                f"{path} holds {name} of shape {list(params[name].shape)}, where its config.json "
                f"says {list(shape)}."
            )
    return {name: jnp.asarray(value, dtype) for name, value in params.items()}
