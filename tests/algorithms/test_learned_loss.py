"""ML3: what the inner loop descends is a network of predictions and targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import Masked, MixedFlow, Trainer
from metalearn.algorithms import LearnedLoss, cross_entropy
from metalearn.algorithms.learned_loss import learned_loss
from metalearn.datasets import Sinusoid
from metalearn.engines.inner_loop import rollout
from tests.cases import MODELS, TASKS, Float64, to_float64
from tests.helpers.refusals import refused

KEY = jax.random.key(2)


def network(layers, prediction, target):
    """The loss network on one number and its target, as one writes it by hand."""
    x = jnp.stack([prediction, target])
    for i, layer in enumerate(layers):
        x = (jnp.tanh(x) if i else x) @ layer["w"] + layer["b"]
    return jnp.log(1 + jnp.exp(x[0]))


def test_inner_steps_descend_the_loss_network_and_the_objective_judges_their_end(x64):
    algorithm = LearnedLoss(Float64(MODELS["Functions"]), inner_steps=2, hidden=(3,))
    eta = to_float64(algorithm.init(KEY))
    episode = to_float64(TASKS["Sinusoid"].sample(KEY))

    def outputs(theta, inputs):
        return jnp.tanh(inputs @ theta["body"]) @ theta["head"]

    def inner(theta):
        inputs, targets = episode.support
        pairs = zip(outputs(theta, inputs).ravel(), targets.ravel(), strict=True)
        return jnp.mean(jnp.stack([network(eta.layers, *pair) for pair in pairs]))

    @jax.jit
    def both():
        theta, _ = algorithm.model.init(KEY)
        for _ in range(2):
            theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, jax.grad(inner)(theta))
        inputs, targets = episode.query
        unroll, batches = algorithm.unroll(episode, KEY), algorithm.batches(episode, KEY)
        return rollout(unroll, eta, batches)[0], jnp.mean((outputs(theta, inputs) - targets) ** 2)

    np.testing.assert_allclose(*both(), rtol=1e-12)


@pytest.mark.slow
def test_labels_are_compared_by_probability_whatever_number_a_class_has():
    layers = LearnedLoss(MODELS["linen-MLP"], cross_entropy).init(KEY).layers
    logits = jax.random.normal(KEY, (4, 3))
    labels = jnp.array([0, 2, 1, 1])
    loss = learned_loss(layers, logits, labels)
    turned = learned_loss(layers, jnp.roll(logits, 1, -1), (labels + 1) % 3)
    np.testing.assert_allclose(loss, turned, rtol=1e-5)
    p, y = jax.nn.softmax(logits), jnp.eye(3)[labels]
    by_hand = jax.vmap(lambda p, y: network(layers, p, y))(p.ravel(), y.ravel())
    np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-5)
    padded = Masked(jnp.append(labels, 7), jnp.arange(5) < 4)
    more = jnp.concatenate([logits, logits[:1]])
    np.testing.assert_allclose(learned_loss(layers, more, padded), loss, rtol=1e-5)


def test_targets_of_another_shape_are_refused():
    layers = LearnedLoss(MODELS["linen-MLP"]).init(KEY).layers
    message = (
        "`LearnedLoss` compares each output with its target, but the outputs are [4, 1] and the "
        "targets [4]. Give them one shape, or integer labels [n] to logits [n, classes]."
    )
    with refused(message):
        learned_loss(layers, jnp.zeros((4, 1)), jnp.zeros(4))


@pytest.mark.slow
def test_a_learned_loss_learns():
    algorithm = LearnedLoss(MODELS["linen-MLP"], inner_steps=10, hidden=(16,))
    trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=8)
    tasks = Sinusoid(shots=10)
    state = trainer.init(KEY)
    before = trainer.evaluate(state.eta, tasks, KEY, 200)["loss"]
    state = trainer.fit(tasks, 300, state=state, progress=False)
    after = trainer.evaluate(trainer.learned(state), tasks, KEY, 200)["loss"]
    assert after.mean + after.ci95 < before.mean - before.ci95
