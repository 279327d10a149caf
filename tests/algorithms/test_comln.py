"""COMLN: the head follows a gradient flow, for a learned time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import softmax

from metalearn import SAMA, Implicit, Trainer, Truncated
from metalearn.algorithms import COMLN
from metalearn.datasets import FewShot
from metalearn.engines.inner_loop import rollout
from metalearn.models import Functions
from tests.cases import Float64, to_float64

KEY = jax.random.key(4)


def embedding():
    """A tanh layer from 4 numbers to 5."""
    return Functions(
        lambda key: {"w": jax.random.normal(key, (4, 5))}, lambda p, x: jnp.tanh(x @ p["w"])
    )


@functools.cache  # the data are float32, whatever precision a test has
def tasks():
    draw = np.random.default_rng(0)
    points = 2 * draw.normal(size=(10, 1, 4)) + draw.normal(size=(10, 12, 4))
    points = points.reshape(-1, 4).astype(np.float32)
    return FewShot.from_arrays(points, np.arange(10).repeat(12), ways=3, shots=2, queries=4)


def ended(algorithm, eta, episode):
    """Return (outer loss, metrics, W at the end of the flow)."""

    @jax.jit
    def run(eta, episode):
        batches = algorithm.batches(episode, KEY)
        loss, aux = rollout(algorithm.unroll(episode, KEY), eta, batches)
        return loss, aux.metrics, aux.state.params

    return run(eta, episode)


def test_the_head_is_the_solution_of_the_flow_to_fourth_order_in_the_step(x64):
    algorithm = COMLN(Float64(embedding()), 3, time=3.0, features=5)
    eta, episode = to_float64(algorithm.init(KEY)), to_float64(tasks().sample(KEY))
    inputs, labels = map(np.asarray, episode.support)
    x = np.tanh(inputs @ np.asarray(eta.params["w"]))

    def slope(t, head):
        p = softmax(x @ head.reshape(5, 3), axis=-1)
        return -(x.T @ (p - np.eye(3)[labels]) / len(x)).ravel()

    solved = solve_ivp(slope, (0, 3), np.asarray(eta.head).ravel(), rtol=1e-11, atol=1e-12)
    exact = solved.y[:, -1].reshape(5, 3)
    errors = []
    for steps in (4, 8):
        _, metrics, head = ended(algorithm.with_steps(steps), eta, episode)
        errors.append(np.linalg.norm(head - exact))
    assert errors[0] < 1e-3 * np.linalg.norm(exact)
    assert 12 < errors[0] / errors[1] < 20  # halving the step divides the error by 16
    curvature = np.linalg.norm(x, 2) ** 2 / len(x) / 2  # of the loss in W, at most
    assert metrics["flow_step"] >= 3.0 / 8 * curvature
    np.testing.assert_allclose(metrics["flow_time"], 3.0, rtol=1e-6)


def test_a_head_of_another_size_is_refused():
    algorithm = COMLN(embedding(), 3, features=4)
    message = (
        "`COMLN(features=4)` learns the head of embeddings of that size, but those of this network "
        "have 5 numbers. Set features=5, or None for a head that begins at zero."
    )
    episode = tasks().sample(KEY)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ended(algorithm, algorithm.init(KEY), episode)


@pytest.mark.parametrize("engine", [Truncated(3), Implicit(variables="params"), SAMA()], ids=str)
def test_engines_that_do_not_see_the_embeddings_of_the_support_set_are_refused(engine):
    algorithm = COMLN(embedding(), 3)
    message = (
        "'embeddings' of the inner state is computed by `Unroll.init` from params/w of eta, no "
        "step changes it, and it is read afterwards: what of the derivative goes through it would "
        "be lost. That needs the whole loop: `MixedFlow()` or `Reverse()`."
    )
    gradient = Trainer(algorithm, engine).task_gradient
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(gradient, algorithm.init(KEY), tasks(), KEY)


@pytest.mark.slow
def test_the_time_is_learned_and_helps():
    algorithm = COMLN(embedding(), 3, time=0.05)
    trainer = Trainer(algorithm, tasks_per_step=8)
    state = trainer.init(KEY)
    before = trainer.evaluate(state.eta, tasks(), KEY, 200)["loss"]
    state = trainer.fit(tasks(), 300, state=state, progress=False)
    eta = trainer.learned(state)
    after = trainer.evaluate(eta, tasks(), KEY, 200)["loss"]
    assert after.mean + after.ci95 < before.mean - before.ci95
    assert jnp.exp(eta.log_time) > 0.05
    finer = dataclasses.replace(trainer, algorithm=dataclasses.replace(algorithm, eval_steps=40))
    same = finer.evaluate(eta, tasks(), KEY, 200)["loss"]
    np.testing.assert_allclose(same.mean, after.mean, rtol=1e-3)  # the same time in more steps


def test_a_learned_head_of_another_number_of_classes_is_refused():
    algorithm = COMLN(embedding(), 5, features=5)
    eta, other = algorithm.init(KEY), dataclasses.replace(algorithm, ways=3)
    message = r"^`COMLN\(ways=3\)` got a learned head of 5 classes. Take that many, or train with "
    with pytest.raises(ValueError, match=message):
        ended(other, eta, tasks().sample(KEY))
