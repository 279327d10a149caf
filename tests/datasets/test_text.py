"""Text: windows that stay within their piece, corruption whose every kind is what it says."""

import dataclasses
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.datasets import BYTES, Corruption, Text, Tokenizer, open_source, read_text
from metalearn.datasets.corruption import KINDS, Pieces, cut

VERSE = (
    "The sea was grey at dawn and grey at noon, and nobody aboard could name the hour; "
    "the cook rang twice, the mate replied too soon, and rain came down as fine as flour. "
) * 4
SIZES = {"length": 5, "inner_steps": 3, "batch": 4, "queries": 6}
NUMBERS = Tokenizer(lambda text: np.array([int(word) for word in text.split()]), 1000)
COUNT = " ".join(map(str, range(400)))  # token i is i: where a window comes from is in its values
KEY = jax.random.key(0)


def counted(**options):
    return Text.create(COUNT, COUNT, **{**SIZES, "tokenizer": NUMBERS, **options})


def noisy(*kinds, share=0.5, **options):
    corruption = Corruption(share, kinds or ("random",), seed=3)
    return counted(corruption=corruption, pieces=8, probes=5, **options)


def test_a_task_has_windows_per_step_and_held_out_windows():
    support, query = jax.jit(lambda tasks: tasks.sample(KEY))(counted())
    assert support.inputs.shape == support.targets.shape == (3, 4, 5)
    assert support.source.shape == support.corrupted.shape == (3, 4)
    assert query.inputs.shape == (6, 5) and query.source.shape == (6,)
    assert query.corrupted is None
    assert {x.dtype for x in (*support[:3], *query[:3])} == {np.dtype("int32")}


def test_targets_are_inputs_moved_by_one():
    support, _ = counted().sample(KEY)
    assert (support.inputs + 1 == support.targets).all()
    assert (jnp.diff(support.inputs, axis=-1) == 1).all()


