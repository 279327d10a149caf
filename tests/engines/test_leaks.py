"""No engine keeps a traced value beyond its trace: `jax.checking_leaks` has nothing to report."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import (
    ES,
    PES,
    ExampleMean,
    Forward,
    InverseVariance,
    MetaGradient,
    MixedFlow,
    Reverse,
    Trainer,
    Truncation,
    Unroll,
)
from metalearn.algorithms import (
    Gradient,
    Hyperparameter,
    LearnedOptimizer,
    PerParameter,
    PointwiseMLP,
    Quadratic,
    TunedRule,
)
from metalearn.datasets import Quadratics
from tests.helpers.selection import quick

ENGINES = [
    Reverse(),
    Reverse("step", peel=True),
    Reverse("segments"),
    Reverse("nested"),
    Forward(),
    MixedFlow(),
    MixedFlow("none"),
    MixedFlow("segments"),
    MixedFlow("nested"),
    MixedFlow("inexact_reconstruct", segment=2),
    MixedFlow(store="host"),
    MixedFlow(store="inexact_bfloat16"),
    MixedFlow(micro_batches=2),
    MixedFlow(store="host", micro_batches=2),
    ES(2),
    PES(2),
    InverseVariance(ES(2)),
]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, z: (z,))


def unroll_of(activation):
    """An inner loop whose loss closes over eta, a batch, and what was made of them."""

    def gradient(eta, theta, batch, grad):
        rate = jnp.exp(eta["rate"])

        def of_one(theta, x, _):
            return (activation(x * theta.sum() * rate) - batch[0]) ** 2 * eta["scale"]

        return grad(ExampleMean(of_one))(theta, batch, rate)

    def step(eta, theta, batch, grad):
        return theta - 0.01 * gradient(eta, theta, batch, grad)

    def undo(eta, theta, batch, grad):
        return theta + 0.01 * gradient(eta, theta, batch, grad)

    def loss(eta, theta):
        return (theta**2).sum(), {}

    return Unroll(lambda eta: eta["scale"] * jnp.ones(3), step, loss, undo)


# Tracing that checks for leaks is slow: the storage and rematerialisation of `MixedFlow` are.
PAIRS = quick(
    [(engine, activation) for engine in ENGINES for activation in (jnp.tanh, straight_through)],
    lambda engine, activation: (
        (engine, activation) == (MixedFlow(), straight_through)
        or (activation is jnp.tanh and not isinstance(engine, MixedFlow | InverseVariance))
    ),
)


def named(part):
    """Return a test id, the same in every process: an activation has its address in its text."""
    return str(part) if isinstance(part, MetaGradient) else type(part).__name__


@pytest.mark.parametrize(("engine", "activation"), PAIRS, ids=named)
def test_an_engine_keeps_nothing_of_a_trace(engine, activation):
    eta, unroll = {"rate": jnp.array(0.1), "scale": jnp.array(0.5)}, unroll_of(activation)
    state = engine.init(jax.random.key(0), unroll, eta)
    batches = jnp.linspace(0.0, 1.0, 12).reshape(3, 4)

    def run(eta):
        return engine.value_and_grad(unroll, eta, batches, state)[1]

    with jax.checking_leaks():
        grads = jax.eval_shape(jax.vmap(run), jax.tree.map(lambda x: x[None], eta))
    assert jax.tree.map(jnp.shape, grads) == {"rate": (1,), "scale": (1,)}


RATE = {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log")}
LEARNED = PerParameter((Gradient(),), PointwiseMLP(hidden=(2,)), step_scale=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "rule"),
    [
        (MixedFlow(), LEARNED),
        (MixedFlow(store="host"), TunedRule(optax.sgd, RATE)),
        (PES(), TunedRule(optax.sgd, RATE)),
    ],
    ids=["MixedFlow", "host", "PES"],
)
def test_truncated_learned_optimizers_keep_nothing_of_a_trace(engine, rule):
    learner = LearnedOptimizer(Quadratic(3), rule, inner_steps=4)
    options = {"tasks_per_step": 2, "truncation": Truncation(2)}
    trainer = Trainer(learner, engine, optax.sgd(0.1), **options)
    with jax.checking_leaks():
        state = trainer.init(jax.random.key(0), Quadratics(3))
        state, metrics = trainer.step(state, Quadratics(3))
    assert np.isfinite(metrics["loss"])
