"""Tasks of unequal size in one batch: what a mask leaves out, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Episode, Forward, Masked, MixedFlow, Reverse, Trainer
from metalearn.algorithms import (
    FDS,
    MAML,
    Hyperparameter,
    LearningRates,
    LossWeights,
    ProtoNet,
    Reptile,
    TokenWeights,
    cross_entropy,
    mean_one,
    squared_error,
    weighted_cross_entropy,
)
from metalearn.datasets import FewShot, GivenTasks, HostFewShot, Sinusoid, UnequalFewShot
from metalearn.datasets.text import Windows
from tests.helpers.checkpoints import bits
from tests.helpers.few_shot_data import differences, images, linear
from tests.helpers.selection import quick

KEY = jax.random.key(0)
MASK = np.array([True, False, True, True, False])


def targets_of(objective):
    rng = np.random.default_rng(0)
    if objective is squared_error:
        return rng.normal(size=(5, 3)), np.full((5, 3), 1e9)
    return rng.integers(0, 3, 5), np.full(5, 999)


@pytest.mark.parametrize("objective", [cross_entropy, squared_error, weighted_cross_entropy])
@pytest.mark.slow
def test_an_objective_is_the_mean_over_the_examples_that_count(objective, x64):
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    targets, nonsense = targets_of(objective)
    mask = MASK.reshape(5, *[1] * (targets.ndim - 1))
    masked = Masked(jnp.asarray(np.where(mask, targets, nonsense)), jnp.asarray(MASK))

    def loss(outputs, targets):
        return objective(outputs, targets)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(outputs, masked)
    expected = jax.value_and_grad(loss, has_aux=True)(outputs[MASK], jnp.asarray(targets[MASK]))
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-12)
    assert jax.tree.map(float, metrics) == jax.tree.map(float, expected[0][1])
    np.testing.assert_allclose(grads[MASK], expected[1], rtol=1e-12)
    assert (grads[~MASK] == 0).all()
    none = objective(outputs, masked._replace(mask=jnp.zeros(5, bool)))[0]
    assert none == 0


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a mask \[4\] beside targets or losses \[5\], but it"):
        cross_entropy(jnp.zeros((5, 3)), Masked(jnp.zeros(5, jnp.int32), jnp.ones(4, bool)))


def unequal_episodes():
    """A 2-way 1-shot and a 3-way 3-shot task, in float64."""
    rng = np.random.default_rng(0)

    def part(ways, each):
        return rng.normal(size=(ways * each, 16)), np.repeat(np.arange(ways), each)

    return [Episode(part(2, 1), part(2, 4)), Episode(part(3, 3), part(3, 2))]


@pytest.mark.parametrize(
    "engine",
    quick([Reverse(), MixedFlow(), Forward()], lambda engine: engine == Reverse()),
    ids=["reverse", "mixed flow", "forward"],
)
def test_a_padded_batch_has_the_mean_of_the_meta_gradients_of_its_tasks(engine, x64):
    trainer = Trainer(MAML(linear(), inner_steps=2), engine, optax.sgd(1.0), tasks_per_step=2)
    state = trainer.init(KEY)
    episodes = unequal_episodes()

    def change(tasks, trainer=trainer):
        after, _ = trainer.step(state, trainer.fetch(tasks, state))
        return jax.tree.map(jnp.subtract, after.eta, state.eta)

    alone = Trainer(trainer.algorithm, engine, optax.sgd(1.0), tasks_per_step=1)
    each = [change(GivenTasks.create([episode]), alone) for episode in episodes]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    padded = change(GivenTasks.create(episodes, pad=True))
    assert differences(padded, mean) < 1e-12 < differences(padded, each[0])


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True])
def test_few_shot_tasks_of_several_sizes_are_drawn_in_one_shape(host):
    make = HostFewShot.create if host else FewShot.from_arrays
    largest = make(*images(), ways=4, shots=3, queries=2)
    tasks = UnequalFewShot.create(largest, fewest_ways=2, fewest_shots=1)
    keys = jax.random.split(KEY, 60)
    device = tasks.fetch(keys, 0) if host else tasks
    support, query = jax.vmap(device.sample)(keys)
    masks = np.asarray(support[1].mask).reshape(60, 4, 3)
    ways, shots = masks.any(2).sum(1), masks.sum(2).max(1)
    assert set(ways) == {2, 3, 4} and set(shots) == {1, 2, 3}
    assert (masks.sum((1, 2)) == ways * shots).all()
    assert (np.asarray(query[1].mask).sum(1) == 2 * ways).all()
    episodes = jax.vmap(largest.fetch(keys, 0).sample if host else largest.sample)(keys)
    counted = np.asarray(support[1].mask)
    assert (np.asarray(support[0])[counted] == np.asarray(episodes.support[0])[counted]).all()
    for inputs, mask, labels in zip(support[0], counted, support[1].values, strict=True):
        real = {x.tobytes() for x in np.asarray(inputs)[mask]}
        assert {x.tobytes() for x in np.asarray(inputs)} == real  # padding is of the same task
        assert set(np.asarray(labels)) == set(np.asarray(labels)[mask])
    assert tasks.label_range() == (0, 3) and tasks.needs_fetch == host
    one = jax.tree.map(lambda leaf: leaf[0], Episode(support, query))
    assert bits(tasks.sample(keys[0])) == bits(one)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fewest_ways": 5}, r"`UnequalFewShot\(fewest_ways=5\)`: it is from 1 to 4, the ways of"),
        ({"fewest_shots": 0}, r"`UnequalFewShot\(fewest_shots=0\)`: it is from 1 to 3, the shots"),
        ({"fewest_shots": 1.0}, r"`UnequalFewShot\(fewest_shots=1.0\)`: it is an integer"),
        ({"tasks": Sinusoid()}, "takes tasks of `FewShot` or `HostFewShot`, .* not a Sinusoid"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    tasks = FewShot.from_arrays(*images(), ways=4, shots=3, queries=2)
    with pytest.raises((ValueError, TypeError), match=message):
        UnequalFewShot.create(**{"tasks": tasks, "fewest_ways": 2, "fewest_shots": 1, **sizes})


def loss_of(algorithm, episode):
    trainer = Trainer(algorithm, Reverse(), tasks_per_step=1)
    state, tasks = trainer.init(KEY), GivenTasks.create([episode])
    (loss, _), grads = trainer.unrolls.solve(state.eta, tasks, KEY)
    return loss, grads


def batches(rows):
    """Support [2, n, ...] and query [n, ...] of some rows of five examples."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(2, 5, 16)), rng.integers(0, 3, (2, 5))
    return inputs[:, rows], targets[:, rows], inputs[0, rows], targets[0, rows]


