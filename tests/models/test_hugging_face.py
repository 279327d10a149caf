"""Decoders come from Hugging Face's files, and compute what a plain reading of their papers does.

The reference is NumPy, one token at a time, on small files with random weights. Against PyTorch's
`transformers` itself: `experiments/benchmarks/pytorch_decoders.py`.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from metalearn.models import Architecture, Linen, linen_networks, load_hugging_face, with_params
from metalearn.models.attention import BlockedAttention

TOKENS = np.random.default_rng(3).integers(0, 11, (2, 6))
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 8,
    "layer_norm_epsilon": 1e-5,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 10,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def drawn(shapes):
    generator = np.random.default_rng(0)
    return {n: generator.normal(size=s).astype(np.float32) / 2 for n, s in shapes.items()}


def gpt2_tensors(prefix="transformer."):
    shapes = {"wte.weight": (11, 12), "wpe.weight": (8, 12), "ln_f.weight": 12, "ln_f.bias": 12}
    for i in range(2):
        shapes |= {
            f"h.{i}.{name}": shape
            for name, shape in {
                **{"ln_1.weight": 12, "ln_1.bias": 12, "ln_2.weight": 12, "ln_2.bias": 12},
                **{"attn.c_attn.weight": (12, 36), "attn.c_attn.bias": 36},
                **{"attn.c_proj.weight": (12, 12), "attn.c_proj.bias": 12},
                **{"mlp.c_fc.weight": (12, 48), "mlp.c_fc.bias": 48},
                **{"mlp.c_proj.weight": (48, 12), "mlp.c_proj.bias": 12},
            }.items()
        }
    return {f"{prefix}{name}": value for name, value in drawn(shapes).items()}


def llama_tensors(tied=False, biases=()):
    shapes = {"model.embed_tokens.weight": (11, 12), "model.norm.weight": 12}
    shapes |= {} if tied else {"lm_head.weight": (11, 12)}
    outs = {"q": 24, "k": 8, "v": 8}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (out, 12) for n, out in outs.items()}
        shapes |= {f"{layer}self_attn.{n}_proj.bias": outs[n] for n in biases}
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (12, 24),
            f"{layer}mlp.gate_proj.weight": (10, 12),
            f"{layer}mlp.up_proj.weight": (10, 12),
            f"{layer}mlp.down_proj.weight": (12, 10),
            f"{layer}input_layernorm.weight": 12,
            f"{layer}post_attention_layernorm.weight": 12,
        }
    return drawn(shapes)


def written(folder, config, tensors, **others):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **others}))
    save_file(tensors, folder / "model.safetensors")
    return folder


# The reference.


def attended(q, k, v):
    """One sequence: q, k, v [S, heads, size] -> [S, heads * size], each token by itself."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        for head in range(q.shape[1]):
            scores = k[: t + 1, head] @ q[t, head] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[: t + 1, head]
    return out.reshape(len(q), -1)


