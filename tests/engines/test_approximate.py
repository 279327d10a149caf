"""Hypergradients of a fixed point, and of the last steps: against closed forms and exact engines."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import SAMA, Implicit, MixedFlow, Reverse, Truncated, Unroll
from metalearn.engines import ApproximationWarning
from metalearn.engines.approximate import solvers

pytestmark = pytest.mark.usefixtures("x64")
SOLVERS = sorted(solvers.SOLVERS)
RANDOM = np.random.default_rng(0)


def gradient_of(engine, unroll, eta, batches):
    """(meta-gradient, aux) of a compiled call."""
    (_, aux), grads = jax.jit(engine.value_and_grad, static_argnums=0)(unroll, eta, batches)
    return grads, aux


def error(grads, expected):
    grads, expected = ravel_pytree(grads)[0], ravel_pytree(expected)[0]
    return float(jnp.linalg.norm(grads - expected) / jnp.linalg.norm(expected))


def descent(loss, outer, theta_0, rule=None):
    """An unroll of an optax optimizer (sgd by default) on loss(eta, theta, batch)."""
    rule = optax.sgd(0.2) if rule is None else rule

    def step(eta, state, batch, grad):
        theta, memory = state
        grads = grad(lambda theta: loss(eta, theta, batch))(theta)
        updates, memory = rule.update(grads, memory, theta)
        return optax.apply_updates(theta, updates), memory

    def judge(eta, state):
        return outer(eta, state[0]), {}

    return Unroll(lambda eta: (theta_0, rule.init(theta_0)), step, judge)


# A quadratic, whose fixed point is H^-1 (B eta), and a ridge regression with a learned penalty.

ROTATION = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
HESSIAN = ROTATION @ np.diag([0.5, 0.7, 1.0, 1.5, 2.0, 3.0]) @ ROTATION.T
MIX = RANDOM.normal(size=(6, 4))
TARGET = RANDOM.normal(size=6)
X, Y, X_VAL, Y_VAL = (RANDOM.normal(size=s) for s in ((20, 6), 20, (15, 6), 15))


def quadratic_loss(eta, theta, batch):
    flat = jnp.concatenate([theta["a"], theta["b"].ravel()])
    return flat @ HESSIAN @ flat / 2 - flat @ (MIX @ eta)


def quadratic_outer(eta, theta):
    flat = jnp.concatenate([theta["a"], theta["b"].ravel()])
    return jnp.sum((flat - TARGET) ** 2) / 2 + jnp.sum(eta**3)


def quadratic(rule=None, scale=1.0):
    theta_0 = {"a": scale * jnp.ones(2), "b": jnp.zeros((2, 2))}
    unroll = descent(quadratic_loss, quadratic_outer, theta_0, rule)
    eta = jnp.arange(1.0, 5.0) / 4
    star = np.linalg.solve(HESSIAN, MIX @ eta)
    return unroll, eta, MIX.T @ np.linalg.solve(HESSIAN, star - TARGET) + 3 * eta**2


def ridge():
    def loss(eta, theta, batch):
        penalty = jnp.sum(jnp.exp(eta["penalty"]) * theta**2)
        return jnp.mean((X @ theta - eta["scale"] * Y) ** 2) + penalty

    def outer(eta, theta):
        return jnp.mean((X_VAL @ theta - Y_VAL) ** 2)

    def closed(eta):
        gram = X.T @ X / 20 + jnp.diag(jnp.exp(eta["penalty"]))
        return outer(eta, jnp.linalg.solve(gram, X.T @ Y * eta["scale"] / 20))

    eta = {"penalty": jnp.linspace(-2.0, 0.0, 6), "scale": jnp.float64(1.3)}
    return descent(loss, outer, jnp.zeros(6)), eta, jax.grad(closed)(eta)


PROBLEMS = {"quadratic": quadratic, "ridge": ridge}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_at_a_fixed_point_every_solver_gives_the_closed_form(problem, solver):
    unroll, eta, expected = PROBLEMS[problem]()
    engine = Implicit(solver, iterations=400, tolerance=1e-12, rank=3)
    grads, aux = gradient_of(engine, unroll, eta, jnp.arange(400))
    assert error(grads, expected) < 1e-8
    assert aux.metrics["fixed_point_residual"] < 1e-12
    assert aux.metrics["solver_residual"] < 1e-10
    assert aux.inner.losses.shape == (400, 1)
