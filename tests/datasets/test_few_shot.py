"""The few-shot sampler: what it draws, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.datasets import ClassIndex, FewShot
from metalearn.datasets.few_shot import distinct
from tests.helpers.selection import quick

COUNTS = np.array([6, 9, 20, 6, 11, 7, 8], np.int32)


def labelled_index() -> ClassIndex:
    """Seven classes of unequal size whose two channels are (class, example); 255 is padding."""
    examples = np.full((7, 20, 2, 2, 2), 255, np.uint8)
    for c, count in enumerate(COUNTS):
        examples[c, :count, ..., 0] = c
        examples[c, :count, ..., 1] = np.arange(count)[:, None, None]
    return ClassIndex(examples, COUNTS)


@pytest.fixture(scope="module")
def many():
    """2,000 tasks, drawn under jit and vmap: (class, example) of support and query."""
    tasks = FewShot.create(labelled_index(), ways=3, shots=2, queries=4)
    keys = jax.random.split(jax.random.key(1), 2000)
    episodes = jax.jit(lambda tasks, keys: jax.vmap(tasks.sample)(keys))(tasks, keys)
    assert episodes.support[0].shape == (2000, 6, 2, 2, 2)
    pixels = [np.rint(np.asarray(x) * 255).astype(int)[:, :, 0, 0] for x, _ in episodes]
    return pixels[0].reshape(2000, 3, 2, 2), pixels[1].reshape(2000, 3, 4, 2)


def within_five_sigma(observed, total, probability):
    sigma = np.sqrt(total * probability * (1 - probability))
    return np.abs(observed - total * probability).max() < 5 * sigma


def test_every_class_is_equally_likely_in_every_slot(many):
    slots = many[0][:, :, 0, 0]
    for slot in slots.T:
        assert within_five_sigma(np.bincount(slot, minlength=7), 2000, 1 / 7)


def test_no_class_is_repeated_in_a_task(many):
    slots = np.sort(many[0][:, :, 0, 0])
    assert (np.diff(slots) > 0).all()


def test_a_slot_holds_one_class_in_support_and_query(many):
    both = np.concatenate(many, axis=2)[..., 0]
    assert (both == both[:, :, :1]).all()


def test_no_example_is_repeated_within_support_and_query(many):
    both = np.sort(np.concatenate(many, axis=2)[..., 1])
    assert (np.diff(both) > 0).all()


def test_counts_are_respected_and_every_example_is_equally_likely(many):
    both = np.concatenate(many, axis=2).reshape(-1, 2)
    assert both[:, 0].max() == 6  # never the padding
    for c, count in enumerate(COUNTS):
        seen = np.bincount(both[both[:, 0] == c][:, 1])
        assert len(seen) == count
        assert within_five_sigma(seen, seen.sum(), 1 / count)


def test_labels_are_the_slots_and_inputs_are_float32_between_0_and_1():
    tasks = FewShot.create(labelled_index(), ways=3, shots=2, queries=4)
    (x, y), (query_x, query_y) = tasks.sample(jax.random.key(0))
    assert x.shape == (6, 2, 2, 2) and query_x.shape == (12, 2, 2, 2)
    assert x.dtype == query_x.dtype == jnp.float32 and y.dtype == query_y.dtype == jnp.int32
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and query_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert x.min() >= 0 and x.max() <= 1


def test_white_becomes_exactly_one():
    index = ClassIndex(np.full((2, 2, 1, 1, 1), 255, np.uint8), np.array([2, 2], np.int32))
    episode = FewShot.create(index, ways=2, shots=1, queries=1).sample(jax.random.key(0))
    assert (episode.support[0] == 1).all()


def test_the_same_key_gives_the_same_task_and_another_key_another():
    tasks = FewShot.create(labelled_index(), ways=5, shots=1, queries=5)
    once, again = (tasks.indices(jax.random.key(3)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, again))
    jitted = jax.jit(FewShot.indices)(tasks, jax.random.key(3))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, jitted))
    assert (tasks.indices(jax.random.key(4))[1] != once[1]).any()


def test_tasks_are_a_pytree_whose_numbers_are_static():
    tasks = FewShot.create(labelled_index(), ways=3, shots=2, queries=4)
    leaves, structure = jax.tree.flatten(tasks)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).ways == 3
    assert repr(tasks) == "FewShot(ways=3, shots=2, queries=4)"


def test_a_task_may_take_all_classes_and_all_examples_of_the_smallest():
    tasks = FewShot.create(labelled_index(), ways=7, shots=2, queries=4)
    classes, picks = tasks.indices(jax.random.key(0))
    assert sorted(classes.tolist()) == list(range(7))
    assert sorted(picks[classes.tolist().index(0)].tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            dict(ways=8, shots=1, queries=1),
            "`FewShot` got ways=8, but the index has 7 classes and those of a task are distinct. "
            "Ask for at most ways=7, or give it an index of more classes (`rotate(index)` makes "
            "four of each).",
        ),
        (
            dict(ways=2, shots=5, queries=15),
            "`FewShot` got shots + queries = 5 + 15 = 20, but class 0 has 6 examples and those of "
            "a task are distinct. Ask for at most 6 together, or keep only the larger classes "
            "with `select(index, np.flatnonzero(index.counts >= 20))`.",
        ),
        (
            dict(ways=2, shots=0, queries=1),
            "`FewShot` got ways=2, shots=0, queries=1, but a task has at least one of each. Pass "
            "positive integers, such as ways=5, shots=1, queries=15.",
        ),
    ],
)
def test_an_impossible_task_is_refused_with_the_way_out(asked, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FewShot.create(labelled_index(), **asked)


@pytest.mark.parametrize(("n", "k"), quick([(5, 2), (4, 4), (6, 3)], lambda n, k: k < 4))
def test_every_ordered_choice_of_distinct_integers_is_equally_likely(n, k):
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: distinct(key, n, k)))(keys))
    choices, times = np.unique(drawn, axis=0, return_counts=True)
    expected = np.prod(np.arange(n - k + 1, n + 1))
    assert len(choices) == expected
    assert all(len(set(choice)) == k for choice in choices.tolist())
    assert within_five_sigma(times, 20_000, 1 / expected)
