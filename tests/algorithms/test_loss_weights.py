"""Learned loss weights: the loop by hand, the parts one by one, and that noise is found."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Episode, MixedFlow, Reverse, Trainer
from metalearn.algorithms import (
    DomainWeights,
    ExampleWeights,
    LossWeights,
    TokenWeights,
    Weighting,
    bounded,
    mean_one,
    unbounded,
)
from metalearn.algorithms.loss_weights.features import FEATURES, WeightInputs, auc, features
from metalearn.datasets import Corruption, Text, Tokenizer
from metalearn.model import Model
from metalearn.models import (
    Functions,
)
from tests.cases import TASKS
from tests.helpers.selection import quick

KEY = jax.random.key(0)
LETTERS = Tokenizer(lambda text: np.array([ord(c) - ord("a") for c in text]), 4)
# A table of logits by the token before: as small as a language model gets.
BIGRAM = Functions(
    lambda key: 0.1 * jax.random.normal(key, (4, 4)), lambda table, tokens: table[tokens]
)
INPUTS = WeightInputs(jnp.array([[0.1, 2.0, 0.4], [3.0, 0.2, 5.0]]), jnp.array([1, 0]))


def loss_weights(weighting, **options):
    options = {"optimizer": optax.sgd(0.5), **options}
    return LossWeights(options.pop("model", BIGRAM), weighting, **options)


def perturbed(algorithm):
    """Eta with no zero in it, so that every path carries a derivative."""
    random = np.random.RandomState(5)
    return jax.tree.map(lambda x: x + random.standard_normal(x.shape), algorithm.init(KEY))


@functools.cache
def text():
    """One task of the little text: T = 3 batches of 4 windows, 3 clean queries, 2 probes."""
    with jax.ensure_compile_time_eval():  # whichever test asks first, also inside of `jit`
        return jax.jit(lambda tasks: tasks.sample(jax.random.key(1)))(TASKS["Text"])


def solve(algorithm, engine=None, episode=None):
    """((loss, aux), gradient) on one task."""
    episode = text() if episode is None else episode

    @jax.jit
    def run(eta):
        unroll = algorithm.unroll(episode, KEY)
        batches = algorithm.batches(episode, KEY)
        return (engine or Reverse()).value_and_grad(unroll, eta, batches)

    return run(perturbed(algorithm))


def assert_close(ours, expected, **tolerance):
    def close(a, b):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-10, "atol": 1e-14, **tolerance})

    jax.tree.map(close, ours, expected)


# The loop.


@pytest.mark.usefixtures("x64")
def test_it_is_gradient_descent_on_a_weighted_loss_judged_by_a_plain_one():
    algorithm = loss_weights(DomainWeights(4))
    support, query = text()

    def losses(table, inputs, targets):
        logits = jax.nn.log_softmax(table[inputs])
        return -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]

    def by_hand(eta):
        table = BIGRAM.init_fn(KEY)
        for t in range(3):
            inputs, targets, source, _ = jax.tree.map(lambda x, t=t: x[t], support)
            weights = 2 / (1 + jnp.exp(-eta[source]))

            def weighted(table, inputs=inputs, targets=targets, weights=weights):
                return (losses(table, inputs, targets).mean(1) * weights).mean()

            table = table - 0.5 * jax.grad(weighted)(table)
        return losses(table, query.inputs[:3], query.targets[:3]).mean()  # two probes follow

    expected = jax.jit(jax.value_and_grad(by_hand))(perturbed(algorithm))
    (loss, _), grads = solve(algorithm)
    assert_close((loss, grads), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.slow
def test_an_inner_step_takes_weights_as_constants_however_they_depend_on_theta(through):
    weighting = TokenWeights(hidden=(3,))
    algorithm = loss_weights(weighting, through_features=through)
    eta = perturbed(algorithm)

    @jax.jit
    def steps(eta):
        unroll = algorithm.unroll(text(), KEY)
        batch = jax.tree.map(lambda x: x[0], algorithm.batches(text(), KEY))
        start = unroll.init(eta)
        weights = algorithm.weights(eta, algorithm.losses(start, batch[0]), batch[0])

        def weighted(table):
            return (algorithm.losses(start._replace(params=table), batch[0]) * weights).mean()

        after = unroll.step(eta, start, batch, jax.grad)
        return after.params, start.params - 0.5 * jax.grad(weighted)(start.params)

    assert_close(*steps(eta))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_meta_gradient_travels_through_the_features_where_asked():
    without, through = (
        solve(loss_weights(TokenWeights(hidden=(3,)), through_features=asked))
        for asked in (False, True)
    )
    assert_close(without[0][0], through[0][0])
    difference = jax.tree.map(lambda a, b: abs(a - b).max(), without[1], through[1])
    assert max(jax.tree.leaves(difference)) > 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "weighting",
    quick(
        [DomainWeights(4), TokenWeights(), ExampleWeights()],
        lambda weighting: isinstance(weighting, DomainWeights),
    ),
    ids=str,
)
@pytest.mark.slow
def test_a_mean_over_examples_and_a_whole_batch_are_one_loss(weighting):
    apart = loss_weights(weighting)
    whole = loss_weights(weighting, normalize=lambda weights: weights)
    (loss, _), grads = solve(apart)
    (expected, _), expected_grads = solve(whole)
    assert_close((loss, grads), (expected, expected_grads))


@pytest.mark.slow
def test_weights_normalised_over_the_batch_are_not_taken_in_micro_batches():
    with pytest.raises(ValueError, match="ExampleMean"):
        solve(loss_weights(TokenWeights(), normalize=mean_one), MixedFlow(micro_batches=2))


class Labelled(NamedTuple):
    inputs: Any
    targets: Any
    source: Any = None
    corrupted: Any = None


@dataclasses.dataclass(frozen=True)
class Centred(Model):
    """A linear classifier of two classes behind batch statistics."""

    def init(self, key):
        return jax.random.normal(key, (3, 2)), jnp.zeros((1, 3))

    def apply(self, params, state, inputs, *, train, key=None):
        mean = inputs.mean(0, keepdims=True) if train else state
        return (inputs - mean) @ params, 0.5 * state + 0.5 * mean


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_it_weights_the_examples_of_a_classifier_with_batch_statistics_too():
    def rows(*shape):
        inputs = jax.random.normal(KEY, (*shape, 3))
        return Labelled(inputs, (inputs[..., 0] > 0).astype(int))

    algorithm, support = loss_weights(ExampleWeights(), model=Centred()), rows(2, 5)
    (loss, aux), grads = solve(algorithm, MixedFlow(), Episode(support, rows(6)))
    assert np.isfinite(loss) and optax.tree.norm(grads) > 0
    first, second = support.inputs.mean(1, keepdims=True)
    assert_close(aux.state.statistics, 0.25 * first + 0.5 * second)


# The parts.


@pytest.mark.parametrize("squash", [bounded, unbounded])
@pytest.mark.parametrize(
    "weighting", [DomainWeights(2), TokenWeights(tuple(FEATURES), sources=2), ExampleWeights()]
)
def test_every_weighting_begins_as_plain_training(weighting, squash):
    scores = weighting(weighting.init(KEY), INPUTS)
    assert (scores == 0).all()
    np.testing.assert_allclose(squash(scores), 1.0, rtol=1e-6)


def test_features_are_what_their_names_say():
    found = features(tuple(FEATURES), INPUTS, sources=2)
    assert found.shape == (2, 3, 7)
    by_name = dict(zip([*list(FEATURES)[:5], "first", "second"], found.T, strict=True))
    losses = np.asarray(INPUTS.losses)
    mean, spread = losses.mean(1), losses.std(1)
    np.testing.assert_allclose(by_name["loss"].T, losses)
    np.testing.assert_allclose(by_name["log_loss"].T, np.log1p(losses), rtol=1e-6)
    np.testing.assert_allclose(by_name["example_loss"].T, mean[:, None] + 0 * losses, rtol=1e-6)
    np.testing.assert_allclose(by_name["spread"].T, spread[:, None] + 0 * losses, rtol=1e-6)
    np.testing.assert_allclose(by_name["position"][:, 0], [-1, 0, 1], atol=1e-6)
    assert by_name["first"][:, 0].tolist() == [0, 0, 0] and (by_name["first"][:, 1] == 1).all()


def test_the_spread_of_one_loss_and_of_equal_ones_has_a_derivative():
    def total(losses):
        return features(["spread"], WeightInputs(losses, jnp.zeros(len(losses), jnp.int32))).sum()

    for losses in (jnp.ones((3, 1)), jnp.ones((2, 4))):
        assert total(losses) == 0
        np.testing.assert_array_equal(jax.grad(total)(losses), jnp.zeros_like(losses))
    np.testing.assert_allclose(total(INPUTS.losses), INPUTS.losses.std(-1).sum() * 3, rtol=1e-6)
    several = jax.grad(lambda x: x.std(-1).sum())(INPUTS.losses) * 3
    np.testing.assert_allclose(jax.grad(total)(INPUTS.losses), several, rtol=1e-5)


def test_domain_weights_look_their_source_up_and_refuse_one_they_do_not_know():
    weighting = DomainWeights(2)
    assert weighting(jnp.array([5.0, 7.0]), INPUTS).tolist() == [[7.0], [5.0]]
    for source in (2, -1):
        strange = INPUTS._replace(source=jnp.array([0, source]))
        assert np.isnan(weighting(jnp.array([5.0, 7.0]), strange)).ravel().tolist() == [False, True]


def test_the_source_feature_needs_to_know_how_many_there_are():
    with pytest.raises(ValueError, match="The feature 'source' is one-hot and needs to know how"):
        TokenWeights(("loss", "source"))


def test_an_unknown_feature_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="No feature is called 'entropy'. There are: example_loss"):
        ExampleWeights(("entropy",))


def test_normalised_weights_have_mean_one_and_zeros_do_not_become_nan():
    weights = jnp.array([[0.5, 1.5], [4.0, 2.0]])
    np.testing.assert_allclose(mean_one(weights), weights / 2)
    value, slope = jax.value_and_grad(lambda w: mean_one(w).sum())(jnp.zeros((2, 2)))
    assert value == 0 and np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("squash", "found"),
    [
        (lambda score: score, "turns the score -20 into the weight -20"),
        (jax.nn.relu, "turns the score -20 into the weight 0"),
        (lambda score: 1 - score, "turns the score 20 into the weight -19"),
        (jnp.log, "into the weight nan"),
    ],
)
def test_weights_that_go_negative_or_all_zero_are_refused(squash, found):
    with pytest.raises(ValueError, match=f"{re.escape(found)}, but weights are positive: a neg"):
        loss_weights(DomainWeights(2), squash=squash)


@pytest.mark.parametrize(
    ("normalize", "found"),
    [
        (lambda weights: weights - weights.mean(), "from -1 to 1.5"),
        (jnp.zeros_like, "from 0 to 0"),
        (lambda weights: weights / 0, "from inf to inf"),
    ],
)
def test_a_normalisation_to_negative_or_zero_weights_is_refused(normalize, found):
    message = f"`normalize` turns the weights 0.5, 1, 1.5 and 3 into ones {found}, but weights"
    with pytest.raises(ValueError, match=message):
        loss_weights(DomainWeights(2), normalize=normalize)


@dataclasses.dataclass(frozen=True)
class Constant(Weighting):
    """The same array of scores whatever it sees."""

    scores: Any

    def init(self, key):
        return jnp.zeros(1)

    def __call__(self, eta, seen):
        return jnp.asarray(self.scores)


def test_a_weighting_whose_weights_are_all_zero_at_the_start_is_refused():
    with pytest.raises(ValueError, match="Constant begins with a largest score of -1e.09, where"):
        loss_weights(Constant([[-1e9], [-1e9]]))
    with pytest.raises(ValueError, match="begins with a largest score of nan"):
        loss_weights(Constant([[0.0], [np.nan]]))


def test_scores_of_the_wrong_shape_are_refused():
    message = "Constant returned scores of shape [2] for losses [2, 3], but scores are [batch, 1]"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_weights(Constant([0.0, 0.0]))


# What it reports.


def brute_force(scores, positive):
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    return np.mean(pairs)


@pytest.mark.usefixtures("x64")
def test_auc_is_the_share_of_pairs_in_order_ties_counting_half():
    random = np.random.RandomState(0)
    for n in (2, 3, 10, 60):
        scores = random.randint(0, 5, n).astype(float)  # many ties
        positive = np.arange(n) % 3 == 0
        assert abs(jax.jit(auc)(scores, positive) - brute_force(scores, positive)) < 1e-12


def test_auc_of_one_of_a_half_and_of_what_cannot_be_said():
    positive = jnp.array([True, True, False, False])
    assert auc(jnp.array([2.0, 3.0, 1.0, 0.0]), positive) == 1
    assert auc(jnp.array([0.0, 1.0, 2.0, 3.0]), positive) == 0
    assert auc(jnp.ones(4), positive) == 0.5
    assert np.isnan(auc(jnp.ones(4), jnp.ones(4, bool)))
    assert np.isnan(auc(jnp.array([jnp.nan, 1.0, 2.0, 3.0]), positive))


def test_metrics_say_what_clean_and_corrupted_examples_weigh():
    (_, aux), _ = solve(loss_weights(DomainWeights(4)))
    episode = text()
    weights = 2 / (1 + np.exp(-perturbed(loss_weights(DomainWeights(4)))[episode.query.source]))
    corrupted = np.asarray(episode.query.corrupted)
    expected = {
        "weight_min": weights.min(),
        "weight_mean": weights.mean(),
        "weight_clean": weights[~corrupted].mean(),
        "weight_corrupted": weights[corrupted].mean(),
        "weight_auc": brute_force(weights, ~corrupted),
    }
    assert aux.metrics.keys() == expected.keys()
    assert_close(aux.metrics, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_task_that_does_not_know_what_is_corrupted_reports_no_separation():
    tasks = Text.create("abcd" * 9, "abcd" * 9, length=3, inner_steps=2, batch=2, queries=2)
    tasks = dataclasses.replace(tasks, train=tasks.train._replace(tokens=tasks.train.tokens % 4))
    episode = jax.jit(lambda: tasks.sample(KEY))()
    episode = Episode(episode.support, episode.query._replace(inputs=episode.query.inputs % 4))
    (_, aux), _ = solve(loss_weights(DomainWeights(1)), episode=episode)
    assert aux.metrics.keys() == {"weight_min", "weight_mean"}


@pytest.mark.slow
@pytest.mark.parametrize("weighting", [DomainWeights(8), ExampleWeights()], ids=["domain", "net"])
def test_it_learns_to_leave_noise_out(weighting):
    tasks = Text.create(
        *("abcd" * 100, "abcd" * 50),
        length=12,
        inner_steps=6,
        batch=8,
        queries=16,
        probes=16,
        pieces=8,
        corruption=Corruption(0.5, ("random",)),
        tokenizer=LETTERS,
    )
    algorithm = loss_weights(weighting, optimizer=optax.sgd(2.0), normalize=mean_one)
    trainer = Trainer(algorithm, MixedFlow(), optax.adam(0.1), tasks_per_step=4)
    start = trainer.init(KEY)
    state = trainer.fit(tasks, 60, key=KEY, progress=False)
    before, after = (
        trainer.evaluate(eta, tasks, jax.random.key(9), 20) for eta in (start.eta, state.eta)
    )
    assert before["weight_auc"].mean == 0.5 and after["weight_auc"].mean > 0.99
    assert after["weight_clean"].mean > 4 * after["weight_corrupted"].mean
    assert after["loss"].mean + after["loss"].ci95 < before["loss"].mean - before["loss"].ci95
