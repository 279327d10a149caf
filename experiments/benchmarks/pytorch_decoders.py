"""Small decoders of PyTorch's `transformers` with random weights: files, and their logits.

What `metalearn.models.load_hugging_face` has to reproduce. For each kind of decoder it writes a
folder as `save_pretrained` does, and `expected.npz` with tokens [2, 16] and logits [2, 16, 97] in
float32. Biases and norms are drawn at random too: as transformers initialises them they are zero
and one, and would hide a mistake.

This file imports nothing of the package, so that it can have an environment of its own:

    python -m venv .venv-torch
    .venv-torch/bin/pip install -r experiments/benchmarks/pytorch_decoders.lock
    .venv-torch/bin/python experiments/benchmarks/pytorch_decoders.py --out=DECODERS
    python -m metalearn.experiments.benchmarks.decoders --decoders=DECODERS

The last command, in the environment of the package, compares.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

VOCABULARY, LENGTH = 97, 16
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=32
    ),
    "gpt2-untied": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=32,
        n_inner=80,
        activation_function="relu",
        tie_word_embeddings=False,
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-biases": lambda: transformers.LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 6},
        head_dim=10,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
}


def write(name: str, folder: pathlib.Path) -> None:
    """Write the model of a config, and its logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        logits = model(tokens).logits
    model.save_pretrained(folder)
    np.savez(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())


def main() -> None:
    """Write every decoder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for all of them")
    out = parser.parse_args().out
    for name in CONFIGS:
        write(name, out / name)
        print(out / name)


if __name__ == "__main__":
    main()
