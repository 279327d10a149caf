"""An update rule of each kind, and numbers to give it."""

import functools

import jax
import optax
from jax.flatten_util import ravel_pytree

from metalearn.algorithms import (
    HypergradientRule,
    Hyperparameter,
    MirrorDescent,
    ParameterScale,
    PerParameter,
    PointwiseGRU,
    PointwiseMLP,
    ReciprocalRoot,
    TunedRule,
    UpdateRule,
)

LEARNED = {
    "learning_rate": Hyperparameter(1e-5, 1.0, 0.02, space="log"),
    "b1": Hyperparameter(0.0, 1.0, 0.8, space="logit"),
    "weight_decay": Hyperparameter(0.0, 1.0, 0.01),
}
ADAMW = TunedRule(functools.partial(optax.adamw, b2=0.95), LEARNED)
SMALL = {"network": PointwiseMLP((3,)), "step_scale": 0.1, "magnitude_scale": 0.1}
RULES: dict[str, UpdateRule] = {
    "TunedRule": ADAMW,
    "per tensor": HypergradientRule(rate=0.1, hyper_rate=0.3, momentum=0.5),
    "global": HypergradientRule(rate=0.1, hyper_rate=0.3, momentum=0.5, rates="global"),
    "mirror": MirrorDescent(rate=0.1, beta=0.5, momentum=0.5),
    "PerParameter": PerParameter(**SMALL),
    "PerParameter-base": PerParameter(
        **SMALL | {"network": PointwiseGRU(2)},
        base=ADAMW,
        factors=(ParameterScale(), ReciprocalRoot(0.9)),
    ),
}


def draw(shapes, key=0, dtype=float):
    keys = jax.random.split(jax.random.key(key), len(shapes))
    drawn = [
        jax.random.normal(k, shape).astype(dtype)
        for k, shape in zip(keys, shapes.values(), strict=True)
    ]
    return dict(zip(shapes, drawn, strict=True))


def generic(rule, key=0):
    """An eta none of whose leaves is zero."""
    flat, unravel = ravel_pytree(rule.init(jax.random.key(key)))
    return unravel(flat + 0.2 * jax.random.normal(jax.random.key(key + 1), flat.shape))