def gpt2_reference(w, tokens):
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for i in range(2):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").reshape(len(x), 3, 3, 4)
        x = x + linear(attended(*np.moveaxis(qkv, 1, 0)), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def rotated(x, base):
    """Rotate as complex numbers: feature j with feature j + size / 2, at token t by t base^..."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    z = z * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def llama_reference(w, tokens, base=500.0, tied=False):
    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"model.{name}.weight"]

    def linear(x, name):
        return x @ w[f"model.{name}.weight"].T + w.get(f"model.{name}.bias", 0)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(2):
        h = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = (
            linear(h, f"layers.{i}.self_attn.{n}_proj").reshape(len(x), -1, 4) for n in "qkv"
        )
        q, k = rotated(q, base), rotated(k, base)
        shared = [0, 0, 0, 1, 1, 1]  # the head of keys and values of each head of queries
        x = x + linear(attended(q, k[:, shared], v[:, shared]), f"layers.{i}.self_attn.o_proj")
        h = norm(x, f"layers.{i}.post_attention_layernorm")
        gate = linear(h, f"layers.{i}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate)) * linear(h, f"layers.{i}.mlp.up_proj")
        x = x + linear(gate, f"layers.{i}.mlp.down_proj")
    return norm(x, "norm") @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def assert_logits(folder, reference, tensors, **options):
    architecture, params = load_hugging_face(folder, **options)
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    expected = np.stack([reference(tensors, row) for row in TOKENS])
    logits = jax.jit(architecture.apply)(params, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 1
    return architecture, params


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_computes_what_its_files_say(tmp_path, prefix):
    tensors = gpt2_tensors(prefix)
    plain = {name.removeprefix(prefix): value for name, value in tensors.items()}
    buffers = {f"{prefix}h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    folder = written(tmp_path, GPT2, {**tensors, **buffers})
    architecture, params = assert_logits(folder, gpt2_reference, plain)
    assert architecture.tied and architecture.norm == "layer" and architecture.context == 8
    assert sum(leaf.size for leaf in params.values()) == architecture.parameters


@pytest.mark.parametrize("options", [{}, {"remat": "block", "attention": BlockedAttention(2)}])
def test_a_llama_computes_what_its_files_say(tmp_path, options):
    tensors = llama_tensors()
    folder = written(tmp_path, LLAMA, tensors)
    architecture, _ = assert_logits(folder, llama_reference, tensors, **options)
    assert architecture.kv_heads == 2 and architecture.gated
    assert architecture.remat == options.get("remat", "none")


def test_a_qwen_has_biases_and_a_tied_head_and_a_newer_config_another_place_for_its_base(tmp_path):
    tensors = llama_tensors(tied=True, biases="qkv")
    config = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 3.0}
    rotary = {"rope_type": "default", "rope_theta": 500.0}
    folder = written(tmp_path, config, tensors, rope_parameters=rotary)
    assert_logits(folder, lambda w, row: llama_reference(w, row, tied=True), tensors)


def test_a_model_in_parts_is_read_from_its_index(tmp_path):
    tensors, parts = llama_tensors(), {}
    written(tmp_path, LLAMA, {})
    (tmp_path / "model.safetensors").unlink()
    for i, name in enumerate(tensors):
        parts.setdefault(f"model-{i % 2}.safetensors", {})[name] = tensors[name]
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    index = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_logits(tmp_path, llama_reference, tensors)


def test_parameters_are_in_the_dtype_that_is_asked_for(tmp_path):
    folder = written(tmp_path, LLAMA, llama_tensors())
    _, params = load_hugging_face(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("bfloat16")}


def test_a_decoder_becomes_a_model_that_begins_with_its_weights(tmp_path):
    architecture, params = load_hugging_face(written(tmp_path, GPT2, gpt2_tensors()))
    network = Linen(
        linen_networks.Transformer(architecture), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
    model = with_params(network, params)
    initial, state = jax.jit(model.init)(jax.random.key(0))
    logits, _ = model.apply(initial, state, TOKENS, train=False)
    np.testing.assert_allclose(logits, architecture.apply(params, TOKENS), rtol=1e-6)


# What is refused.

REFUSED = {
    "another kind": (
        {**LLAMA, "model_type": "t5"},
        llama_tensors,
        "No kind of decoder is called 't5'. There are: gpt2, llama, mistral, qwen2.",
    ),
    "scaled positions": (
        {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        llama_tensors,
        "The config asks for rotary positions of type 'llama3', which an `Architecture` does not",
    ),
    "a window": (
        {**LLAMA, "model_type": "mistral", "sliding_window": 4},
        llama_tensors,
        "The config asks for attention in a window of 4 tokens, which an `Architecture` does not",
    ),
    "other attention": (
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        gpt2_tensors,
        "The config has scale_attn_by_inverse_layer_idx=True, which an `Architecture` does not",
    ),
    "too few tensors": (
        {**GPT2, "n_layer": 3},
        gpt2_tensors,
        "has no tensor called 'h.2.ln_1.weight', which its config.json asks for. There are: h.0",
    ),
    "too many tensors": (
        {**LLAMA, "num_hidden_layers": 1},
        llama_tensors,
        "holds tensors that its config.json has no place for: layers.1.input_layernorm.weight, ",
    ),
    "another shape": (
        {**LLAMA, "vocab_size": 12},
        llama_tensors,
        "holds embedding of shape [11, 12], where its config.json says [12, 12].",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_architecture_does_not_have_is_refused(tmp_path, name):
    config, tensors, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        load_hugging_face(written(tmp_path, config, tensors()))


def test_a_folder_without_its_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no config.json in .* as `save"):
        load_hugging_face(tmp_path)
    written(tmp_path, GPT2, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no model.safetensors in .*\*\.bin"):
        load_hugging_face(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "4 heads of queries do not divide into groups for 3 heads of keys"),
        ({"positions": "learned"}, "learned positions need the length of the longest sequence"),
        ({"context": 5}, r"`Architecture(positions='rotary', context=5)`: learned positions need"),
        ({"positions": "relative"}, "No kind of positions is called 'relative'"),
        ({"biases": ("gate",)}, "No projection is called 'gate'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Architecture(vocabulary=5, width=8, layers=1, heads=4, **options)


@pytest.mark.slow
def test_a_sequence_longer_than_the_learned_positions_is_refused():
    architecture = Architecture(5, 8, 1, 2, positions="learned", context=3)
    params = architecture.init(jax.random.key(0))
    with pytest.raises(ValueError, match="A sequence of 4 tokens is longer than the 3 positions"):
        architecture.apply(params, jnp.zeros((1, 4), jnp.int32))
