"""`Algorithm.adapt`: what was learned, applied to a support set, predicts as an evaluation does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Algorithm, Learner, Trainer, Unroll
from metalearn.algorithms import (
    MAML,
    Hyperparameter,
    LearnedOptimizer,
    Quadratic,
    TunedRule,
    squared_error,
)
from metalearn.algorithms.epochs import InEpochs
from metalearn.tasks import draw_episode
from tests.cases import ALGORITHMS, CONV_MAML, MODELS, TASKS, Float64, conv_net, to_float64
from tests.helpers.selection import quick

KEY = jax.random.key(3)
COUNT = 3
# Inside its annealing an outer step of MAML++ has a loss of its own, of all inner steps.
LEFT_OUT = ("first-order", "MAML++-annealing")
CASES = {**{n: c for n, c in ALGORITHMS.items() if n not in LEFT_OUT}, "transductive": CONV_MAML}
PAIRS = [(name, library) for name in CASES for library in ("linen", "nnx", "haiku", "equinox")]
PLAIN = ("MAML", "Functions")  # the model of two plain functions
QUICK = {
    *(PLAIN, ("ANIL", "linen"), ("MAML", "equinox")),
}


def start(algorithm):
    return _start(algorithm, jax.config.jax_enable_x64)


@functools.cache
def _start(algorithm, x64):
    return jax.jit(algorithm.init)(KEY)


def problem(name, library):
    if library == "Functions":
        return CASES[name].make(Float64(MODELS["Functions"]), squared_error), TASKS["Sinusoid"]
    return CASES[name].problem(library)


def query_loss(algorithm, learner, query):
    """Return the outer loss of a learner's predictions, as one writes it by hand."""
    if isinstance(algorithm, (LearnedOptimizer, InEpochs)):
        inputs, targets = query[0][query[2]], query[1][query[2]]
    else:
        inputs, targets = query[0], query[1]
    outputs = learner.predict(inputs)
    if hasattr(algorithm, "loss_fn"):
        losses = algorithm.loss_fn(outputs, targets).mean(1)
        return losses[~query.corrupted].mean()
    if isinstance(algorithm, LearnedOptimizer):
        algorithm = algorithm.problem
    return algorithm.objective(outputs, targets)[0]


@pytest.mark.parametrize(("name", "library"), quick([*PAIRS, PLAIN], lambda *pair: pair in QUICK))
def test_predictions_of_an_adapted_learner_have_the_loss_that_evaluate_averages(name, library, x64):
    algorithm, tasks = problem(name, library)
    eta = start(algorithm)
    metrics = Trainer(algorithm, tasks_per_step=COUNT).evaluate(eta, tasks, KEY, COUNT)
    expected = metrics["validation_loss" if name == "LearnedOptimizer" else "loss"].mean
    losses = []
    for key in jax.random.split(KEY, COUNT):
        episode = draw_episode(tasks, key)
        learner = algorithm.adapt(eta, episode.support, key)
        losses.append(query_loss(algorithm, learner, episode.query))
    np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-10)


@pytest.fixture(scope="module")
def anil():
    with jax.enable_x64(True):
        algorithm = MAML(
            Float64(MODELS["linen-MLP"]), squared_error, optax.sgd(0.1), adapted="head"
        )
        return algorithm, start(algorithm)


def episodes(n):
    keys = jax.random.split(KEY, n)
    return to_float64(jax.vmap(TASKS["Sinusoid"].sample)(keys)), keys


def support(shots=3):
    inputs = jnp.linspace(-1, 1, shots)[:, None]
    return inputs, 2 * inputs + 1


def test_a_learner_has_all_parameters_of_the_model_and_those_that_do_not_adapt_are_eta(anil, x64):
    algorithm, eta = anil
    learner = algorithm.adapt(eta, support(), KEY)
    assert jax.tree.structure(learner.params) == jax.tree.structure(eta.params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), learner.params, eta.params)
    assert all(changed["head"].values()) and not any(changed["hidden_0"].values())
    outputs, _ = algorithm.model.apply(learner.params, {}, support()[0], train=False)
    np.testing.assert_allclose(learner.predict(support()[0]), outputs, rtol=1e-12)


