"""Complex parameters in an inner state: gradients, norms, and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import (
    ES,
    PES,
    Algorithm,
    ExampleMean,
    Forward,
    InverseVariance,
    MixedFlow,
    Reverse,
    Trainer,
    Truncation,
    Unroll,
)
from metalearn.datasets import Sinusoid
from metalearn.optimizers import reversible
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
T, N = 4, 6


def start():
    return {"a": jnp.array([[0.3 + 0.2j, -0.1], [0.2, 0.5 - 0.3j]]), "b": jnp.array([0.3, 0.2])}


def example_loss(params, example, eta):
    x, y = example
    spectrum = x @ params["a"] * jnp.exp(1j * eta["phase"])
    outputs = (abs(spectrum) ** 2).sum() + (spectrum * params["b"]).imag.sum()
    return (jnp.tanh(outputs) - y) ** 2 * jnp.exp(eta["scale"]), spectrum


def unroll_of(optimizer):
    def init(eta):
        params = jax.tree.map(lambda p: p * eta["start"], start())
        return params, optimizer.init(params), jnp.zeros((), complex)

    def step(eta, state, batch, grad):
        params, moments, total = state
        grads, spectrum = grad(ExampleMean(example_loss), has_aux=True)(params, batch, eta)
        grads = jax.tree.map(jnp.conj, grads)  # a descent direction, by JAX's convention
        updates, moments = optimizer.update(grads, moments, params)
        params = jax.tree.map(lambda p, u: p + jnp.exp(eta["rate"]) * u, params, updates)
        return params, moments, total + spectrum.mean()

    def loss(eta, state):
        params, _, total = state
        return (abs(params["a"] - 1j) ** 2).sum() + params["b"].sum() + (total**2).imag, {}

    return Unroll(init, step, loss)


def eta_and_batches():
    eta = {"phase": 0.3, "scale": 0.1, "rate": -2.0, "start": 1.1}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, N, 2)) + 1j * rng.standard_normal((T, N, 2))
    return jax.tree.map(jnp.asarray, eta), (jnp.asarray(x), jnp.asarray(x.real.sum(-1)))


@functools.cache
def by_hand(optimizer):
    unroll, (eta, batches) = unroll_of(OPTIMIZERS[optimizer]), eta_and_batches()

    @jax.jit
    @jax.grad
    def outer(eta):
        state = unroll.init(eta)
        for t in range(T):
            batch = jax.tree.map(lambda x: x[t], batches)  # noqa: B023
            state = unroll.step(eta, state, batch, jax.grad)
        return unroll.loss(eta, state)[0]

    return outer(eta)


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),  # complex buffers
    "adam": optax.adam(0.1, eps_root=1e-4),
}
ENGINES = [
    Reverse(),
    Reverse("step", peel=True),
    Forward(),
    Forward(chunk=2),
    MixedFlow(),
    MixedFlow("none"),
    MixedFlow("nested", peel=False),
    MixedFlow(store="host", micro_batches=2),
]


PAIRS = quick(
    [(optimizer, engine) for optimizer in OPTIMIZERS for engine in ENGINES],
    lambda optimizer, engine: (
        optimizer == "momentum"
        and engine in (Forward(), MixedFlow(), MixedFlow(store="host", micro_batches=2))
    ),
)


@pytest.mark.parametrize(("optimizer", "engine"), PAIRS, ids=str)
def test_complex_parameters_have_the_derivative_of_a_loop_by_hand(optimizer, engine):
    unroll, (eta, batches) = unroll_of(OPTIMIZERS[optimizer]), eta_and_batches()
    expected = by_hand(optimizer)
    (_, aux), grads = jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches))(eta)
    ours, theirs = (ravel_pytree(tree)[0] for tree in (grads, expected))
    assert (abs(theirs) > 1e-6).all()
    assert jnp.linalg.norm(ours - theirs) < 1e-12 * jnp.linalg.norm(theirs)
    assert aux.inner.update_norm.dtype == aux.inner.tangent_norm.dtype == jnp.float64


def test_norms_of_complex_changes_and_tangents_are_those_of_their_parts():
    def step(eta, z, batch, grad):
        return z - eta * jnp.conj(grad(lambda z: (abs(z - 1j) ** 2).sum())(z))

    unroll = Unroll(
        lambda eta: jnp.array([1 + 2j, 3 - 4j]), step, lambda eta, z: (z.real.sum(), {})
    )
    (_, aux), _ = Forward().value_and_grad(unroll, jnp.array(0.25), jnp.arange(1))
    slope = 2 * (np.array([1 + 2j, 3 - 4j]) - 1j)
    np.testing.assert_allclose(aux.inner.update_norm, [[0.25 * np.linalg.norm(slope)]])
    np.testing.assert_allclose(aux.inner.tangent_norm, [[np.linalg.norm(slope)]])


def test_an_infinite_complex_gradient_is_seen():
    def step(eta, z, batch, grad):
        return z - 0 * grad(lambda z: jnp.sqrt((abs(z) ** 2).sum()) * eta)(z)

    unroll = Unroll(lambda eta: jnp.zeros(2, complex), step, lambda eta, z: (eta, {}))
    (_, aux), _ = Reverse().value_and_grad(unroll, jnp.array(1.0), jnp.arange(1))
    assert aux.inner.finite.tolist() == [[False]]


def test_a_reversible_adam_undoes_a_complex_step():
    adam = reversible.adam(0.1, eps_root=1e-8)
    params = {"z": jnp.array([0.3 + 1j, -2.0])}
    state, grads = adam.init(params), {"z": jnp.array([1.0 - 2j, 0.5j])}
    for _ in range(2):
        before = state
        _, state = adam.update(grads, state)
    undone = adam.before(state, grads)
    np.testing.assert_allclose(undone.mu["z"], before.mu["z"], rtol=1e-12)
    np.testing.assert_allclose(undone.nu["z"], before.nu["z"], rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class Spectral(Algorithm):
    """Learn how a complex filter is trained on a wave."""

    def init(self, key):
        return {"phase": jnp.array(0.3), "scale": jnp.array(0.1), "rate": jnp.array(-2.0)}

    def batches(self, episode, key):
        return jnp.arange(T)

    def unroll(self, episode, key):
        inner = unroll_of(OPTIMIZERS["adam"])
        x, y = episode.support
        batch = jnp.concatenate([x + 1j, 1j * x], 1), y[:, 0]

        def step(eta, state, _, grad):
            return inner.step(eta, state, batch, grad)

        def loss(eta, state):
            return inner.loss(eta, state)[0], {"first": abs(state[0]["a"][0, 0])}

        return Unroll(lambda eta: inner.init({**eta, "start": jnp.array(1.0)}), step, loss)


@pytest.mark.parametrize(
    "engine",
    quick(
        [
            Reverse("step"),
            Forward(),
            MixedFlow(),
            MixedFlow(store="host"),
            ES(2),
            InverseVariance(),
        ],
        lambda engine: engine == ES(2),
    ),
    ids=repr,
)
@pytest.mark.slow
def test_a_run_with_complex_inner_parameters_trains(engine):
    trainer = Trainer(Spectral(), engine, optax.adam(0.1), tasks_per_step=2)
    start = trainer.init(jax.random.key(0))
    state = trainer.fit(Sinusoid(), 2, key=jax.random.key(0), progress=False)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(state.eta))
    assert state.eta["rate"] != start.eta["rate"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [MixedFlow(), PES()], ids=repr)
def test_truncated_runs_carry_complex_states(engine):
    cut = Trainer(Spectral(), engine, tasks_per_step=2, truncation=Truncation(2))
    state = cut.fit(Sinusoid(), 3, key=jax.random.key(0), progress=False)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(state.eta))


@pytest.mark.slow
def test_health_looks_at_complex_parameters_too():
    trainer = Trainer(Spectral(), MixedFlow(), tasks_per_step=1)
    report = trainer.check_health(trainer.init(jax.random.key(0)), Sinusoid())
    assert report.healthy


def test_a_complex_eta_is_refused_by_its_path():
    unroll = unroll_of(OPTIMIZERS["adam"])
    eta, batches = eta_and_batches()
    with pytest.raises(TypeError, match=r"`eta\['phase'\]` has dtype complex128, and a meta-grad"):
        MixedFlow().value_and_grad(unroll, {**eta, "phase": jnp.array(1j)}, batches)