@pytest.mark.slow
def test_learning_rates_leave_the_padding_out(x64):
    x, y, query_x, query_y = batches(MASK)
    expected = loss_of(LearningRates(linear()), Episode((x, y), (query_x, query_y)))
    x, y, query_x, query_y = batches(slice(None))
    masked = Episode((x, Masked(y, np.stack([MASK] * 2))), (query_x, Masked(query_y, MASK)))
    assert differences(loss_of(LearningRates(linear()), masked), expected) < 1e-12
    with pytest.raises(ValueError, match=r"`LearningRates\(mean_over_examples=True\)` averages"):
        loss_of(LearningRates(linear(), mean_over_examples=True), masked)


@pytest.mark.slow
def test_loss_weights_leave_the_padding_out(x64):
    def batch(x, y, mask=None):
        targets = y if mask is None else Masked(y, mask)
        return Windows(x, targets, np.zeros(y.shape, np.int32), None)

    def episode(rows, masks=(None, None)):
        x, y, query_x, query_y = batches(rows)
        return Episode(batch(x, y, masks[0]), batch(query_x, query_y, masks[1]))

    algorithm = LossWeights(linear(), TokenWeights(), optax.sgd(0.1))
    masked = episode(slice(None), (np.stack([MASK] * 2), MASK))
    assert differences(loss_of(algorithm, masked)[1], loss_of(algorithm, episode(MASK))[1]) < 1e-12
    with pytest.raises(ValueError, match=r"`LossWeights\(normalize=\)` gives the weights of a"):
        loss_of(LossWeights(linear(), TokenWeights(), normalize=mean_one), masked)
    corrupted = masked._replace(query=masked.query._replace(corrupted=~MASK))
    with pytest.raises(ValueError, match="with `corrupted` and with `Masked` targets, of which"):
        loss_of(algorithm, corrupted)


