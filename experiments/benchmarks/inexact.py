"""The errors of the inexact settings of `MixedFlow`.

    python -m metalearn.experiments.benchmarks.inexact [--T 8 64 256 1000]

Per-parameter learning rates of a small transformer (2 layers, width 32, batch 4, sequence 32,
rate 1e-3) over T steps of Adam on random tokens, in float32. The error is that of the
meta-gradient, |g - g64| / |g64|, against reverse mode in float64 from the same theta_0; the row
of `MixedFlow()` is what float32 itself costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metalearn import Episode, MetaGradient, MixedFlow, Reverse
from metalearn.algorithms import LearningRates
from metalearn.models import Functions
from metalearn.models.transformer import Architecture
from metalearn.optimizers import reversible

SETTINGS: dict[str, MetaGradient] = {
    "MixedFlow()": MixedFlow(),
    "store='inexact_bfloat16'": MixedFlow(store="inexact_bfloat16"),
    "remat='inexact_reconstruct', segment=8": MixedFlow("inexact_reconstruct", segment=8),
    "remat='inexact_reconstruct', segment=16": MixedFlow("inexact_reconstruct", segment=16),
    "remat='inexact_reconstruct', segment=32": MixedFlow("inexact_reconstruct", segment=32),
    "remat='inexact_reconstruct', segment=64": MixedFlow("inexact_reconstruct", segment=64),
}


def meta_gradient(engine: MetaGradient, steps: int, dtype: Any) -> jax.Array:
    """Return the meta-gradient, flat."""
    shape = Architecture(64, width=32, layers=2, heads=2, remat="block")

    def init(key: jax.Array) -> Any:
        params = jax.tree.map(lambda x: x.astype(jnp.float32), shape.init(key))
        return jax.tree.map(lambda x: (jnp.round(1024 * x) / 1024).astype(dtype), params)

    optimizer = reversible.adam(1.0, eps_root=1e-8)
    algorithm = LearningRates(Functions(init, shape.apply), optimizer=optimizer, initial=1e-3)
    tokens = jax.random.randint(jax.random.key(0), (steps + 1, 4, 33), 0, 64, jnp.int32)
    data = tokens[..., :-1], tokens[..., 1:]
    episode = Episode(*(jax.tree.map(lambda x, i=i: x[i], data) for i in (slice(steps), steps)))

    @jax.jit
    def run(eta: Any, episode: Episode) -> jax.Array:
        key = jax.random.key(1)
        unroll, batches = algorithm.unroll(episode, key), algorithm.batches(episode, key)
        return ravel_pytree(engine.value_and_grad(unroll, eta, batches)[1])[0]

    return run(algorithm.init(jax.random.key(2)), episode)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--T", type=int, nargs="+", default=[8, 64, 256, 1000])
    horizons = parser.parse_args(argv).T
    print(f"| jax {jax.__version__} | " + " | ".join(f"T={steps}" for steps in horizons) + " |")
    print("|---" * (len(horizons) + 1) + "|")
    exact = {}
    for steps in horizons:
        with jax.enable_x64(True):
            exact[steps] = jax.device_get(meta_gradient(Reverse("nested"), steps, jnp.float64))
    for name, engine in SETTINGS.items():
        errors = []
        for steps in horizons:
            grads = jax.device_get(meta_gradient(engine, steps, jnp.float32))
            size = float(((grads - exact[steps]) ** 2).sum() / (exact[steps] ** 2).sum()) ** 0.5
            errors.append(f"{size:.1e}")
        print(f"| `{name}` | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
