"""Data weights: a weight per example through a training run, and what scores are worth."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Forward, MixedFlow, Reverse, Trainer
from metalearn.algorithms import (
    FDS,
    DataWeights,
    Hyperparameter,
    attribute,
    attribution_baselines,
    lds,
    leave_k_out,
    predicted_changes,
)
from metalearn.datasets import HeldOut, HostTrainingRuns, Sinusoid, TrainingRuns
from metalearn.models import Functions
from tests.helpers.compilations import compilations
from tests.helpers.selection import quick

REVERSE, N, KEY = Reverse(), 24, jax.random.key(3)
DRAW = np.random.default_rng(0)
INPUTS = DRAW.normal(size=(N, 4)).astype(np.float32)
TARGETS = (INPUTS[:, 0] > 0).astype(np.int32)
QUERIES = [
    (DRAW.normal(size=(m, 4)).astype(np.float32), DRAW.integers(0, 2, m).astype(np.int32))
    for m in (1, 1, 3)
]
MODEL = Functions(
    lambda key: jax.random.normal(key, (4, 2)), lambda params, inputs: jnp.tanh(inputs) @ params
)
WEIGHTS = DataWeights(MODEL, N, inner_steps=6, batch=4, optimizer=optax.sgd(0.2, momentum=0.9))
RUNS = TrainingRuns.create(INPUTS, TARGETS, validation=8)


def trainer(algorithm=WEIGHTS, engine=REVERSE, **options):
    return Trainer(algorithm, engine, tasks_per_step=1, **options)


@functools.cache
def attribution(**options):
    return attribute(trainer(**options), RUNS, KEY, QUERIES)


@pytest.mark.slow
def test_scores_are_minus_the_meta_gradient_of_the_loss_on_the_query_of_the_task():
    """The query of the task, passed as a query set, and none passed, give the same scores."""
    scores = attribute(trainer(), RUNS, KEY)
    grads, metrics = jax.jit(trainer().task_gradient)(WEIGHTS.init(KEY), RUNS, KEY)
    assert scores.scores.shape == (1, N) and scores.losses.shape == (1,)
    np.testing.assert_allclose(scores.scores[0], -grads, atol=1e-7)
    np.testing.assert_allclose(scores.losses[0], metrics["loss"], rtol=1e-6)
    assert (scores.scores[0][scores.reads == 0] == 0).all() and scores.scores.any()


@pytest.mark.slow
def test_reads_count_how_often_the_run_reads_each_example():
    reads = attribution().reads
    assert reads.sum() == 6 * 4 and (reads > 0).sum() == N - 8  # eight are validation examples


@pytest.mark.parametrize(
    ("engine", "segment"),
    quick(
        [(engine, k) for engine in (MixedFlow(), Reverse("step"), Forward()) for k in (None, 2, 4)],
        lambda engine, segment: engine == MixedFlow() and segment == 4,
    ),
    ids=str,
)
@pytest.mark.parametrize("on", quick(["device", "host"], lambda on: on == "host"))
def test_scores_are_the_same_in_every_engine_in_segments_and_on_the_host(engine, segment, on):
    create = HostTrainingRuns.create if on == "host" else TrainingRuns.create
    tasks = create(INPUTS, TARGETS, validation=8)
    scores = attribute(trainer(engine=engine, segment=segment), tasks, KEY, QUERIES)
    np.testing.assert_allclose(scores.scores, attribution().scores, atol=1e-6)
    np.testing.assert_allclose(scores.losses, attribution().losses, rtol=1e-6)
    np.testing.assert_array_equal(scores.reads, attribution().reads)


@pytest.mark.slow
def test_query_sets_share_the_forward_pass():
    """Of four query sets, the work beyond that of one is the backward pass of three more."""
    from metalearn.cost import cost

    wide = Functions(
        lambda key: jax.random.normal(key, (4, 64)) / 8, lambda params, inputs: inputs @ params
    )
    gradients = trainer(dataclasses.replace(WEIGHTS, model=wide), MixedFlow()).query_gradients
    eta = WEIGHTS.init(KEY)

    def flops(count):
        inputs, targets = (np.stack([part] * count) for part in QUERIES[0])
        queries = inputs, targets, np.zeros((count, 1), np.int32)
        tasks = gradients.with_queries(RUNS, KEY, queries)
        return cost(gradients.program, eta, tasks, KEY).flops

    one, four = flops(1), flops(4)
    assert four < 3 * one  # not 4


@pytest.mark.slow
def test_a_weight_of_zero_is_the_run_without_the_example():
    """In full batches of SGD, the weight zero gives the gradient sum of the others over B."""
    tasks = HeldOut.create(INPUTS, TARGETS, INPUTS + 1, TARGETS)
    algorithm = DataWeights(MODEL, N, inner_steps=1, batch=N, optimizer=optax.sgd(1.0))
    weights = algorithm.init(KEY).at[5].set(0)

    def trained(weights):
        learner = algorithm.adapt(weights, (INPUTS, TARGETS), KEY)
        return learner.params

    def summed(params, keep):
        logits = jnp.tanh(INPUTS) @ params
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
        return losses[keep].sum() / N

    others = np.arange(N) != 5
    start = trained(weights * 0)  # nothing is learned
    expected = start - jax.grad(summed)(start, np.flatnonzero(others))
    np.testing.assert_allclose(trained(weights), expected, rtol=1e-5)
    assert jax.eval_shape(tasks.sample, KEY).support[0].shape == (N, 4)


@pytest.mark.slow
def test_the_examples_of_a_group_share_a_weight_and_tokens_have_their_own():
    groups = np.arange(N) % 3
    of_groups = dataclasses.replace(WEIGHTS, groups=groups)
    scores = attribute(trainer(of_groups), RUNS, KEY, QUERIES[:1]).scores
    of_examples = attribution().scores[0]
    summed = [of_examples[groups == group].sum() for group in range(3)]
    np.testing.assert_allclose(scores, [summed], atol=1e-6)


@pytest.mark.slow
def test_scores_of_tokens_sum_to_those_of_examples():
    tokens = DRAW.integers(0, 5, (N, 3)).astype(np.int32)
    model = Functions(lambda key: jax.random.normal(key, (5, 5)), lambda params, x: params[x])
    tasks = HeldOut.create(tokens, tokens, tokens[:2] + 0, tokens[:2])
    whole = dataclasses.replace(WEIGHTS, model=model)
    queries = [(4 - tokens[:1], tokens[:1])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [
            attribute(trainer(each), tasks, KEY, queries).scores[0]
            for each in (whole, dataclasses.replace(whole, tokens=3))
        ]
    assert scores[1].shape == (N, 3)
    np.testing.assert_allclose(scores[1].sum(1), scores[0], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"has weights \[2\] for each example, whose losses are \[3\]"
    ):
        attribute(trainer(dataclasses.replace(whole, tokens=2)), tasks, KEY, queries)


@pytest.mark.slow
def test_scores_predict_training_without_an_example():
    without = leave_k_out(trainer(), RUNS, KEY, QUERIES, k=1, runs=12)
    assert without.rows.shape == (12, 1) and without.changes.shape == (12, 3)
    predicted = predicted_changes(attribution().scores, without.rows)
    assert lds(predicted, without.changes).mean > 0.9
    cheap = attribution_baselines(trainer(), RUNS, KEY, QUERIES)
    assert cheap.cosine.shape == (3, N) and (np.abs(cheap.cosine) < 1.001).all()
    assert cheap.loss.shape == (N,) and (cheap.loss > 0).all()


def test_the_outer_loss_may_be_any_function_of_the_trained_model():
    def norm(learner, inputs, targets):
        return (learner.params**2).sum(), {"queries": jnp.asarray(len(targets))}

    algorithm = dataclasses.replace(WEIGHTS, outer_loss=norm)
    grads, metrics = jax.jit(trainer(algorithm).task_gradient)(WEIGHTS.init(KEY), RUNS, KEY)
    learner = algorithm.adapt(WEIGHTS.init(KEY), RUNS.sample(KEY).support, KEY)
    assert metrics["queries"] == 8 and np.any(grads != 0)
    assert jnp.isfinite(learner.params).all()


def test_an_outer_optimizer_keeps_weights_within_bounds():
    optimizer = WEIGHTS.outer_optimizer(optax.sgd(1e6))
    state = trainer(optimizer=optimizer).fit(RUNS, 1, key=KEY, progress=False)
    assert set(np.unique(state.eta)) == {0.0, 1.0, 2.0}


def test_lds_is_the_rank_correlation_with_a_bootstrap_interval():
    changes = DRAW.normal(size=(30, 2))
    assert lds(np.exp(changes), changes) == (1.0, 1.0, 1.0)
    assert lds(-changes, changes).mean == -1
    noisy = lds(changes + DRAW.normal(size=changes.shape), changes)
    assert noisy.low < noisy.mean < noisy.high
    assert lds(np.ones_like(changes), changes).mean == 0  # no order, no correlation


# Wrong inputs.


def test_queries_that_are_training_examples_are_counted():
    rows = np.asarray(RUNS.sample(jax.random.split(KEY, 4)[0]).support[2])
    seen = [(INPUTS[rows[:2]], TARGETS[rows[:2]]), QUERIES[0]]
    with pytest.warns(UserWarning, match=r"2 of the 3 query examples are training examples too"):
        attribute(trainer(), RUNS, KEY, seen)


def test_a_number_of_weights_that_is_not_that_of_the_examples_is_refused():
    wrong = trainer(dataclasses.replace(WEIGHTS, examples=20))
    for create in (TrainingRuns.create, HostTrainingRuns.create):
        tasks = create(INPUTS, TARGETS, validation=8)
        with pytest.raises(ValueError, match=r"have 24 rows, .* take examples=24"):
            attribute(wrong, tasks, KEY, QUERIES[:1], check_overlap=False)
    with pytest.raises(ValueError, match=r"weights of the shape \[3\], but has one for each exam"):
        attribute(trainer(), RUNS, KEY, QUERIES[:1], eta=jnp.ones(3))


def test_leaving_everything_out_is_refused():
    with pytest.raises(ValueError, match=r"`leave_k_out\(k=16\)` leaves nothing .* reads 16 exam"):
        leave_k_out(trainer(), RUNS, KEY, QUERIES, k=16)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda learner, inputs, targets: (inputs**2).sum(), "does not depend on the parameters"),
        (lambda learner, inputs, targets: learner.predict(inputs)[:, 0], r"an array \[1\], but"),
    ],
)
def test_an_outer_loss_that_cannot_be_one_is_refused(loss, words):
    with pytest.raises(ValueError, match=words):
        attribute(trainer(dataclasses.replace(WEIGHTS, outer_loss=loss)), RUNS, KEY, QUERIES[:1])


class Changing:
    """A source whose items are other ones when they are read again."""

    def __init__(self):
        self.noise = np.random.default_rng(0)

    def __len__(self):
        return N

    def __getitem__(self, row):
        return INPUTS[row] + self.noise.normal(), TARGETS[row]


def test_a_source_that_is_not_deterministic_is_refused():
    tasks = HostTrainingRuns.create(Changing(), validation=8)
    with pytest.raises(ValueError, match="other data than when it was read before"):
        attribute(trainer(segment=2), tasks, KEY, QUERIES[:1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {
                "trainer": Trainer(
                    FDS(MODEL, {"learning_rate": Hyperparameter(0.1, 1.0, 0.5)}, 2, 2)
                )
            },
            "FDS",
        ),
        ({"tasks": Sinusoid()}, "takes training runs"),
        ({"key": 0}, "takes a key, not 0"),
        ({"queries": QUERIES[0][0]}, "is a list of query sets"),
        ({"queries": QUERIES[0]}, r"no pair \(inputs \[m, ...\], targets \[m, ...\]\)"),
        ({"queries": [(INPUTS[0], TARGETS[0])]}, r"those of the dataset are \[4\] each"),
        ({"queries": [(INPUTS[:2], TARGETS[:1])]}, "2 inputs and 1 targets"),
    ],
    ids=lambda options: next(iter(options)) if isinstance(options, dict) else "",
)
def test_what_has_no_scores_is_refused(options, words):
    inputs = {"trainer": trainer(), "tasks": RUNS, "key": KEY, "queries": QUERIES[:1], **options}
    with pytest.raises((TypeError, ValueError), match=words):
        attribute(**inputs)


def test_groups_and_bounds_are_checked():
    with pytest.raises(ValueError, match="names the group of each of the 24 examples"):
        dataclasses.replace(WEIGHTS, groups=(0, 1))
    with pytest.raises(ValueError, match=r"a pair \(lowest, highest\) around one"):
        dataclasses.replace(WEIGHTS, bounds=(0.0, 0.5))


def test_several_query_sets_need_one_full_run_on_one_device():
    from metalearn import Truncation

    truncated = trainer(truncation=Truncation(2))
    with pytest.raises(ValueError, match=r"this trainer has truncation="):
        attribute(truncated, RUNS, KEY, QUERIES)


def test_an_inner_loop_that_reads_the_query_set_is_not_cut():
    from metalearn.algorithms import MAMLPlusPlus, squared_error

    net = Functions(lambda key: jnp.ones((1, 1)), lambda params, inputs: inputs @ params)
    reader = MAMLPlusPlus(net, squared_error, inner_steps=2, multi_step=10)
    query = Sinusoid().sample(KEY).query
    queries = jax.tree.map(lambda leaf: leaf[None], query)
    algorithm = reader.at_outer_step(jnp.zeros((), jnp.int32))
    gradients = Trainer(WEIGHTS, MixedFlow(), segment=1).query_gradients
    gradients = dataclasses.replace(gradients, algorithm=algorithm)
    with pytest.raises(ValueError, match="reads the query set"):
        gradients(algorithm.init(KEY), Sinusoid(), KEY, queries)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks", [RUNS, HostTrainingRuns.create(INPUTS, TARGETS, validation=8)], ids=["device", "host"]
)
def test_the_backward_pass_of_query_sets_is_compiled_once_and_ahead(tasks):
    gradients = trainer(engine=MixedFlow(), segment=2).query_gradients
    shapes = jax.eval_shape(RUNS.sample, KEY).query
    queries = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape), leaf.dtype), shapes)
    with compilations() as programs:
        for _ in range(2):
            gradients(WEIGHTS.init(KEY), tasks, KEY, queries)
    threads = [thread for name, thread in programs if name == "pull_back"]
    assert len(threads) == 1 and threads[0].startswith("compile"), programs
