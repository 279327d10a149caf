"""The few-shot sampler: what it draws, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.datasets import ClassIndex, FewShot, rotate
from metalearn.datasets.few_shot import distinct
from metalearn.datasets.task_sizes import check_sizes
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


def test_fields_alone_make_tasks_whose_images_become_zero_to_one():
    index = labelled_index()
    fields = jnp.asarray(index.examples), jnp.asarray(index.counts), 3, 2, 4
    made, created = FewShot(*fields), FewShot.create(index, ways=3, shots=2, queries=4)
    (x, _), (y, _) = made.sample(jax.random.key(0)), created.sample(jax.random.key(0))
    assert (x[0] == y[0]).all() and x[0].max() <= 1


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


# Arrays and their labels.

LABELS = np.arange(12) % 3
SIZES = {"ways": 2, "shots": 1, "queries": 2}


def drawn(inputs, labels=LABELS, key=0, **options):
    """The inputs of the support set and of the query set, joined."""
    tasks = FewShot.from_arrays(inputs, labels, **{**SIZES, **options})
    episode = tasks.sample(jax.random.key(key))
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), episode.support[0], episode.query[0])


@pytest.mark.parametrize("shape", [(), (3,), (4, 4), (4, 4, 1)])
def test_floats_are_taken_as_they_are(shape):
    inputs = (-300 + 100 * np.arange(12, dtype=np.float32)).reshape(12, *[1] * len(shape))
    values = drawn(np.broadcast_to(inputs, (12, *shape)))
    assert values.shape == (6, *shape) and values.dtype == np.float32
    assert set(values.ravel().tolist()) <= set(inputs.ravel().tolist())


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16])
def test_integers_stay_integers(dtype):
    tokens = np.arange(24, dtype=dtype).reshape(12, 2)
    values = drawn(tokens)
    assert values.dtype == dtype and {tuple(v) for v in values} <= {tuple(t) for t in tokens}


def test_uint8_images_become_zero_to_one_unless_a_scale_is_given():
    images = np.full((12, 2, 2, 1), 255, np.uint8)
    assert (drawn(images) == 1).all() and (drawn(images, scale=1) == 255).all()
    assert drawn(images, scale=1).dtype == np.float32
    pixels_in_a_row = images.reshape(12, 4)
    np.testing.assert_allclose(drawn(pixels_in_a_row, scale=1 / 255), 1, rtol=1e-6)


def test_a_scale_multiplies_floats_too_and_may_differ_between_arrays():
    inputs = {"image": np.full((12, 2, 2), 255, np.uint8), "x": np.full(12, 3.0, np.float32)}
    assert (drawn(inputs, scale=2)["x"] == 6).all()
    values = drawn(inputs, scale={"image": None, "x": 0.5})
    assert (values["image"] == 1).all() and (values["x"] == 1.5).all()


def test_the_arrays_of_an_example_stay_together_and_lists_are_arrays():
    inputs = {"a": list(range(12)), "b": (np.arange(12) * 10, [[float(i)] for i in range(12)])}
    values = drawn(inputs, labels=list("abc" * 4))
    assert (
        values["a"].tolist() == [b // 10 for b in values["b"][0]] == values["b"][1][:, 0].tolist()
    )
    classes = values["a"] % 3
    assert classes[0] == classes[2] == classes[3] != classes[1] == classes[4] == classes[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(labels=[0, 1, 2]),
            r"got 12 inputs and labels of shape \[3\], but every example has one label",
        ),
        (dict(labels=np.eye(12, dtype=int)), r"shape \[12, 12\].*one-hot: `labels.argmax\(-1\)`"),
        (dict(shots=1.0), r"`FewShot\(shots=1.0\)`: it is an integer, such as 1"),
        (dict(queries="1"), r"`FewShot\(queries='1'\)`: it is an integer, such as 1"),
        (
            dict(labels=["cat"] * 10 + ["dog"] * 2),
            r"= 1 \+ 2 = 3, but the class 'dog' has 2 examples .*keep = np.isin\(labels, names",
        ),
        (
            dict(labels=["cat"] * 12),
            "got examples of one class: every label is 'cat'. A task tells classes apart, so it "
            "takes at least two.",
        ),
        (dict(inputs=np.zeros((0, 2)), labels=np.zeros(0, int)), "got examples of no class. A"),
        (dict(scale="255"), r"`FewShot\(scale='255'\)`: it is a number that multiplies all"),
        (dict(scale=True), r"`FewShot\(scale=True\)`: it is a number"),
        (dict(scale={"x": 1}), r"scale=\{'x': 1\}.*a structure like the inputs of an example"),
        (dict(inputs=np.zeros((12, 3), np.uint8)), r"uint8 inputs, .* shape \[3\]"),
    ],
)
def test_arrays_that_make_no_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        drawn(**{"inputs": np.zeros((12, 2), np.float32), **arguments})


def test_more_examples_of_a_class_than_can_be_drawn_are_refused():
    counts = np.array([2**23 + 1, 5])
    with pytest.raises(ValueError, match="the largest of 8,388,609 examples, but it draws from at"):
        check_sizes(counts, 2, 1, 1)


def test_a_task_has_one_turn_at_most_of_each_character():
    index = rotate(ClassIndex(np.zeros((6, 4, 3, 3, 1), np.uint8), np.full(6, 4, np.int32)))
    tasks = FewShot.create(index, ways=5, shots=1, queries=1, variants=4)
    keys = jax.random.split(jax.random.key(0), 500)
    classes = np.asarray(jax.vmap(lambda key: tasks.indices(key)[0])(keys))
    assert classes.dtype == np.int32 and all(len(set(row)) == 5 for row in classes % 6)
    counts = np.bincount(classes.reshape(-1), minlength=24)
    assert counts.shape == (24,) and abs(counts - 2500 / 24).max() < 5 * np.sqrt(2500 / 24)
    turns = classes // 6
    assert np.corrcoef(turns[:, 0], turns[:, 1])[0, 1] < 0.15


@pytest.mark.parametrize(
    ("variants", "ways", "message"),
    [
        (5, 5, r"`FewShot.create\(variants=5\)`: the 24 classes of the index are not as many"),
        (0, 5, r"`FewShot.create\(variants=0\)`"),
        (4, 7, "6"),
    ],
)
def test_variants_that_do_not_fit_the_index_are_refused(variants, ways, message):
    index = rotate(ClassIndex(np.zeros((6, 4, 3, 3, 1), np.uint8), np.full(6, 4, np.int32)))
    with pytest.raises(ValueError, match=message):
        FewShot.create(index, ways=ways, shots=1, queries=1, variants=variants)
