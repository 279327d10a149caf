"""MAML++ against the same written out, against MAML in its limits, and its annealing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML, MAMLPlusPlus, squared_error
from tests.cases import MODELS, TASKS, Float64, to_float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
MODEL = Float64(MODELS["Functions"])
KEY = jax.random.key(0)
T = 3
EXACT = MixedFlow()
ENGINES = quick([Reverse(), EXACT], lambda engine: engine == EXACT)


def predict(params, x):
    return jnp.tanh(x @ params["body"]) @ params["head"]


def error(params, data):
    return jnp.mean((predict(params, data[0]) - data[1]) ** 2)


def episode():
    return to_float64(TASKS["Sinusoid"].sample(jax.random.key(1)))


def algorithm(**options):
    return MAMLPlusPlus(MODEL, squared_error, **{"rate": 0.1, "inner_steps": T, **options})


def generic(eta):
    """Rates that differ from step to step and from array to array."""
    rates = [rate * (1 + 0.3 * i + 0.2 * jnp.arange(len(rate))) for i, rate in enumerate(eta.rates)]
    return eta._replace(rates=rates)


def at(algorithm, step):
    return algorithm if step is None else algorithm.at_outer_step(jnp.asarray(step))


def meta_gradient(algorithm, eta, step=None, engine=EXACT):
    now = at(algorithm, step)
    unroll, batches = now.unroll(episode(), KEY), now.batches(episode(), KEY)
    (loss, _), grads = jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches))(eta)
    return loss, grads


def by_hand(eta, weights, stop=False):
    """The weighted query losses of T steps from eta; `stop`: of first order."""
    support, query = episode()
    theta, total = dict(zip(("body", "head"), eta.params, strict=True)), 0.0
    for t in range(T):
        grads = jax.grad(error)(theta, support)
        grads = jax.lax.stop_gradient(grads) if stop else grads
        rates = dict(zip(("body", "head"), (r[t] for r in eta.rates), strict=True))
        theta = jax.tree.map(lambda p, r, g: p - r * g, theta, rates, grads)
        total = total + weights[t] * error(theta, query)
    return total


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)  # the weights are float32


@pytest.mark.slow
def test_with_equal_rates_and_the_last_loss_it_is_maml():
    plus, plain = algorithm(), MAML(MODEL, squared_error, optax.sgd(0.1), inner_steps=T)
    eta, maml_eta = plus.init(KEY), plain.init(KEY)
    loss, grads = meta_gradient(plus, eta)
    expected, expected_grads = meta_gradient(plain, maml_eta)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for ours, theirs in zip(grads.params, jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert all((abs(g) > 0).all() for g in grads.rates)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (5, [1 / 6, 1 / 6, 2 / 3]),
        (10, [0, 0, 1]),
        (99, [0, 0, 1]),
        (None, [0, 0, 1]),
    ],
)
def test_the_query_loss_of_every_step_has_a_weight_that_is_annealed(step, weights, engine):
    plus = algorithm(multi_step=10)
    eta = generic(plus.init(KEY))
    loss, grads = meta_gradient(plus, eta, step, engine)
    expected, expected_grads = jax.value_and_grad(by_hand)(eta, weights)
    assert_close((loss, grads), (expected, expected_grads))


@pytest.mark.parametrize(("step", "stop"), [(3, True), (4, False), (None, False)])
def test_inner_gradients_are_constants_before_the_second_order_begins(step, stop):
    plus = algorithm(second_order_from=4)
    eta = generic(plus.init(KEY))
    _, grads = meta_gradient(plus, eta, step)
    assert_close(grads, jax.grad(by_hand)(eta, [0, 0, 1], stop))
    other = jax.grad(by_hand)(eta, [0, 0, 1], not stop)
    assert abs(grads.params[0] - other.params[0]).max() > 1e-4


def test_the_algorithm_of_an_outer_step_adapts_as_after_annealing():
    plus = algorithm(multi_step=10)
    eta, support = generic(plus.init(KEY)), episode().support
    now = plus.at_outer_step(jnp.asarray(0)).adapt(eta, support, KEY)
    assert_close(now.params, plus.adapt(eta, support, KEY).params)


@pytest.mark.slow
def test_a_trainer_anneals_over_its_outer_steps():
    plus = algorithm(multi_step=2, second_order_from=1)
    trainer = Trainer(plus, optimizer=optax.sgd(0.0), tasks_per_step=2)  # eta stays
    tasks, state = TASKS["Sinusoid"], trainer.init(KEY)
    for step in range(4):
        keys = trainer.task_keys(state)
        after, metrics = trainer.step(state, tasks)
        seen = trainer.gradient(state, tasks)[1]
        np.testing.assert_allclose(seen["loss"], metrics["loss"], rtol=1e-6)
        fixed = dataclasses.replace(trainer, algorithm=plus.at_outer_step(jnp.asarray(step)))
        each = [fixed.task_gradient(state.eta, tasks, key)[1]["loss"] for key in keys]
        np.testing.assert_allclose(metrics["loss"], jnp.stack(each).mean(), rtol=1e-6)
        last = trainer.task_gradient(state.eta, tasks, keys[0])[1]["loss"]
        assert np.allclose(each[0], last, rtol=1e-6) == (step >= 2)
        state = after


@pytest.mark.slow
@pytest.mark.parametrize("library", ["linen", "haiku"])
def test_batch_normalisation_has_parameters_of_its_own_in_each_step(library):
    model = Float64(MODELS[f"{library}-ConvNet"])
    plus = MAMLPlusPlus(model, rate=0.1, inner_steps=2, per_step="norm")
    data = to_float64(TASKS["FewShot"].sample(KEY))
    eta = plus.init(KEY)
    assert [leaf.shape for leaf in eta.per_step] == [(2, 2), (2, 2)]  # scale and offset
    unroll, batches = plus.unroll(data, KEY), plus.batches(data, KEY)
    grads = jax.jit(lambda eta: MixedFlow().value_and_grad(unroll, eta, batches)[1])(eta)
    for leaf in grads.per_step:
        assert (abs(leaf).max(1) > 1e-9).all() and not np.allclose(leaf[0], leaf[1])
    learner = plus.adapt(eta, data.support, KEY)
    assert jax.tree.structure(learner.params) == jax.tree.structure(model.init(KEY)[0])
    assert learner.steps == 2


@pytest.mark.slow
def test_it_learns_waves_and_its_rates():
    plus = MAMLPlusPlus(MODELS["linen-MLP"], squared_error, 0.02, 3, multi_step=200)
    trainer = Trainer(plus, optimizer=optax.adam(5e-3), tasks_per_step=8)
    waves = TASKS["Sinusoid"]
    state = trainer.fit(waves, 500, key=KEY, progress=False)
    before = trainer.evaluate(trainer.init(KEY).eta, waves, KEY, 200)["loss"].mean
    assert trainer.evaluate(state.eta, waves, KEY, 200)["loss"].mean < 0.9 * before
    assert max(abs(rate - 0.02).max() for rate in state.eta.rates) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: algorithm(rate=0.0), "`MAMLPlusPlus(rate=0.0)`: it is a number above 0."),
        (
            lambda: algorithm(inner_steps=0),
            "`MAMLPlusPlus(inner_steps=0)`: it is an integer, 1 or more.",
        ),
        (
            lambda: algorithm(multi_step=-1),
            "`MAMLPlusPlus(multi_step=-1)`: it is an integer, 0 or more.",
        ),
        (
            lambda: algorithm(per_step="body|head").init(KEY),
            "`MAMLPlusPlus(per_step='body|head')` matches every parameter: the inner loop would "
            'have nothing to change. Take a narrower one, such as "norm".',
        ),
        (
            lambda: algorithm(per_step="norm").init(KEY),
            "No parameter path matches 'norm'. There are: body, head.",
        ),
        (
            lambda: algorithm().with_steps(5),
            "`MAMLPlusPlus.adapt(steps=5)`: its learned rates are of 3 inner steps, and it takes "
            "that many. Leave `steps`.",
        ),
        (
            lambda: Trainer(algorithm(), segment=1),
            "`Trainer(segment=1)` cuts an outer step into programs, which do not know its number, "
            "and `MAMLPlusPlus` anneals its outer loss over the outer steps. Leave `segment`.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
