"""Texts on the host: the windows of `Text`, bit for bit, and what is refused."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Reverse, Trainer
from metalearn.algorithms import LossWeights, TokenWeights
from metalearn.datasets import HostText, Text, Tokenizer
from metalearn.models import Functions
from tests.helpers.checkpoints import bits
from tests.helpers.few_shot_data import differences

KEYS = jax.random.split(jax.random.key(0), 3)
SIZES = {"length": 5, "inner_steps": 2, "batch": 3, "queries": 4}
NUMBERS = Tokenizer(lambda text: np.array([int(word) for word in text.split()]), 300)
TRAIN, HELD_OUT = np.arange(200, dtype=np.uint16), np.arange(200, 260, dtype=np.uint16)


def on_device():
    texts = (" ".join(map(str, tokens)) for tokens in (TRAIN, HELD_OUT))
    return Text.create(*texts, **SIZES, tokenizer=NUMBERS)


def on_host(train=TRAIN, held_out=HELD_OUT, **options):
    return HostText.create(train, held_out, **{**SIZES, "vocabulary": 300, **options})


def mapped(path, tokens):
    tokens.tofile(path)
    return np.memmap(path, tokens.dtype, "r")


@pytest.mark.slow
def test_the_same_key_draws_the_same_windows_as_on_the_device(tmp_path):
    expected = bits(jax.vmap(on_device().sample)(KEYS))
    host = on_host(mapped(tmp_path / "train", TRAIN), mapped(tmp_path / "held_out", HELD_OUT))
    assert bits(jax.vmap(host.fetch(KEYS).sample)(KEYS)) == expected
    assert bits(jax.jit(jax.vmap(host.sample))(KEYS)) == expected
    assert host.label_range() == (0, 299)


def test_the_windows_of_a_file_are_views_of_it_and_those_of_the_same_text(tmp_path):
    host = on_host(mapped(tmp_path / "train", TRAIN))
    windows, expected = host.windows(), on_device().windows()
    assert np.shares_memory(windows.inputs, windows.targets) and len(windows.inputs) == 33
    for ours, theirs in zip(windows, expected, strict=True):
        assert (ours == theirs).all()


@pytest.mark.slow
def test_training_reads_the_windows_from_the_host():
    model = Functions(
        lambda key: {"w": jax.random.normal(key, (300, 300))},
        lambda params, tokens: jnp.take(params["w"], tokens, axis=0),
    )
    algorithm = LossWeights(model, TokenWeights(hidden=(2,)), optax.sgd(0.1))
    trainer = Trainer(algorithm, Reverse(), tasks_per_step=2)
    etas = [
        trainer.fit(tasks, 3, key=KEYS[0], progress=False).eta for tasks in (on_device(), on_host())
    ]
    assert differences(*etas) < 1e-6


def cut(path):
    host = on_host(mapped(path, TRAIN))
    os.truncate(path, 10)
    host.fetch(KEYS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: on_host(TRAIN * 1.0), r"`HostText` got train of float64\[200\], but a text"),
        (lambda path: on_host(held_out=HELD_OUT[None]), r"got held_out of uint16\[1, 60\], but"),
        (lambda path: on_host("a text"), "`HostText` got str of <U6 for its train"),
        (lambda path: on_host(TRAIN[:5]), "got length=5, but the training text has 5 tokens, and"),
        (lambda path: on_host(batch=0), "`HostText` got length=5, inner_steps=2, batch=0"),
        (lambda path: on_host(queries=1.0), r"`HostText\(queries=1.0\)`: it is an integer"),
        (lambda path: on_host(vocabulary=0), r"`HostText\(vocabulary=0\)`: it is an integer, 1"),
        (
            lambda path: on_host(vocabulary=250).fetch(KEYS),
            "in the held-out text, but vocabulary=250: they are from 0 to 249. Pass the vocabulary",
        ),
        (cut, "The array that `HostText` reads had 200 examples .* has 10 bytes of 400: it has"),
    ],
)
def test_texts_that_make_no_tasks_are_refused(make, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path / "text")


def test_more_tokens_than_are_counted_are_refused():
    tokens = np.broadcast_to(np.uint8(0), (2**31,))
    with pytest.raises(ValueError, match=re.escape("train of 2,147,483,648 tokens, and draws")):
        on_host(tokens)
