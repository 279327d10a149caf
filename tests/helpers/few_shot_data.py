"""Small few-shot data, sources of them, and a linear learner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalearn
from metalearn import Trainer
from metalearn.algorithms import MAML
from metalearn.models import Functions

SIZES = {"ways": 3, "shots": 1, "queries": 2}


def images(count=60, seed=0):
    """Images [count, 4, 4, 1] uint8 of noise, and their labels [count] in 0 .. 9."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 4, 4, 1), np.uint8)
    return pixels, np.arange(count) % 10


class Pairs:
    """A source as a PyTorch `Dataset` is: of pairs (input, label)."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels, self.reads = inputs, labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        self.reads.append(row)
        return self.inputs[row], self.labels[row]


class Records:
    """A source as a data source of TFDS is: of dictionaries, several at once."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"image": self.inputs[row], "label": int(self.labels[row]), "id": f"row {row}"}

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def linear(outputs=3, width=16):
    """A linear model of flattened inputs."""
    return Functions(
        lambda key: {"w": 0.1 * jax.random.normal(key, (width, outputs))},
        lambda params, x: x.reshape(x.shape[0], -1) @ params["w"],
    )


def trainer(**options):
    """A trainer of MAML on the linear model, of two tasks a step."""
    algorithm = MAML(linear(), optimizer=optax.sgd(0.1), inner_steps=options.pop("inner_steps", 1))
    engine = options.pop("engine", metalearn.Reverse())
    return Trainer(algorithm, engine, **{"tasks_per_step": 2, **options})


def differences(one, other):
    """The largest absolute difference of the leaves of two pytrees."""
    return max(
        float(jnp.abs(jnp.asarray(a, float) - jnp.asarray(b, float)).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