def test_a_learner_takes_the_inner_steps_of_an_evaluation_or_as_many_as_it_is_told(anil, x64):
    algorithm, eta = anil
    seven = MAML(algorithm.model, squared_error, optax.sgd(0.1), eval_steps=7, adapted="head")
    assert algorithm.adapt(eta, support(), KEY).steps == 1
    as_evaluated, told = (
        a.adapt(eta, support(), KEY, steps=n) for a, n in ((seven, None), (algorithm, 7))
    )
    assert as_evaluated.steps == told.steps == 7
    jax.tree.map(np.testing.assert_array_equal, as_evaluated.params, told.params)


def test_learners_of_several_tasks_come_from_one_vmap(anil, x64):
    algorithm, eta = anil
    tasks, keys = episodes(3)
    learners = jax.vmap(algorithm.adapt, in_axes=(None, 0, 0))(eta, tasks.support, keys)
    together = jax.vmap(Learner.predict)(learners, tasks.query[0])
    for i in range(3):
        alone = algorithm.adapt(eta, jax.tree.map(lambda x, i=i: x[i], tasks.support), keys[i])
        np.testing.assert_allclose(together[i], alone.predict(tasks.query[0][i]), rtol=1e-10)


def test_a_second_task_of_the_same_shape_compiles_nothing(anil, x64):
    algorithm, eta = anil
    traces = []

    def counted(outputs, targets):
        traces.append(0)
        return squared_error(outputs, targets)

    algorithm = MAML(algorithm.model, counted, optax.sgd(0.1))
    tasks, keys = episodes(2)
    first, second = (
        algorithm.adapt(eta, jax.tree.map(lambda x, i=i: x[i], tasks.support), keys[i])
        for i in range(2)
    )
    assert len(traces) == 1
    kinds = jax.tree.structure(first), jax.tree.structure(second)
    assert kinds[0] == kinds[1] and hash(kinds[0]) == hash(kinds[1])  # so `predict` is one program


def test_a_learner_goes_through_jit_and_back(anil, x64):
    algorithm, eta = anil
    learner = algorithm.adapt(eta, support(), KEY)
    back, outputs = jax.jit(lambda learner, x: (learner, learner.predict(x)))(learner, support()[0])
    np.testing.assert_allclose(back.predict(support()[0]), outputs, rtol=1e-12)
    assert (back.steps, repr(back).split("(")[0]) == (1, "Learner")


@pytest.mark.slow
def test_transductive_queries_are_predicted_as_a_batch():
    algorithm = MAML(conv_net("linen"), optimizer=optax.sgd(0.1))
    episode = jax.jit(TASKS["FewShot"].sample)(KEY)
    learner = algorithm.adapt(start(algorithm), episode.support, KEY)
    inputs = episode.query[0]
    assert abs(learner.predict(inputs)[:2] - learner.predict(inputs[:2])).max() > 1e-4


def test_a_learned_schedule_trains_on_a_dataset_stretched_to_the_steps_it_is_told():
    algorithm, _ = ALGORITHMS["FDS"].problem("linen")
    data = np.eye(5, dtype=np.float32), np.arange(5)
    eta = start(algorithm)
    learners = {n: algorithm.adapt(eta, data, KEY, steps=n) for n in (None, 6)}
    assert [learner.steps for learner in learners.values()] == [3, 6]
    rows = jnp.arange(5, dtype=jnp.int32)
    whole = algorithm.adapt(eta, (*data, rows), KEY)
    jax.tree.map(np.testing.assert_array_equal, learners[None].params, whole.params)


def test_images_that_are_integers_are_scaled_where_the_inner_loop_scales_them():
    algorithm, _ = ALGORITHMS["FDS"].problem("linen")
    pixels = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1) * 3
    model = conv_net("linen", outputs=5)
    algorithm = dataclasses.replace(algorithm, model=model)
    learner = algorithm.adapt(start(algorithm), (pixels, np.arange(5)), KEY)
    np.testing.assert_allclose(
        learner.predict(pixels), learner.predict(np.float32(pixels) / 255), rtol=1e-5
    )


