"""Meta-Regularization: its rate solves the problem it comes from, and is differentiated exactly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from jax.test_util import check_grads

from metalearn import Forward, MixedFlow, Reverse, Unroll
from metalearn.algorithms import FDS, Hyperparameter
from metalearn.optimizers import meta_regularized
from metalearn.optimizers.meta_regularized import DIVERGENCES, lambert_w
from tests.helpers.tuning import KEY, network, problem

pytestmark = pytest.mark.usefixtures("x64")

PHI = {
    "adagrad_norm": lambda u: u + 1 / u - 2,
    "reverse_kl": lambda u: u - 1 - np.log(u),
    "kl": lambda u: u * np.log(u) - u + 1,
}
GRADS = {"w": np.array([[0.3, -1.2], [2.0, 0.1]]), "b": np.array([0.7, -0.4])}


def after(optimizer, steps):
    """The state and the last update, after some steps on the same gradient."""
    state = optimizer.init(GRADS)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state)
    return state, updates


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_each_step_solves_the_maxmin_problem(divergence, scale):
    squares = sum(float((g**2).sum()) for g in GRADS.values())
    inverse = 1 / 0.5
    optimizer = meta_regularized(0.5, scale, divergence)
    state = optimizer.init(GRADS)
    for _ in range(3):
        updates, state = optimizer.update(GRADS, state)

        def worth(log_u, last=inverse):  # after the minimum over x, a step of rate 1 / b
            u = np.exp(log_u)
            return -squares / (2 * u * last) - scale**2 / 2 * last * PHI[divergence](u)

        best = scipy.optimize.minimize_scalar(
            lambda v: -worth(v), bounds=(-3, 12), method="bounded", options={"xatol": 1e-10}
        )
        inverse *= np.exp(best.x)
        for name, grad in GRADS.items():
            np.testing.assert_allclose(updates[name], -grad / inverse, rtol=1e-5)
    np.testing.assert_allclose(state.decay, 0.5 * inverse, rtol=1e-5)


def test_the_first_divergence_is_adagrad_with_the_norm_of_the_gradient():
    squares = sum(float((g**2).sum()) for g in GRADS.values())
    _, updates = after(meta_regularized(0.2, 3.0), 4)
    rate = 1 / np.sqrt(1 / 0.2**2 + 4 * squares / 3.0**2)
    np.testing.assert_allclose(updates["w"], -rate * GRADS["w"], rtol=1e-12)


def test_lamberts_function_is_that_of_scipy_with_derivatives_of_every_order():
    x = np.concatenate([[0.0], np.logspace(-300, 300, 601)])
    ours, expected = lambert_w(jnp.asarray(x)), scipy.special.lambertw(x).real
    np.testing.assert_allclose(ours, expected, rtol=4e-16, atol=0)
    check_grads(lambert_w, (jnp.array([0.01, 1.0, 30.0]),), order=3)
    assert jax.grad(lambert_w)(0.0) == 1.0 and jax.grad(jax.grad(lambert_w))(0.0) == -2.0


def test_a_schedule_is_divided_by_what_the_rate_has_fallen_by():
    state, updates = after(meta_regularized(lambda step: 0.4 / (step + 1), 0.5), 3)
    decay = 1.0
    squares = sum(float((g**2).sum()) for g in GRADS.values())
    for step in range(3):
        first = 0.4 / (step + 1)
        decay *= np.sqrt(1 + squares * (first / (0.5 * decay)) ** 2)
    np.testing.assert_allclose(state.decay, decay, rtol=1e-12)
    np.testing.assert_allclose(updates["b"], -first / decay * GRADS["b"], rtol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_gradient_of_zeros_leaves_the_rate_and_has_finite_derivatives(divergence):
    def moved(numbers, grads):
        optimizer = meta_regularized(*numbers, divergence)
        updates, state = optimizer.update(grads, optimizer.init(grads))
        return sum(u.sum() for u in jax.tree.leaves(updates)) + state.decay

    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    value, (numbers, grads) = jax.value_and_grad(moved, (0, 1))((0.5, 1.0), zeros)
    assert value == 1.0 and numbers == (0.0, 0.0)
    assert all((g == -0.5).all() for g in grads.values())  # plain gradient descent


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_engines_agree_with_central_differences(divergence):
    """Of the first rate, of the scale and of the initialisation."""
    steps = 5
    inputs = jax.random.normal(KEY, (steps + 1, 8, 3))

    def losses(theta, x):
        return ((jnp.tanh(x @ theta) - jnp.sin(x.sum(1))) ** 2).mean()

    def step(eta, state, x, grad):
        theta, inner = state
        optimizer = meta_regularized(eta["rate"], eta["scale"], divergence)
        updates, inner = optimizer.update(grad(losses)(theta, x), inner)
        return optax.apply_updates(theta, updates), inner

    def init(eta):
        return eta["theta"], meta_regularized(eta["rate"]).init(eta["theta"])

    unroll = Unroll(init, step, lambda eta, state: (losses(state[0], inputs[-1]), {}))
    eta = {
        "rate": jnp.array(0.7),
        "scale": jnp.array(0.9),
        "theta": jnp.array([0.1, -0.2, 0.3]),
    }
    flat, unravel = jax.flatten_util.ravel_pytree(eta)

    def outer_loss(flat):
        state = unroll.init(unravel(flat))
        for x in inputs[:-1]:
            state = unroll.step(unravel(flat), state, x, jax.grad)
        return unroll.loss(unravel(flat), state)[0]

    moves = 1e-5 * jnp.eye(flat.size)
    expected = jnp.stack([outer_loss(flat + d) - outer_loss(flat - d) for d in moves]) / 2e-5
    assert jnp.abs(expected).min() > 1e-4
    for engine in (Reverse(), MixedFlow(), Forward()):
        grads = engine.value_and_grad(unroll, eta, inputs[:-1])[1]
        found = jax.flatten_util.ravel_pytree(grads)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fds_learns_its_numbers():
    numbers = {
        "learning_rate": Hyperparameter(0.01, 1.0, 0.1),
        "scale": Hyperparameter(0.1, 2.0, 1.0),
    }
    algorithm = FDS(network(), numbers, 6, 8, optimizer=meta_regularized)
    key, tasks = jax.random.key(0), problem().train
    episode = tasks.sample(key)
    unroll = algorithm.unroll(episode, key)
    batches = algorithm.batches(episode, key)
    grads = Reverse().value_and_grad(unroll, algorithm.init(key), batches)[1]
    assert all(np.isfinite(g).all() and (g != 0).all() for g in grads.values())


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match="No divergence is called 'reverse-kl'. Did you mean 'reverse_kl'"
    ):
        meta_regularized(0.1, divergence="reverse-kl")
    with pytest.raises(ValueError, match=re.escape("`meta_regularized(learning_rate=0.0)`: it is")):
        meta_regularized(0.0)
    with pytest.raises(ValueError, match=re.escape("`meta_regularized(scale=-1)`: it is a number")):
        meta_regularized(0.1, -1)


def test_gradients_in_bfloat16_are_summed_in_float32():
    grads = jnp.full(1, 0.5, jnp.bfloat16)
    optimizer = meta_regularized(0.1)
    state = jax.lax.fori_loop(
        0, 1000, lambda _, state: optimizer.update(grads, state)[1], optimizer.init(grads)
    )
    assert state.decay.dtype == jnp.float32
    np.testing.assert_allclose(state.decay, np.sqrt(1 + 1000 * (0.1 * 0.5) ** 2), rtol=1e-4)