def test_a_window_stays_within_its_piece_and_reaches_both_ends_of_it():
    tasks = counted(pieces=8, inner_steps=200)
    support, _ = jax.jit(lambda tasks: tasks.sample(KEY))(tasks)
    both = np.asarray([support.inputs[..., 0], support.targets[..., -1]])
    assert (both // 50 == np.asarray(support.source)).all()
    assert set(both[0].ravel() % 50) == set(range(45)) and both[1].max() == 399


def test_the_same_key_gives_the_same_windows_and_another_gives_others():
    tasks = counted()
    first, again, other = (tasks.sample(jax.random.key(k)).support.inputs for k in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_bytes_write_any_text_and_are_the_default():
    tokens = BYTES("né")
    assert tokens.tolist() == [110, 195, 169] and BYTES.vocabulary == 256
    support, _ = Text.create(VERSE, VERSE, **SIZES).sample(KEY)
    assert bytes(np.asarray(support.inputs[0, 0]).tolist()).decode() in VERSE


def test_the_corrupted_share_is_known_and_the_rest_is_untouched():
    tasks = noisy()
    bad = np.asarray(tasks.train.corrupted)
    assert bad.sum() == 4 and tasks.train.source.tolist() == list(range(8))
    clean = np.arange(400).reshape(8, 50)
    assert ((tasks.train.tokens == clean).all(1) == ~bad).all()
    assert (np.asarray(tasks.held_out.tokens) == clean).all()


def test_held_out_windows_are_clean_and_probes_are_corrupted_and_both_say_so():
    tasks = noisy(queries=40)
    bad = np.flatnonzero(tasks.train.corrupted)
    _, query = tasks.sample(KEY)
    assert query.corrupted.tolist() == [False] * 40 + [True] * 5
    assert (query.inputs[:40] + 1 == query.targets[:40]).all()
    assert (query.inputs[40:] + 1 != query.targets[40:]).any(-1).all()
    assert np.isin(query.source[40:], bad).all() and not np.isin(query.source[:40], bad).any()


def test_a_task_says_which_training_windows_are_corrupted():
    support, _ = noisy().sample(KEY)
    counting = (support.inputs + 1 == support.targets).all(-1)
    assert (counting == ~support.corrupted).all() and support.corrupted.any()


def test_the_clean_part_holds_the_clean_pieces_alone():
    tasks = noisy()
    assert set(tasks.clean().train.source.tolist()) == set(
        np.flatnonzero(~np.asarray(tasks.train.corrupted)).tolist()
    )
    assert not tasks.clean().sample(KEY).support.corrupted.any()


def test_the_text_is_cut_into_windows_side_by_side_which_say_whether_they_are_corrupted():
    tasks = noisy(length=6)
    windows = tasks.windows()
    tokens = np.asarray(tasks.train.tokens)
    assert windows.inputs.shape == (8 * 7, 6) and isinstance(windows.inputs, np.ndarray)
    assert (windows.inputs[8] == tokens[1, 7:13]).all()  # seven windows of 7 tokens in each of 50
    assert (windows.targets[8] == tokens[1, 8:14]).all()
    assert windows.source.tolist() == np.repeat(np.arange(8), 7).tolist()
    assert (windows.corrupted == np.asarray(tasks.train.corrupted)[windows.source]).all()


def test_corruption_is_decided_by_its_seed():
    def corrupted(seed):
        tasks = counted(corruption=Corruption(kinds=("random",), seed=seed), pieces=8)
        return np.asarray(tasks.train.tokens)

    assert (corrupted(0) == corrupted(0)).all() and (corrupted(0) != corrupted(1)).any()


def spoiled(kind, **options):
    """One long piece before and after a kind of corruption; its tokens are 10 .. 59."""
    before = np.tile(np.arange(10, 60, dtype=np.uint8), 80)
    after = Corruption(0.5, (kind,), **options).corrupt(cut(before, 1), np.array([0]), 256)
    assert after.tokens.dtype == np.uint8 and after.corrupted.all()
    return before, after.tokens[0]


def test_random_tokens_are_of_the_whole_vocabulary():
    _, after = spoiled("random")
    assert set(after.tolist()) == set(range(256))


def test_shuffled_tokens_are_the_same_ones_in_another_order():
    before, after = spoiled("shuffled")
    assert (np.sort(before) == np.sort(after)).all() and (before != after).mean() > 0.9


def test_replaced_tokens_are_of_the_text_and_as_many_as_asked():
    before, after = spoiled("replaced", probability=0.3)
    assert set(after.tolist()) <= set(before.tolist())
    assert abs((before != after).mean() - 0.3 * 49 / 50) < 0.04  # five sigma


def test_a_repeated_piece_is_one_of_its_own_tokens():
    before, after = spoiled("repeated")
    assert (after == after[0]).all() and after[0] in before


def test_kinds_take_turns():
    corruption = Corruption(0.5, ("repeated", "shuffled"))
    after = corruption.corrupt(cut(np.arange(400), 8), np.array([1, 3, 4, 6]), 400)
    repeated = (after.tokens == after.tokens[:, :1]).all(1)
    assert np.flatnonzero(repeated).tolist() == [1, 4]
    assert after.corrupted.nonzero()[0].tolist() == [1, 3, 4, 6]
    assert isinstance(after, Pieces)


@pytest.mark.parametrize(("pieces", "kinds"), [(10, 2), (8, 2), (9, 3), (4, 3)])
def test_a_probe_is_of_a_source_that_is_corrupted_in_the_same_way(pieces, kinds):
    corruption = Corruption(0.5, ("repeated", "shuffled", "random")[:kinds])
    _, bad = corruption.sources(pieces)
    sources = corruption.like(bad, pieces)
    assert np.isin(sources, bad).all() and len(sources) == pieces
    for probe, source in enumerate(sources):
        if probe % kinds < len(bad):
            assert np.flatnonzero(bad == source)[0] % kinds == probe % kinds
    tasks = counted(corruption=corruption, pieces=pieces, probes=1)
    assert tasks.corrupted.source.tolist() == sources.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_inside_jit_like_any_text(kind):
    tasks = noisy(kind)
    episode = jax.jit(lambda tasks, key: tasks.sample(key))(tasks, KEY)
    assert 0 <= episode.support.inputs.min() and episode.support.inputs.max() < 1000


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_a_sequence_longer_than_the_text_is_refused_with_the_longest():
    with refused(
        "`Text` got length=400, but the training text has 400 tokens, and a window of 400 inputs "
        "and their targets takes 401. Take a longer text or length=399 at most."
    ):
        counted(length=400)
    assert counted(length=399).sample(KEY).query.inputs.shape == (6, 399)
    with refused("but the held-out text has 3 tokens"):
        Text.create(COUNT, "1 2 3", **SIZES, tokenizer=NUMBERS)


def test_a_sequence_longer_than_a_piece_is_refused_too():
    with refused(
        "length=50, but the training text has 400 tokens in 8 pieces of 50, and a window of 50 "
        "inputs and their targets takes 51. Take a longer text, fewer pieces or length=49"
    ):
        counted(length=50, pieces=8)


@pytest.mark.parametrize("name", ["length", "inner_steps", "batch", "queries", "pieces"])
def test_a_size_of_zero_is_refused(name):
    with refused(f"{name}=0"):
        counted(**{name: 0})


def test_probes_need_a_corruption():
    with refused("probes=2, windows of corrupted held-out text, but no corruption"):
        counted(probes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share=0.0 and probability=0.5, but a share lies between 0 and 1"),
        ({"probability": 1.5}, "a probability is above 0 and at most 1"),
        ({"kinds": ()}, "`Corruption` needs at least one of the kinds random, shuffled"),
        ({"kinds": ("garbled",)}, "No kind of corruption is called 'garbled'. There are: random"),
    ],
)
def test_a_corruption_that_makes_no_sense_is_refused(options, message):
    with refused(message):
        Corruption(**options)


def test_a_share_that_rounds_to_nothing_is_refused():
    with refused("A share of 0.1 of 4 pieces is 0 of them, but some are to be clean and some"):
        counted(corruption=Corruption(0.1), pieces=4)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.array([1.0]), "float64[1]"),
        (np.array([[1]]), "int64[1, 1]"),
        (np.array([1, 9]), "int64[2] with values from 1 to 9"),
        (np.array([-1]), "int64[1] with values from -1 to -1"),
    ],
)
def test_what_a_tokenizer_may_not_return(tokens, found):
    with refused(f"The tokenizer returned {found}, but tokens are a one-dimensional array of"):
        Tokenizer(lambda text: tokens, 5)("text")