# What is refused.


def refused(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}")


@functools.cache
def classifier(outputs=3, **options):
    return MAML(conv_net("linen", outputs=outputs), optimizer=optax.sgd(0.1), **options)


IMAGES = np.zeros((4, 4, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (IMAGES, ValueError, "takes (inputs, targets), leaves [n, ...], but got an array [4, 4, 4"),
        ((IMAGES,), ValueError, "takes (inputs, targets), leaves [n, ...], but got a tuple of 1."),
        (None, ValueError, "takes (inputs, targets), leaves [n, ...], but got a NoneType. Pass a"),
        (
            (IMAGES, np.arange(3)),
            ValueError,
            "takes inputs and targets [n, ...], alike in those axes, but got inputs [4, 4, 4, 1] "
            "and targets [3]. Give each input its target.",
        ),
        (
            (IMAGES, [0, 1, 2, 0]),
            ValueError,
            "got a list of 4 as its targets, which are one array [n, ...]. Pass "
            "`np.asarray(targets)`.",
        ),
        ((IMAGES, np.int32(0)), ValueError, "got targets of the shape [], which are [n, ...]."),
    ],
)
def test_a_support_set_of_the_wrong_structure_is_refused(given, kind, message):
    algorithm = classifier()
    with refused(kind, f"`MAML.adapt(support=)` {message}"):
        algorithm.adapt(start(algorithm), given, KEY)


def test_an_empty_support_set_is_refused():
    algorithm = classifier()
    message = (
        "`MAML.adapt(support=)[0]` has the shape [0, 4, 4, 1]: it is empty, and there is nothing "
        "to adapt to. Pass an example at least."
    )
    with refused(ValueError, message):
        algorithm.adapt(start(algorithm), (IMAGES[:0], np.arange(0)), KEY)


def test_labels_beyond_the_outputs_are_refused_in_the_first_call_and_in_later_ones():
    algorithm = classifier(outputs=3)
    eta, good, bad = start(algorithm), np.arange(4) % 3, np.arange(4)
    message = "The labels go from 0 to 3, but the network has 3 outputs, and `cross_entropy` takes"
    for labels in (bad, good, bad):
        if labels is bad:
            with refused(ValueError, message):
                algorithm.adapt(eta, (IMAGES, labels), KEY)
        else:
            algorithm.adapt(eta, (IMAGES, labels), KEY)


@pytest.mark.parametrize(
    ("eta", "message"),
    [
        (
            lambda: start(classifier(outputs=2)),
            "is of another model: params/head/bias has the shape [2], and in this one [3]. Pass "
            "the eta that this MAML has learned (`Trainer.learned(state)`), or build it with the "
            "model that this eta is of.",
        ),
        (
            lambda: start(classifier(learned_rates=0.1)),
            "is of another model or algorithm: it has rates/0, rates/1, rates/2",
        ),
        (
            lambda: start(classifier())._replace(params={}),
            "is of another model or algorithm: it lacks params/conv_0/bias, ",
        ),
        (
            lambda: {"params": start(classifier()).params, "rates": None},
            "is a dict with the right leaves, and it is a Initialisation, a tree like that of",
        ),
    ],
)
def test_an_eta_of_another_model_is_refused(eta, message):
    with refused(ValueError, f"`MAML.adapt(eta=)` {message}"):
        classifier().adapt(eta(), (IMAGES, np.arange(4) % 3), KEY)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_another_number_of_steps_is_an_integer_of_at_least_one(steps):
    algorithm = classifier()
    with refused(ValueError, f"`MAML.adapt(steps={steps})`: it is an integer, 1 or more."):
        algorithm.adapt(start(algorithm), (IMAGES, np.arange(4) % 3), KEY, steps=steps)


