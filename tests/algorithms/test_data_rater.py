"""DataRater: the loop by hand, the rater of texts, scores of a dataset, the best of it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Episode, Masked, MixedFlow, Reverse, Trainer, Truncation
from metalearn.algorithms import (
    DataRater,
    DomainWeights,
    LossWeights,
    rate_examples,
    text_rater,
    top_fraction,
)
from metalearn.algorithms.loss_weights.features import auc
from metalearn.datasets import Corruption, Text, Tokenizer
from metalearn.models import Functions, Model
from tests.cases import TASKS

KEY = jax.random.key(0)
# A table of logits by the token before, and one of scores by token: as small as they get.
BIGRAM = Functions(
    lambda key: 0.1 * jax.random.normal(key, (4, 4)), lambda table, tokens: table[tokens]
)
TABLE = Functions(lambda key: jnp.zeros(4), lambda table, pair: table[pair[0]].mean(1))
ETA = np.array([0.25, -1.0, 2.0, 0.5])  # of float32 or float64, as JAX is set; ties are exact


def rater(**options):
    options = {"rater": TABLE, "optimizer": optax.sgd(0.5), **options}
    return DataRater(options.pop("model", BIGRAM), **options)


@functools.cache
def text():
    """One task of the little text: T = 3 batches of 4 windows, 3 clean queries, 2 probes."""
    return jax.jit(lambda tasks: tasks.sample(jax.random.key(1)))(TASKS["Text"])


def solve(algorithm, engine=None, eta=ETA):
    """((loss, aux), gradient) on one task."""
    episode = text()

    @jax.jit
    def run(eta):
        batches = algorithm.batches(episode, KEY)
        return (engine or Reverse()).value_and_grad(algorithm.unroll(episode, KEY), eta, batches)

    return run(jnp.asarray(eta))


@pytest.mark.usefixtures("x64")
def test_an_inner_step_takes_the_softmax_of_scores_over_the_batch_as_weights():
    support, query = text()

    def losses(table, inputs, targets):
        logits = jax.nn.log_softmax(table[inputs])
        return -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0].mean(1)

    def by_hand(eta):
        table = BIGRAM.init_fn(KEY)
        for t in range(3):
            inputs, targets, *_ = jax.tree.map(lambda x, t=t: x[t], support)
            odds = jnp.exp(eta[inputs].mean(1))

            def weighted(table, inputs=inputs, targets=targets, odds=odds):
                return (losses(table, inputs, targets) * odds / odds.sum()).sum()

            table = table - 0.5 * jax.grad(weighted)(table)
        return losses(table, query.inputs[:3], query.targets[:3]).mean()  # two probes follow

    expected = jax.jit(jax.value_and_grad(by_hand))(jnp.asarray(ETA))
    (loss, aux), grads = solve(rater())
    np.testing.assert_allclose(loss, expected[0], rtol=1e-10)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-10, atol=1e-14)
    scores = ETA[np.asarray(query.inputs)].mean(1)
    area = float(auc(jnp.asarray(scores), ~query.corrupted))
    assert abs(aux.metrics["weight_auc"] - area) < 1e-6
    assert abs(aux.metrics["weight_mean"] - 1) < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_batch_is_taken_in_micro_batches_as_the_weights_do_not_depend_on_theta():
    whole, parts = (solve(rater(), MixedFlow(micro_batches=n)) for n in (1, 2))
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_equal_scores_are_training_without_weights():
    uniform = LossWeights(BIGRAM, DomainWeights(4), optax.sgd(0.5))
    (loss, _), _ = solve(dataclasses.replace(rater(), rater=Functions(TABLE.init_fn, _flat)))
    (expected, _), _ = solve(uniform, eta=np.zeros(4))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def _flat(table, pair):
    return 0 * table[pair[0]].mean(1) + 3.0


def test_a_rater_is_applied_with_the_statistics_it_was_initialised_with():
    batch = jax.tree.map(lambda x: x[0], text().support)
    plain = rater().scores(jnp.asarray(ETA), batch)
    scores = rater(rater=_Scaled()).scores(jnp.asarray(ETA), batch)
    np.testing.assert_array_equal(scores, 3 * plain)


class _Scaled(Model):
    """The table of scores, times a statistic that training mode would change."""

    def init(self, key):
        return jnp.zeros(4), jnp.float32(3)

    def apply(self, params, state, inputs, *, train, dropout=True, key=None):
        return state * params[inputs[0]].mean(1), state + train


def test_a_rater_without_statistics_is_not_initialised_with_every_batch():
    initialised = []
    batch = jax.tree.map(lambda x: x[0], text().support)
    counted = Functions(lambda key: initialised.append(key) or jnp.zeros(4), TABLE.apply_fn)
    algorithm = rater(rater=counted)
    for _ in range(3):
        algorithm.scores(jnp.asarray(ETA), batch)
    assert len(initialised) == 1  # for the shapes of the statistics


# What is refused.


@pytest.mark.parametrize(
    ("apply", "shape"),
    [
        (lambda table, pair: table[pair[0]], "[4, 3]"),
        (lambda table, pair: table[pair[0]].mean(), "[]"),
        (lambda table, pair: table[pair[0]][..., None], "[4, 3, 1]"),
    ],
)
def test_scores_that_are_not_one_number_per_example_are_refused(apply, shape):
    batch = jax.tree.map(lambda x: x[0], text().support)
    message = (
        f"`DataRater(rater=Functions)` returned scores of the shape {shape} for 4 examples, but a "
        "score is one number per example: [4] or [4, 1]."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        rater(rater=Functions(TABLE.init_fn, apply)).scores(jnp.asarray(ETA), batch)


def test_scores_with_an_axis_of_one_are_one_number_per_example():
    batch = jax.tree.map(lambda x: x[0], text().support)
    column = Functions(TABLE.init_fn, lambda table, pair: table[pair[0]].mean(1)[:, None])
    np.testing.assert_array_equal(
        rater(rater=column).scores(jnp.asarray(ETA), batch), rater().scores(jnp.asarray(ETA), batch)
    )


def test_padding_is_refused():
    batch = jax.tree.map(lambda x: x[0], text().support)
    masked = batch._replace(targets=Masked(batch.targets, jnp.ones(4, bool)))
    with pytest.raises(ValueError, match="with `Masked` targets the padding would have a part"):
        rater().scores(jnp.asarray(ETA), masked)


def test_a_lifetime_below_the_truncation_is_refused():
    trainer = Trainer(rater(), tasks_per_step=2, truncation=Truncation(4))
    state = trainer.init(KEY, TASKS["Text"])
    message = "A truncation of 4 inner steps is longer than the horizon, which is 3"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(trainer.step, state, TASKS["Text"])


# The rater of texts.


def test_a_rater_of_texts_reads_the_whole_window_and_begins_with_scores_of_zero():
    network = text_rater(4, width=4, heads=1)
    params, state = jax.jit(network.init)(KEY)
    window = jax.random.randint(KEY, (3, 6), 0, 4)

    @jax.jit
    def scores(params, window):
        return network.apply(params, state, (window[:, :-1], window[:, 1:]), train=False)[0]

    assert (scores(params, window) == 0).all()
    params = params | {"score": jnp.arange(1.0, 5.0)}
    before = scores(params, window)
    for position in (0, 5):  # the first input, and the last target
        other = window.at[1, position].set((window[1, position] + 1) % 4)
        changed = np.asarray(scores(params, other) != before)
        assert changed.tolist() == [False, True, False]
    assert text_rater(4) == text_rater(4) != text_rater(5)


# Scores of a dataset, and the best of it.


def test_a_dataset_is_scored_in_batches_from_where_it_is(tmp_path):
    windows = TASKS["Text"].windows()
    expected = ETA[windows.inputs].mean(1)
    scores = rate_examples(rater(), jnp.asarray(ETA), windows, batch=5)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    file = np.memmap(tmp_path / "tokens", np.int32, "w+", shape=windows.inputs.shape)
    file[:] = windows.inputs
    scores = rate_examples(rater(), jnp.asarray(ETA), (file, file), batch=7)
    assert scores.shape == (len(windows.inputs),) and isinstance(scores, np.ndarray)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_only_examples_with_their_targets_are_scored_and_by_a_rater():
    inputs = np.zeros((3, 2), np.int32)
    message = r"has inputs and targets of the lengths \[2, 3\], but every example is one of each"
    with pytest.raises(ValueError, match=message):
        rate_examples(rater(), jnp.asarray(ETA), (inputs, inputs[:2]))
    with pytest.raises(ValueError, match=r"of the lengths \[0\]"):
        rate_examples(rater(), jnp.asarray(ETA), (inputs[:0], inputs[:0]))
    with pytest.raises(TypeError, match="takes a `DataRater`, .* not LossWeights"):
        rate_examples(LossWeights(BIGRAM, DomainWeights(4)), ETA, (inputs, inputs))


def test_the_best_share_is_exact_and_ties_are_drawn_at_random():
    scores = np.array([0.5, 2.0, -1.0, 2.0, 0.5, 0.5])
    rows, threshold = top_fraction(scores, 1 / 3)
    assert rows.tolist() == [1, 3] and threshold == 2.0
    assert threshold == np.quantile(scores, 1 - 1 / 3, method="higher")
    many = np.repeat([1.0, 0.0], [10, 990])
    chosen = [top_fraction(many, 0.1, seed=seed) for seed in (0, 0, 1)]
    assert all(len(rows) == 100 and set(range(10)) <= set(rows.tolist()) for rows, _ in chosen)
    assert chosen[0].threshold == 0.0 and (np.diff(chosen[0].rows) > 0).all()
    assert (chosen[0].rows == chosen[1].rows).all() and (chosen[0].rows != chosen[2].rows).any()
    assert chosen[0].rows.max() > 500  # not the first of those that tie
    assert top_fraction(np.array([1, 2, 3], np.uint8), 0.34).rows.tolist() == [2]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.01, 0.999, float("nan")])
def test_a_share_that_keeps_no_example_or_all_of_them_is_refused(fraction):
    message = (
        f"`top_fraction(fraction={fraction})` is a share of 10 examples between 0 and 1 that keeps "
        "some of them and leaves some out"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        top_fraction(np.arange(10.0), fraction)


def test_scores_that_cannot_be_ordered_are_refused():
    with pytest.raises(ValueError, match=r"an array \[3\], 1 of them not finite, but the best"):
        top_fraction(np.array([1.0, np.nan, 2.0]), 0.5)
    with pytest.raises(ValueError, match=r"is an array \[2, 1\], but the best examples are chosen"):
        top_fraction(np.ones((2, 1)), 0.5)


# Learning.


@pytest.mark.slow
def test_a_population_learns_to_rate_noise_below_text():
    tasks = Text.create(
        *("abcd" * 100, "abcd" * 50),
        length=12,
        inner_steps=24,
        batch=8,
        queries=16,
        pieces=8,
        corruption=Corruption(0.5, ("random",)),
        tokenizer=Tokenizer(lambda text: np.array([ord(c) - ord("a") for c in text]), 4),
    )
    algorithm = DataRater(BIGRAM, text_rater(4, width=8), optax.sgd(2.0))
    truncation = Truncation(2, transform=optax.scale_by_adam())
    trainer = Trainer(
        algorithm, MixedFlow(), optax.sgd(0.02), tasks_per_step=4, truncation=truncation
    )
    state = trainer.fit(tasks, 60, key=KEY, progress=False)
    windows = tasks.windows()
    scores = rate_examples(algorithm, trainer.learned(state), windows)
    assert auc(jnp.asarray(scores), jnp.asarray(~windows.corrupted)) > 0.95
    kept = top_fraction(scores, 0.5).rows
    assert windows.corrupted[kept].mean() < 0.1


def test_an_episode_without_flags_reports_no_separation():
    episode = Episode(text().support, text().query._replace(corrupted=None))
    _, metrics = jax.eval_shape(
        lambda eta: rater().unroll(episode, KEY).loss(eta, rater().unroll(episode, KEY).init(eta)),
        ETA,
    )
    assert metrics.keys() == {"weight_min", "weight_mean"}
