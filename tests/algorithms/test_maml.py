"""MAML and its relatives against the same thing written out in plain JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Implicit, MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML, cross_entropy, squared_error
from tests.cases import MODELS, TASKS, Float64, to_float64

pytestmark = pytest.mark.usefixtures("x64")
MODEL = Float64(MODELS["Functions"])
KEY = jax.random.key(0)


def predict(params, x):
    return jnp.tanh(x @ params["body"]) @ params["head"]


def error(params, data):
    return jnp.mean((predict(params, data[0]) - data[1]) ** 2)


def episode():
    return to_float64(TASKS["Sinusoid"].sample(jax.random.key(1)))


def maml(optimizer=None, **options):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return MAML(MODEL, squared_error, optimizer, **{"inner_steps": 2, **options})


def meta_gradient(algorithm, eta, engine=None):
    """((loss, aux), gradient) on `episode()`."""

    @jax.jit
    def run(eta):
        unroll = algorithm.unroll(episode(), KEY)
        return (engine or MixedFlow()).value_and_grad(
            unroll, eta, algorithm.batches(episode(), KEY)
        )

    return run(eta)


def assert_close(ours, by_hand):
    assert jax.tree.structure(ours) == jax.tree.structure(by_hand)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_maml_is_gradient_descent_from_the_initialisation():
    def by_hand(params):
        support, query = episode()
        adapted = params
        for _ in range(2):
            grads = jax.grad(error)(adapted, support)
            adapted = jax.tree.map(lambda p, g: p - 0.1 * g, adapted, grads)
        return error(adapted, query)

    eta = maml().init(KEY)
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(eta.params)
    (ours, _), our_grads = meta_gradient(maml(), eta)
    assert_close(ours, loss)
    assert_close(our_grads.params, grads)
    assert our_grads.rates is None


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.sgd(0.1, momentum=0.9, nesterov=True), marks=pytest.mark.slow),
        pytest.param(optax.rmsprop(0.05, eps=1e-3, eps_in_sqrt=True), marks=pytest.mark.slow),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, eps_root=1e-4)),
            marks=pytest.mark.slow,
        ),
        optax.sgd(optax.linear_schedule(0.2, 0.1, 2)),
    ],
    ids=["nesterov", "rmsprop", "clip-adamw", "schedule"],
)
def test_the_inner_optimizer_is_any_of_optax(optimizer):
    def by_hand(params):
        support, query = episode()
        adapted, state = params, optimizer.init(params)
        for _ in range(3):
            grads = jax.grad(error)(adapted, support)
            updates, state = optimizer.update(grads, state, adapted)
            adapted = optax.apply_updates(adapted, updates)
        return error(adapted, query)

    algorithm = maml(optimizer, inner_steps=3)
    eta = algorithm.init(KEY)
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(eta.params)
    (ours, _), our_grads = meta_gradient(algorithm, eta)
    assert_close(ours, loss)
    assert_close(our_grads.params, grads)


def test_meta_sgd_learns_a_rate_for_every_parameter():
    algorithm = maml(optax.sgd(1.0), learned_rates=0.1)
    eta = algorithm.init(KEY)
    assert [r.tolist() for r in eta.rates] == [[[0.1] * 4], [[0.1]] * 4]  # body, head

    def by_hand(params, rates):
        support, query = episode()
        adapted = params
        for _ in range(2):
            grads = jax.grad(error)(adapted, support)
            adapted = jax.tree.map(lambda p, r, g: p - r * g, adapted, rates, grads)
        return error(adapted, query)

    rates = dict(zip(("body", "head"), eta.rates, strict=True))
    loss, (grads, rate_grads) = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(eta.params, rates)
    (ours, _), our_grads = meta_gradient(algorithm, eta)
    assert_close(ours, loss)
    assert_close(our_grads.params, grads)
    assert_close(our_grads.rates, [rate_grads["body"], rate_grads["head"]])
    assert all(abs(g).min() > 1e-6 for g in our_grads.rates)


def test_meta_sgd_learns_rates_of_the_adapted_parameters_alone():
    eta = maml(optax.sgd(1.0), learned_rates=0.1, adapted="body").init(KEY)
    assert [r.shape for r in eta.rates] == [(1, 4)]


def test_anil_adapts_the_head_alone_and_learns_all():
    algorithm = maml(adapted="head")
    eta = algorithm.init(KEY)

    def by_hand(params):
        support, query = episode()
        head = params["head"]
        for _ in range(2):
            head -= 0.1 * jax.grad(lambda h: error({**params, "head": h}, support))(head)
        return error({**params, "head": head}, query), head

    (_, head), grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(eta.params)
    (_, aux), our_grads = meta_gradient(algorithm, eta)
    assert_close(aux.state.params, [head])
    assert_close(our_grads.params, grads)
    assert abs(our_grads.params["body"]).min() > 1e-6


def test_a_pattern_that_matches_no_parameter_is_refused_with_the_paths_there_are():
    message = "No parameter path matches 'classifier'. There are: body, head."
    algorithm = maml(adapted="classifier")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        algorithm.unroll(episode(), KEY).init(maml().init(KEY))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        maml(adapted="classifier", learned_rates=0.1).init(KEY)


def test_the_old_name_of_the_adapted_parameters_is_refused_with_the_new_one():
    message = "`MAML(adapt=)` is called `adapted` now: `MAML(adapted='head')`."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        maml(adapt="head")


@pytest.mark.parametrize(("steps", "of"), [(0, None), (-1, None), (1, -1)])
def test_less_than_one_inner_step_is_refused(steps, of):
    message = (
        f"MAML adapts in at least one inner step, but inner_steps={steps} and eval_steps={of}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        maml(inner_steps=steps, eval_steps=of)


def test_zero_evaluation_steps_are_refused():
    with pytest.raises(ValueError, match="at least one inner step.*eval_steps=0"):
        maml(eval_steps=0)


def test_evaluation_takes_its_own_number_of_inner_steps():
    algorithm = maml(eval_steps=7)
    eta, tasks, count = algorithm.init(KEY), TASKS["Sinusoid"], 4
    results = {
        name: Trainer(a, tasks_per_step=count).evaluate(eta, tasks, KEY, count)["loss"].mean
        for name, a in {
            "as said": algorithm,
            "seven": maml(inner_steps=7),
            "two": maml(),
        }.items()
    }
    assert results["as said"] == results["seven"] != results["two"]
    assert algorithm.evaluation().inner_steps == 7 and maml().evaluation().inner_steps == 2


def test_inner_losses_are_those_of_the_support_set():
    eta = maml().init(KEY)
    (_, aux), _ = meta_gradient(maml(), eta, Reverse())
    support, _ = episode()
    first, grads = jax.jit(jax.value_and_grad(error))(eta.params, support)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, eta.params, grads)
    assert_close(aux.inner.losses, jnp.stack([first, error(moved, support)])[:, None])


def test_cross_entropy_is_the_mean_surprise_and_counts_hits():
    logits, labels = jnp.log(jnp.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])), jnp.array([0, 1, 1])
    loss, metrics = cross_entropy(logits, labels)
    np.testing.assert_allclose(loss, -np.log([0.7, 0.6, 0.1]).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], 2 / 3)


def test_imaml_adds_the_distance_to_the_initialisation_to_the_inner_loss():
    strength = 3.0

    def by_hand(params):
        support, query = episode()

        def proximal(adapted):
            moved = jax.tree.map(jnp.subtract, adapted, params)
            return error(adapted, support) + strength / 2 * optax.tree.norm(moved, squared=True)

        adapted = params
        for _ in range(2):
            grads = jax.grad(proximal)(adapted)
            adapted = jax.tree.map(lambda p, g: p - 0.1 * g, adapted, grads)
        return error(adapted, query)

    algorithm = maml(proximal=strength)
    eta = algorithm.init(KEY)
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(eta.params)
    (ours, _), our_grads = meta_gradient(algorithm, eta)
    assert_close(ours, loss)
    assert_close(our_grads.params, grads)


@pytest.mark.slow
def test_imaml_has_the_implicit_derivative_as_its_loop_converges():
    """The error of the derivative at the solution falls with the distance that is left to it."""
    implicit = Implicit("cg", iterations=50, tolerance=1e-12, variables="params")
    errors, residuals = [], []
    for steps in (2, 8, 100):
        algorithm = maml(proximal=4.0, inner_steps=steps)
        eta = algorithm.init(KEY)
        _, exact = meta_gradient(algorithm, eta)
        (_, aux), grads = meta_gradient(algorithm, eta, implicit)
        difference = optax.tree.norm(optax.tree.sub(grads.params, exact.params))
        errors.append(float(difference / optax.tree.norm(exact.params)))
        residuals.append(float(aux.metrics["fixed_point_residual"]))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 1e-6
    assert residuals[0] > residuals[1] > residuals[2]


@pytest.mark.slow
def test_imaml_of_anil_keeps_the_head_close_to_its_initialisation():
    far, near = (maml(adapted="head", proximal=p, inner_steps=20) for p in (1e-6, 5.0))
    eta = far.init(KEY)
    moved = [
        float(jnp.linalg.norm(meta_gradient(a, eta)[0][1].state.params[0] - eta.params["head"]))
        for a in (far, near)
    ]
    assert 0 < moved[1] < 0.5 * moved[0]


@pytest.mark.slow
def test_mini_batches_read_each_support_example_once_an_epoch():
    algorithm = maml(inner_steps=3, batch=2)
    keys, rows = algorithm.batches(episode(), KEY)
    assert keys.shape == (3,) and rows.shape == (3, 2)
    assert sorted(rows.ravel().tolist()) == [0, 0, 1, 1, 2, 2]  # three examples, two epochs

    def by_hand(params):
        (inputs, targets), query = episode()
        adapted = params
        for batch in rows:
            grads = jax.grad(error)(adapted, (inputs[batch], targets[batch]))
            adapted = jax.tree.map(lambda p, g: p - 0.1 * g, adapted, grads)
        return error(adapted, query)

    eta = algorithm.init(KEY)
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(eta.params)
    (ours, _), our_grads = meta_gradient(algorithm, eta)
    assert_close(ours, loss)
    assert_close(our_grads.params, grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": 0.0}, "`MAML(proximal=0.0)`: it is a number above 0."),
        ({"batch": 0}, "`MAML(batch=0)`: it is an integer, 1 or more."),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        maml(**options)


def test_a_batch_larger_than_the_support_set_is_refused():
    with pytest.raises(ValueError, match="^batch=4, but there are 3 training examples.$"):
        maml(batch=4).batches(episode(), KEY)
