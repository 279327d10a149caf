"""A task that is a whole training run: which rows it draws, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import Episode
from metalearn.datasets import HeldOut, Images, TrainingRuns
from tests.helpers.refusals import refused

KEY = jax.random.key(0)
INPUTS = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2)
TARGETS = np.arange(10, dtype=np.int32) % 3


def runs(validation=3):
    return TrainingRuns.create(INPUTS, TARGETS, validation=validation)


def draw(tasks, count):
    """Rows of many runs, under jit and vmap: [count, n - validation], [count, validation]."""
    only_rows = (None, None, 0)  # vmap refuses this where the data would be batched
    sample = jax.vmap(
        lambda tasks, key: tasks.sample(key), (None, 0), Episode(only_rows, only_rows)
    )
    episode = jax.jit(sample)(tasks, jax.random.split(KEY, count))
    assert episode.support[0].shape == episode.query[0].shape == INPUTS.shape
    return np.asarray(episode.support[2]), np.asarray(episode.query[2])


def test_the_two_sides_of_a_split_are_disjoint_and_together_all_rows():
    train, held_out = draw(runs(), 100)
    assert train.shape == (100, 7) and held_out.shape == (100, 3)
    assert train.dtype == held_out.dtype == np.int32
    together = np.sort(np.concatenate([train, held_out], axis=1))
    assert (together == np.arange(10)).all()


def test_every_row_is_equally_likely_to_be_held_out_and_in_every_place():
    train, held_out = draw(runs(), 5000)
    for place in np.concatenate([train, held_out], axis=1).T:
        sigma = np.sqrt(5000 * 0.1 * 0.9)
        assert np.abs(np.bincount(place, minlength=10) - 500).max() < 5 * sigma
    pairs = np.unique(np.sort(held_out), axis=0)
    assert len(pairs) == 120  # all choices of 3 rows of 10


def test_the_same_key_gives_the_same_split_and_another_key_another():
    tasks = runs()
    once, again, other = (tasks.sample(jax.random.key(k)).support[2] for k in (3, 3, 4))
    assert (once == again).all() and (once != other).any()


def test_the_data_pass_through_untouched():
    tasks = runs()
    for inputs, targets, _ in tasks.sample(KEY):
        assert inputs is tasks.inputs and targets is tasks.targets
    assert tasks.inputs.dtype == jnp.uint8 and (tasks.inputs == INPUTS).all()
    assert tasks.targets.dtype == jnp.int32 and (tasks.targets == TARGETS).all()


@pytest.mark.usefixtures("x64")
def test_rows_are_int32_under_x64_too():
    for tasks in (runs(), HeldOut.create(INPUTS, TARGETS, INPUTS, TARGETS)):
        assert {rows.dtype for _, _, rows in tasks.sample(KEY)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("validation", "count"), [(1, 1), (9, 9), (np.int64(4), 4), (0.25, 2), (0.3, 3), (0.94, 9)]
)
def test_validation_is_a_number_or_a_share_of_the_examples(validation, count):
    assert runs(validation).validation == count


def test_runs_are_a_pytree_whose_validation_is_static():
    leaves, structure = jax.tree.flatten(runs())
    assert len(leaves) == 3  # inputs, targets, and the targets that the inner loop is told
    assert jax.tree.unflatten(structure, leaves).validation == 3
    assert repr(runs()) == "TrainingRuns(validation=3)"


def test_the_inner_loop_may_be_told_other_targets():
    told = (TARGETS + 1) % 3
    tasks = TrainingRuns.create(INPUTS, TARGETS, validation=3, training_targets=told)
    support, query = tasks.sample(KEY)
    assert (support[1] == told).all() and (query[1] == TARGETS).all()
    with pytest.raises(ValueError, match="10 inputs and 9 targets"):
        TrainingRuns.create(INPUTS, TARGETS, validation=3, training_targets=told[:9])


def test_images_unpack_into_runs():
    assert TrainingRuns.create(*Images(INPUTS, TARGETS), validation=2).validation == 2


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    message = (
        f"`TrainingRuns` got validation={share}, but a share of the examples is between 0 and 1. "
        "Pass a share such as 0.1, or a number of examples as an int."
    )
    with refused(message):
        runs(share)


@pytest.mark.parametrize(
    ("validation", "validate", "train"),
    [(0, 0, 10), (10, 10, 0), (11, 11, -1), (-1, -1, 11), (0.01, 0, 10), (0.99, 10, 0)],
)
def test_a_split_with_an_empty_side_is_refused(validation, validate, train):
    message = (
        f"`TrainingRuns` got validation={validation} of 10 examples: {validate} to validate on and "
        f"{train} to train on, but a run needs some of both. Pass a number from 1 to 9, or the "
        "share that comes to it."
    )
    with refused(message):
        runs(validation)


@pytest.mark.parametrize(
    ("inputs", "targets", "counts"),
    [(INPUTS, TARGETS[:9], (10, 9)), (INPUTS[:0], TARGETS[:0], (0, 0)), (INPUTS, 3, (10, 0))],
)
def test_inputs_without_targets_and_no_data_at_all_are_refused(inputs, targets, counts):
    message = (
        "`{}` got {} inputs and {} targets, but every example is one of each, and there is at "
        "least one. Pass inputs [n, ...] and targets [n]."
    )
    with refused(message.format("TrainingRuns", *counts)):
        TrainingRuns.create(inputs, targets, validation=1)
    with refused(message.format("HeldOut", *counts)):
        HeldOut.create(inputs, targets, INPUTS, TARGETS)
    with refused(message.format("HeldOut", *counts)):
        HeldOut.create(INPUTS, TARGETS, inputs, targets)


def test_a_final_run_trains_on_all_rows_and_is_judged_on_the_other_set():
    test = INPUTS[:4] + 1, TARGETS[:4]
    tasks = HeldOut.create(INPUTS, TARGETS, *test)
    for key in (KEY, jax.random.key(1)):
        (x, y, rows), (test_x, test_y, test_rows) = tasks.sample(key)
        assert x is tasks.inputs and y is tasks.targets
        assert test_x is tasks.test_inputs and test_y is tasks.test_targets
        assert rows.tolist() == list(range(10)) and test_rows.tolist() == list(range(4))
    assert (test_x == test[0]).all() and test_x.dtype == jnp.uint8
    assert repr(tasks) == "HeldOut()" and len(jax.tree.leaves(tasks)) == 4


@pytest.mark.parametrize(
    ("inputs", "found"),
    [(INPUTS / np.float32(255), "float32[..., 2, 2]"), (INPUTS[:, :1], "uint8[..., 1, 2]")],
)
def test_a_test_set_unlike_the_training_set_is_refused(inputs, found):
    message = (
        f"`HeldOut` got training inputs of uint8[..., 2, 2] and test inputs of {found}, but one "
        "network reads both. Give both the same preparation."
    )
    with refused(message):
        HeldOut.create(INPUTS, TARGETS, inputs, TARGETS)
