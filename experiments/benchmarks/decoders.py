"""Decoders of Hugging Face in JAX: the largest difference of their logits from PyTorch's.

Reads the folders that `pytorch_decoders.py` has written, in an environment of its own, and prints
one JSON line for each. It fails if a difference is above 1e-4, in float32.
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import numpy as np

from metalearn._utils import strict_json
from metalearn.models import load_hugging_face

MOST = 1e-4


def difference(folder: pathlib.Path) -> dict[str, float]:
    """Return the largest difference of the logits, and the largest logit."""
    architecture, params = load_hugging_face(folder)
    expected = np.load(folder / "expected.npz")
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(architecture.apply)(params, expected["tokens"].astype(np.int32))
    differences = np.abs(np.asarray(logits) - expected["logits"])
    return {
        "difference": float(differences.max()),
        "largest_logit": float(np.abs(expected["logits"]).max()),
    }


def main() -> None:
    """Compare every decoder in a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--decoders", type=pathlib.Path, required=True, help="from --out")
    folders = sorted(parser.parse_args().decoders.glob("*/expected.npz"))
    worst = 0.0
    for file in folders:
        row = difference(file.parent)
        print(strict_json.dumps({"decoder": file.parent.name, **row}))
        worst = max(worst, row["difference"])
    if not folders or worst > MOST:
        raise SystemExit(f"The largest difference of {len(folders)} decoders is {worst}.")


if __name__ == "__main__":
    main()