def test_a_seed_is_no_key():
    algorithm = classifier()
    with refused(TypeError, "`MAML.adapt(key=)` takes a key, not 0. Of a seed: `jax.random.key(0)"):
        algorithm.adapt(start(algorithm), (IMAGES, np.arange(4) % 3), 0)


def test_an_algorithm_that_steps_over_its_batches_takes_no_other_number_of_steps():
    algorithm, tasks = ALGORITHMS["LearningRates"].problem("linen")
    given = tasks.sample(KEY).support
    message = (
        "`LearningRates.adapt(steps=2)`: LearningRates takes an inner step for each of its "
        "batches. Pass a support set of 2 batches and leave `steps`;"
    )
    with refused(ValueError, message):
        algorithm.adapt(start(algorithm), given, KEY, steps=2)
    message = "`LearningRates.adapt(support=)` got targets of the shape [3], which are [T, batch, "
    with refused(ValueError, message):
        algorithm.adapt(start(algorithm), (given[0], np.zeros(3)), KEY)


@pytest.mark.slow
def test_examples_without_a_source_are_batches_of_loss_weights():
    algorithm, _ = ALGORITHMS["example-weights"].problem("linen")
    tokens = np.zeros((3, 4, 5), np.int32)
    message = (
        "`LossWeights.adapt(support=)` got a tuple of 3, but takes (inputs, targets), leaves "
        "[T, batch, ...], or batches with the fields `inputs`, `targets` and `source`"
    )
    with refused(ValueError, message):
        algorithm.support_set((tokens, tokens, 0))
    pair = algorithm.support_set((tokens, tokens))
    assert pair.inputs is tokens and pair.source is None


def test_a_problem_without_inputs_has_params_and_no_predictions():
    rule = TunedRule(optax.sgd, {"learning_rate": Hyperparameter(0.01, 1.0, 0.1)})
    algorithm = LearnedOptimizer(Quadratic(3), rule, inner_steps=2)
    learner = algorithm.adapt(start(algorithm), TASKS["Quadratics"].sample(KEY).support, KEY)
    assert learner.params.shape == (3,) and learner.steps == 2
    with refused(TypeError, "`Quadratic` has no inputs to predict from: its result is theta"):
        learner.predict(jnp.ones(3))


@dataclasses.dataclass(frozen=True)
class Bare(Algorithm):
    """The least that an algorithm may be: theta is moved towards each number of the support."""

    def init(self, key):
        del key
        return jnp.zeros(())

    def unroll(self, episode, key):
        del key

        def step(eta, theta, batch, grad):
            return theta - 0.1 * grad(lambda theta: (theta - batch) ** 2)(theta)

        return Unroll(lambda eta: eta, step, lambda eta, theta: ((theta - episode.query) ** 2, {}))


class Told(Bare):
    """The same, which says that theta is its model."""

    def trained(self, eta, state):
        return state, ()

    def predict(self, params, statistics, inputs, key):
        return params + inputs


@pytest.mark.slow
def test_an_algorithm_of_ones_own_adapts_once_it_says_what_its_trained_model_is():
    message = (
        "`Bare.adapt` returns a trained model, and Bare does not say what that is. Give it the "
        "methods `trained(eta, state) -> (params, statistics)` and `predict(params, statistics, "
        "inputs, key) -> outputs`; see `metalearn.Algorithm`."
    )
    with refused(TypeError, message):
        Bare().adapt(jnp.zeros(()), jnp.ones(2), KEY)
    learner = Told().adapt(jnp.zeros(()), jnp.ones(2), KEY)
    np.testing.assert_allclose(learner.params, 0.36, rtol=1e-6)  # 0, 0.2, 0.36
    np.testing.assert_allclose(learner.predict(jnp.ones(1)), [1.36], rtol=1e-6)
    with refused(ValueError, "`Told.adapt(support=)` is [], which holds no arrays: there is noth"):
        Told().adapt(jnp.zeros(()), [], KEY)
    with refused(TypeError, "`Told.adapt(support=)[0]` is a float, but a support set is arrays"):
        Told().adapt(jnp.zeros(()), [1.0], KEY)