@pytest.mark.slow
def test_runs_on_rows_of_a_dataset_leave_the_padding_out(x64):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(6, 16)), rng.integers(0, 3, 6)
    mask = np.array([True, True, False, True, True, False])
    algorithm = FDS(linear(), {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1)}, 2, 6)

    def episode(targets, rows):
        return Episode((inputs, targets, rows), (inputs, targets, rows))

    every = np.arange(6)
    masked = loss_of(algorithm, episode(Masked(np.where(mask, targets, 99), mask), every))
    repeated = np.flatnonzero(mask)
    smaller = FDS(algorithm.model, algorithm.hyperparameters, 2, 4)
    expected = loss_of(smaller, episode(targets, repeated))
    assert differences(masked, expected) < 1e-12


@pytest.mark.parametrize("kind", [MAML, Reptile])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_mini_batches_of_a_padded_set_are_of_its_examples(kind, count):
    """Ten rows, of which some are examples: epochs of these without repeats, and no padding."""
    mask = np.zeros(10, bool)
    mask[[2, 5, 6, 9][:count]] = True
    support = np.zeros((10, 16)), Masked(np.where(mask, 1, -1), mask)
    algorithm = kind(linear(), optimizer=optax.sgd(0.1), inner_steps=6, batch=2)
    for key in jax.random.split(KEY, 3):
        _, rows = jax.jit(algorithm.batches)(Episode(support, support), key)
        assert rows.shape == (6, 2) and mask[rows].all()
        for epoch in np.asarray(rows).reshape(-1, count):
            assert len(set(epoch)) == count
    if count > 2:
        orders = [np.asarray(algorithm.batches(Episode(support, support), k)[1]) for k in keys(20)]
        assert len({rows.tobytes() for rows in orders}) > 10  # shuffled
    params = algorithm.adapt(algorithm.init(KEY), support, KEY).params
    assert jax.tree.all(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params))


def keys(count):
    return jax.random.split(jax.random.key(7), count)


@pytest.mark.parametrize("padding", [-1, -100, 99])
def test_labels_of_padding_may_be_any_number(padding):
    mask = np.array([True, True, False])
    part = np.ones((3, 16), np.float32), Masked(np.array([0, 2, padding]), mask)
    algorithm = MAML(linear(), optimizer=optax.sgd(0.1))
    algorithm.adapt(algorithm.init(KEY), part, KEY)
    tasks = GivenTasks.create([Episode(part, part)] * 2)
    assert tasks.label_range() == (0, 2)
    Trainer(algorithm, tasks_per_step=1).fit(tasks, 1, key=KEY, progress=False)
    wrong = part[0], Masked(np.array([0, 3, padding]), mask)
    with pytest.raises(ValueError, match="The labels go from 0 to 3"):
        algorithm.adapt(algorithm.init(KEY), wrong, KEY)


def test_the_weighted_loss_of_sequences_is_that_of_their_positions():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 5, (4, 6)))
    options = 0.1, jnp.arange(1.0, 6.0)
    flat = weighted_cross_entropy(logits.reshape(24, 5), labels.reshape(24), *options)
    np.testing.assert_allclose(
        weighted_cross_entropy(logits, labels, *options)[0], flat[0], rtol=1e-6
    )
    plain = cross_entropy(logits, labels)[0]
    np.testing.assert_allclose(weighted_cross_entropy(logits, labels)[0], plain, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, jnp.float32(0.1)])
def test_label_smoothing_leaves_out_classes_that_a_task_has_not(smoothing):
    """A head of five classes for a task of three has the loss of a head of three."""
    rng = np.random.default_rng(0)
    part = rng.normal(size=(6, 16)).astype(np.float32), np.arange(6) % 3

    def loss(logits, labels):
        return weighted_cross_entropy(logits, labels, smoothing)

    losses = [loss_of(ProtoNet(linear(), ways, loss), Episode(part, part)) for ways in (3, 5)]
    assert jnp.isfinite(losses[1][0])
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    assert differences(losses[0][1], losses[1][1]) < 1e-5