# Text sets of TFDS: tiny Shakespeare where TFDS_DATA_DIR holds it.


@pytest.fixture(scope="module")
def real():
    path = os.environ.get("TFDS_DATA_DIR")
    if not path:
        pytest.skip("TFDS_DATA_DIR is unset: tests of tiny Shakespeare need the prepared dataset")
    if not pathlib.Path(path, "tiny_shakespeare").exists():
        pytest.skip("TFDS_DATA_DIR holds no tiny_shakespeare: prepare it to run this test")
    return path


def test_a_text_set_of_tfds_is_read_by_its_name(real):
    texts = [read_text(split=s, data_dir=real) for s in ("train", "validation", "test")]
    assert [len(text) for text in texts] == [1003854, 55770, 55770]
    assert texts[0].startswith("First Citizen:\n")
    tasks = Text.create(texts[0], texts[1], **SIZES)
    assert tasks.sample(KEY).support.inputs.max() < 128


def test_a_feature_that_is_not_there_is_refused_with_those_there_are(real):
    with refused("'tiny_shakespeare' has no text feature 'article'. Its features are text: name"):
        read_text(feature="article", data_dir=real)


def test_a_text_set_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="The dataset 'tiny_shakespeare' is not prepared"):
        open_source("tiny_shakespeare", "train", data_dir=str(tmp_path))


def test_a_pytree_whose_sizes_are_static():
    tasks = noisy()
    longer = dataclasses.replace(tasks, inner_steps=7)
    assert jax.jit(lambda tasks: tasks.sample(KEY))(longer).support.inputs.shape[0] == 7
    assert len(jax.tree.leaves(tasks)) == 9
