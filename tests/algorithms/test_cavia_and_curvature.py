"""CAVIA and Meta-Curvature against the same written out, and MAML in their limits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import MixedFlow, Trainer
from metalearn.algorithms import CAVIA, MAML, MetaCurvature, squared_error
from metalearn.algorithms.cavia import with_context
from metalearn.algorithms.meta_curvature import transformed
from metalearn.experiments import build
from metalearn.models import Functions
from tests.cases import MODELS, TASKS, Float64, to_float64

pytestmark = pytest.mark.usefixtures("x64")
MODEL = Float64(MODELS["Functions"])
KEY = jax.random.key(0)


def episode():
    return to_float64(TASKS["Sinusoid"].sample(jax.random.key(1)))


def error(params, data):
    outputs = jnp.tanh(data[0] @ params["body"]) @ params["head"]
    return jnp.mean((outputs - data[1]) ** 2)


def meta_gradient(algorithm, eta):
    unroll, batches = algorithm.unroll(episode(), KEY), algorithm.batches(episode(), KEY)
    (loss, _), grads = jax.jit(lambda eta: MixedFlow().value_and_grad(unroll, eta, batches))(eta)
    return loss, grads


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_meta_curvature_of_identities_is_maml():
    curved = MetaCurvature(MODEL, squared_error, rate=0.1, inner_steps=2)
    plain = MAML(MODEL, squared_error, optax.sgd(0.1), inner_steps=2)
    loss, grads = meta_gradient(curved, curved.init(KEY))
    expected, expected_grads = meta_gradient(plain, plain.init(KEY))
    assert_close((loss, grads.params), (expected, expected_grads.params))
    assert all((abs(g) > 0).any() for factors in grads.factors for g in factors)


def test_meta_curvature_multiplies_each_axis_of_a_gradient():
    keys = jax.random.split(KEY, 4)
    gradient = jax.random.normal(keys[0], (2, 3, 4, 5))
    factors = [
        jax.random.normal(key, (size, size)) for key, size in zip(keys[1:], (6, 4, 5), strict=True)
    ]
    kernel = gradient.reshape(6, 4, 5)
    expected = jnp.einsum("pqr,ap,bq,cr->abc", kernel, *factors).reshape(2, 3, 4, 5)
    np.testing.assert_allclose(transformed(gradient, factors), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_meta_curvature_learns_its_factors_by_hand():
    curved = MetaCurvature(MODEL, squared_error, rate=0.1)
    eta = curved.init(KEY)
    noisy = [
        [f + 0.2 * jnp.cos(jnp.arange(f.size)).reshape(f.shape) for f in x] for x in eta.factors
    ]
    eta = eta._replace(factors=noisy)

    def by_hand(eta):
        support, query = episode()
        grads = jax.grad(error)(eta.params, support)
        body, head = eta.factors
        moved = {
            "body": body[0] @ grads["body"] @ body[1].T,
            "head": head[0] @ grads["head"] @ head[1].T,
        }
        return error(jax.tree.map(lambda p, g: p - 0.1 * g, eta.params, moved), query)

    assert_close(meta_gradient(curved, eta), jax.value_and_grad(by_hand)(eta))


def _wide():
    """A network of one input and a context of two."""

    def init(key):
        w, v = jax.random.normal(key, (2, 12))
        return {"body": w.reshape(3, 4), "head": v[:4, None]}

    return Float64(Functions(init, lambda p, x: jnp.tanh(x @ p["body"]) @ p["head"]))


def test_cavia_adapts_the_context_alone():
    cavia = CAVIA(_wide(), squared_error, context=2, rate=0.3, inner_steps=2)
    eta = cavia.init(KEY)

    def by_hand(params):
        support, query = episode()

        def loss(phi, data):
            beside = jnp.broadcast_to(phi, (len(data[0]), 2))
            return error(params, (jnp.concatenate([data[0], beside], 1), data[1]))

        phi = jnp.zeros(2)
        for _ in range(2):
            phi -= 0.3 * jax.grad(loss)(phi, support)
        return loss(phi, query)

    loss, grads = meta_gradient(cavia, eta)
    assert_close((loss, grads.params), jax.value_and_grad(by_hand)(eta.params))
    learner = cavia.adapt(eta, episode().support, KEY)
    assert_close(learner.params["network"], eta.params)
    assert abs(learner.params["context"]).min() > 0


def test_a_context_is_not_rounded_to_the_precision_of_the_inputs():
    inputs, context = jnp.zeros((2, 1), jnp.bfloat16), jnp.full(1, 0.1, jnp.float32)
    assert with_context(inputs, context)[0, 1] == context[0]


def test_a_kernel_of_another_layout_is_refused_where_its_factor_would_be_large():
    """[outputs, inputs, 3, 3], as of Equinox."""
    model = Functions(lambda key: {"conv": jnp.zeros((64, 64, 3, 3))}, lambda params, x: x)
    with pytest.raises(ValueError, match=r"a factor of 4,096 x 4,096 for conv \[64, 64, 3, 3\]"):
        MetaCurvature(model).init(KEY)
    model = Functions(lambda key: {"conv": jnp.zeros((3, 3, 64, 64))}, lambda params, x: x)
    (factors,) = MetaCurvature(model).init(KEY).factors
    assert [factor.shape for factor in factors] == [(9, 9), (64, 64), (64, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cavia", "curvature"])
def test_it_learns_waves(name):
    algorithm = {
        "cavia": CAVIA(_wide(), squared_error, context=2, rate=0.5),
        "curvature": MetaCurvature(MODEL, squared_error, rate=0.05, inner_steps=2),
    }[name]
    trainer = Trainer(algorithm, optimizer=optax.adam(5e-3), tasks_per_step=8)
    waves = TASKS["Sinusoid"]
    state = trainer.fit(waves, 2000, key=KEY, progress=False)
    before = trainer.evaluate(trainer.init(KEY).eta, waves, KEY, 200)["loss"].mean
    assert trainer.evaluate(state.eta, waves, KEY, 200)["loss"].mean < 0.9 * before


def test_the_network_of_a_config_has_room_for_the_context():
    splits = build.splits({"name": "sinusoid", "shots": 3, "queries": 3, "eval_queries": 3})
    for config, inputs in (({"name": "cavia"}, 6), ({"name": "cavia", "context": 2}, 3)):
        sized = build.sized_for(config, splits)
        assert sized.inputs.shape == (1, inputs) and sized.outputs == 1
    model = build.model({"name": "mlp", "library": "nnx", "hidden": (4,)}, sized)
    options = {"name": "cavia", "context": 2, "objective": "squared_error"}
    made = build.algorithm(options, model)
    assert isinstance(made, CAVIA) and made.context == 2
    learner = made.adapt(made.init(KEY), splits.train.sample(KEY).support, KEY)
    assert learner.predict(jnp.zeros((7, 1))).shape == (7, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAVIA(MODEL, context=0), "`CAVIA(context=0)`: it is an integer, 1 or more."),
        (lambda: CAVIA(MODEL, rate=-1.0), "`CAVIA(rate=-1.0)`: it is a number above 0."),
        (
            lambda: MetaCurvature(MODEL, eval_steps=0),
            "`MetaCurvature(eval_steps=0)`: it is an integer, 1 or more.",
        ),
        (
            lambda: with_context(jnp.zeros((3, 2), jnp.int32), jnp.zeros(2)),
            "`CAVIA` appends its context to the features of inputs [n, ..., c], and these are "
            "int32[3, 2]. Give them an axis of features, as floats; tokens have none to append to.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
