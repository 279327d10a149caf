"""Prototypical networks and R2-D2 against their closed forms, written out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Episode, Masked, MixedFlow, Reverse, Trainer
from metalearn.algorithms import R2D2, ProtoNet
from metalearn.datasets import FewShot, UnequalFewShot
from metalearn.experiments import build
from metalearn.experiments.build import sections
from metalearn.models import Functions
from tests.cases import MODELS, TASKS, Float64, mlp, to_float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
WAYS, DIMENSIONS = 3, 4
EMBEDDING = Float64(mlp("linen", width=DIMENSIONS))
CLASSES = (ProtoNet, R2D2)
ENGINES = quick([Reverse(), MixedFlow()], lambda engine: engine == MixedFlow())


def points(classes=12, each=20, spread=1.0):
    """Classes of points in four dimensions."""
    centres = 2 * jax.random.normal(KEY, (classes, DIMENSIONS))
    noise = spread * jax.random.normal(KEY, (classes, each, DIMENSIONS))
    inputs = np.asarray((centres[:, None] + noise).reshape(-1, DIMENSIONS), np.float32)
    return inputs, np.repeat(np.arange(classes), each)


def tasks(shots=2, **options):
    return FewShot.from_arrays(*points(**options), ways=WAYS, shots=shots, queries=5)


def episode(shots=2):
    return to_float64(tasks(shots).sample(jax.random.key(1)))


def embedded(params, inputs):
    return EMBEDDING.apply(params, {}, inputs, train=True)[0]


def head(algorithm, eta, episode):
    return algorithm.unroll(episode, KEY).init(eta).params


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def meta_gradient(algorithm, eta, episode, engine):
    unroll = algorithm.unroll(episode, KEY)
    (loss, _), grads = jax.jit(
        lambda eta: engine.value_and_grad(unroll, eta, algorithm.batches(episode, KEY))
    )(eta)
    return loss, grads


def assert_close(ours, by_hand):
    assert jax.tree.structure(ours) == jax.tree.structure(by_hand)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_protonet_classifies_by_the_distance_to_the_mean_of_a_class(engine):
    def by_hand(params, episode):
        (inputs, labels), (queries, targets) = episode
        z = embedded(params, inputs)
        prototypes = jnp.stack([z[labels == k].mean(0) for k in range(WAYS)])
        difference = embedded(params, queries)[:, None] - prototypes[None]
        return cross_entropy(-(difference**2).sum(-1), targets)

    algorithm = ProtoNet(EMBEDDING, WAYS)
    eta = algorithm.init(KEY)
    value, grads = jax.value_and_grad(by_hand)(eta.params, episode())
    loss, ours = meta_gradient(algorithm, eta, episode(), engine)
    assert_close((loss, ours.params), (value, grads))


@pytest.mark.parametrize("shots", [1, 5])  # with five there are more examples than features
def test_r2d2_solves_the_normal_equations_in_both_forms(shots):
    algorithm = R2D2(EMBEDDING, WAYS, penalty=0.3, scale=2.0)
    eta, (inputs, labels) = algorithm.init(KEY), episode(shots).support
    x = jnp.concatenate([embedded(eta.params, inputs), jnp.ones((len(labels), 1))], 1)
    w = head(algorithm, eta, episode(shots))["weights"] / 2.0
    gradient = x.T @ (x @ w - jax.nn.one_hot(labels, WAYS)) + 0.3 * w
    assert w.shape == (DIMENSIONS + 1, WAYS) and abs(w).max() > 0.1
    np.testing.assert_allclose(gradient, jnp.zeros_like(w), atol=1e-6)  # log(0.3) in float32


def test_r2d2_reproduces_the_support_labels_as_the_penalty_vanishes():
    algorithm = R2D2(EMBEDDING, WAYS, penalty=1e-7, scale=1.0)
    eta, (inputs, labels) = algorithm.init(KEY), episode(1).support
    learner = algorithm.adapt(eta, (inputs, labels), KEY)
    np.testing.assert_allclose(learner.predict(inputs), jax.nn.one_hot(labels, WAYS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_r2d2_learns_penalty_and_scale_with_the_embedding(engine):
    def by_hand(eta, episode):
        (inputs, labels), (queries, targets) = episode
        features = [
            jnp.concatenate([embedded(eta.params, x), jnp.ones((len(x), 1))], 1)
            for x in (inputs, queries)
        ]
        gram = features[0].T @ features[0] + jnp.exp(eta.log_penalty) * jnp.eye(DIMENSIONS + 1)
        w = jnp.linalg.inv(gram) @ features[0].T @ jax.nn.one_hot(labels, WAYS)
        return cross_entropy(jnp.exp(eta.log_scale) * features[1] @ w, targets)

    algorithm = R2D2(EMBEDDING, WAYS)
    eta = algorithm.init(KEY)
    value, grads = jax.value_and_grad(by_hand)(eta, episode(1))
    loss, ours = meta_gradient(algorithm, eta, episode(1), engine)
    assert_close((loss, ours), (value, grads))
    assert all(abs(g) > 1e-4 for g in (ours.log_penalty, ours.log_scale))


@pytest.mark.slow
@pytest.mark.parametrize("build_", CLASSES)
def test_padding_and_classes_without_examples_change_nothing(build_):
    algorithm = build_(EMBEDDING, WAYS + 1)
    eta, (support, query) = algorithm.init(KEY), episode()

    def padded(inputs, labels):
        mask = jnp.arange(len(labels) + 4) < len(labels)
        return jnp.concatenate([inputs, inputs[:4]]), Masked(jnp.pad(labels, (0, 4)), mask)

    plain = meta_gradient(algorithm, eta, Episode(support, query), Reverse())
    both = Episode(padded(*support), padded(*query))
    assert_close(meta_gradient(algorithm, eta, both, Reverse()), plain)
    assert_close(
        meta_gradient(build_(EMBEDDING, WAYS), eta, Episode(support, query), Reverse()), plain
    )
    learner = algorithm.adapt(eta, padded(*support), KEY)
    probabilities = jax.nn.softmax(learner.predict(query[0]))
    assert (probabilities[:, WAYS] == 0).all() and jnp.isfinite(probabilities).all()


@pytest.mark.slow
@pytest.mark.parametrize("build_", CLASSES)
def test_a_learner_predicts_what_an_evaluation_judges(build_):
    algorithm = build_(EMBEDDING, WAYS)
    trainer, data = Trainer(algorithm, tasks_per_step=4), tasks()
    eta = algorithm.init(KEY)
    key = jax.random.split(KEY, 1)[0]
    support, query = data.sample(jax.random.split(key, 4)[0])
    learner = algorithm.adapt(eta, support, key)
    assert learner.steps == 0
    accuracy = (learner.predict(query[0]).argmax(1) == query[1]).mean()
    judged = trainer.evaluate(eta, data, KEY, 1)["accuracy"].mean
    np.testing.assert_allclose(accuracy, judged, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("build_", CLASSES)
def test_it_learns_to_tell_new_classes_apart(build_):
    algorithm = build_(EMBEDDING, WAYS)
    trainer = Trainer(algorithm, optimizer=optax.adam(1e-2), tasks_per_step=4)
    train, new = tasks(spread=0.7), tasks(classes=13, spread=0.7)
    state = trainer.fit(train, 60, key=KEY, progress=False)
    before = trainer.evaluate(algorithm.init(KEY), new, KEY, 100)["loss"].mean
    after = trainer.evaluate(trainer.learned(state), new, KEY, 100)
    assert after["loss"].mean < 0.8 * before and after["accuracy"].mean > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("build_", CLASSES)
def test_tasks_of_unequal_size_are_trained_on(build_):
    data = UnequalFewShot.create(tasks(), fewest_ways=2, fewest_shots=1)
    trainer = Trainer(build_(EMBEDDING, WAYS), optimizer=optax.adam(1e-2), tasks_per_step=4)
    state = trainer.fit(data, 30, key=KEY, progress=False)
    before = trainer.evaluate(trainer.init(KEY).eta, data, KEY, 100)["loss"].mean
    assert trainer.evaluate(state.eta, data, KEY, 100)["loss"].mean < before


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["transductive", "running"])
def test_queries_are_normalised_as_the_policy_says(policy):
    algorithm = ProtoNet(Float64(MODELS["linen-ConvNet"]), 2, batch_norm=policy)
    eta, (support, query) = algorithm.init(KEY), to_float64(TASKS["FewShot"].sample(KEY))
    learner = algorithm.adapt(eta, support, KEY)
    alone, together = learner.predict(query[0][:1]), learner.predict(query[0])[:1]
    assert np.allclose(alone, together, rtol=1e-9) == (policy == "running")
    assert "for the support set" in algorithm.model_mode()


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProtoNet(EMBEDDING, 1), "`ProtoNet(ways=1)`: it is an integer, 2 or more."),
        (lambda: R2D2(EMBEDDING, 2.0), "`R2D2(ways=2.0)`: it is an integer, 2 or more."),
        (lambda: R2D2(EMBEDDING, 2, penalty=0.0), "`R2D2(penalty=0.0)`: it is a number above 0."),
        (lambda: R2D2(EMBEDDING, 2, scale=-1.0), "`R2D2(scale=-1.0)`: it is a number above 0."),
        (
            lambda: ProtoNet(EMBEDDING, 2, batch_norm="moving"),
            "No batch-normalisation policy is called 'moving'. "
            "There are: frozen, running, transductive.",
        ),
        (
            lambda: ProtoNet(EMBEDDING, 2).with_steps(3),
            "`ProtoNet.adapt(steps=3)`: ProtoNet adapts in closed form, without inner steps. "
            "Leave `steps`.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("build_", CLASSES)
def test_labels_beyond_the_ways_are_refused(build_):
    algorithm = build_(EMBEDDING, 2)
    message = "^The labels go from 0 to 2, but the network has 2 outputs"
    with pytest.raises(ValueError, match=message):
        Trainer(algorithm, tasks_per_step=2).fit(tasks(), 1, key=KEY, progress=False)
    with pytest.raises(ValueError, match=message):
        algorithm.adapt(algorithm.init(KEY), episode().support, KEY)


# Configs.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("protonet", ProtoNet), ("r2d2", R2D2)],
)
def test_a_config_names_it_and_its_network_has_no_head(name, kind):
    digits = {"name": "digits", "rotations": True, "ways": 3, "shots": 1, "queries": 2}
    splits = build.splits({**digits, "eval_queries": 2})
    network = {"name": "conv_net", "library": "linen", "filters": 6, "blocks": 2}
    sized = build.sized_for({"name": name}, splits)
    model = build.model(network, sized)
    made = build.algorithm({"name": name, "batch_norm": "running"}, model, outputs=splits.outputs)
    assert isinstance(made, kind) and made.ways == 3 and made.batch_norm == "running"
    assert "head" not in made.init(KEY).params
    takes = sections.keys_of("algorithm", name)
    assert "ways" not in takes and "model" not in takes and "batch_norm" in takes


@pytest.mark.slow
def test_a_network_without_an_embedding_is_refused():
    splits = build.Splits(None, None, None, jax.ShapeDtypeStruct((1, 8), jnp.int32), None)
    message = "ends in logits of tokens, and this algorithm puts a head of its own on an embedding"
    network = {"name": "transformer", "library": "linen", "layers": 1, "width": 8, "heads": 1}
    with pytest.raises(ValueError, match=message):
        build.model(network, splits)


def identity(dtype=jnp.float32):
    """An embedding x w, with w = 1, of a dtype."""
    return Functions(
        lambda key: {"w": jnp.eye(DIMENSIONS, dtype=dtype)}, lambda params, x: x @ params["w"]
    )


def test_distances_far_from_zero_are_not_rounded_away():
    inputs = jnp.float32(10_000) + jnp.eye(2, DIMENSIONS, dtype=jnp.float32)
    algorithm = ProtoNet(identity(), 2)
    learner = algorithm.adapt(algorithm.init(KEY), (inputs, jnp.array([0, 1])), KEY)
    np.testing.assert_allclose(learner.predict(inputs), [[0, -2], [-2, 0]], atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_embedding_in_bfloat16_has_a_head_in_float32(kind):
    support = jnp.asarray(points(classes=3, each=4)[0], jnp.bfloat16), jnp.arange(3).repeat(4)
    algorithm = kind(identity(jnp.bfloat16), 3)
    learner = algorithm.adapt(algorithm.init(KEY), support, KEY)
    outputs = learner.predict(support[0])
    assert outputs.dtype == jnp.float32
    precise = kind(identity(), 3)
    expected = precise.adapt(
        precise.init(KEY), (support[0].astype(jnp.float32), support[1]), KEY
    ).predict(support[0].astype(jnp.float32))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
