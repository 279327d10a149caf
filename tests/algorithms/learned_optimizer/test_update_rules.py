"""Update rules: optax optimizers as functions of eta, with a derivative at every gradient."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import algorithms
from metalearn.algorithms import (
    FactoredMoments,
    Feature,
    Gradient,
    HypergradientRule,
    Hyperparameter,
    MirrorDescent,
    Momenta,
    Network,
    ParameterScale,
    ParameterValue,
    PerParameter,
    PointwiseGRU,
    PointwiseMLP,
    ReciprocalRoot,
    SecondMoments,
    StepFeatures,
    Tensor,
    TunedRule,
    UpdateRule,
    sgd,
)
from metalearn.algorithms.learned_optimizer.features import evaluate, init_slots, normalized, width
from tests.helpers.selection import quick
from tests.helpers.update_rules import ADAMW, LEARNED, RULES, draw, generic

USUAL = PerParameter().features
FEATURES = (*USUAL, ParameterScale(), ReciprocalRoot())
NETWORKS = (PointwiseMLP(), PointwiseGRU())
SHAPES = {
    "scalar": (),
    "vector": (3,),
    "matrix": (2, 3),
    "cube": (2, 1, 2),
    "kernel": (3, 3, 2, 4),
    "empty": (0, 2),
}


def trained(rule, eta, params, gradient, steps=5):
    """Return the parameters after some steps along gradient(params)."""
    optimizer = rule.optimizer(eta)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def loss(params):
    return sum(jnp.cos(2 * leaf).sum() for leaf in jax.tree.leaves(params))


# Every rule.

# The last has a larger network and a base: the others are its parts.
every_rule = pytest.mark.parametrize("name", quick(RULES, lambda name: name != "PerParameter-base"))


@pytest.mark.usefixtures("x64")
@every_rule
def test_derivative_matches_central_differences_in_both_modes(name):
    rule, params = RULES[name], draw({k: SHAPES[k] for k in ("scalar", "matrix")})
    flat, unravel = ravel_pytree(generic(rule))

    def outcome(point):
        return loss(trained(rule, unravel(point), params, jax.grad(loss)))

    solve = jax.jit(jax.value_and_grad(outcome))
    direction, size = jax.random.normal(jax.random.key(9), flat.shape), 1e-6
    high, low = (solve(flat + s * size * direction)[0] for s in (1, -1))
    expected = (high - low) / (2 * size)
    assert abs(expected) > 1e-3
    forward = jax.jit(lambda v: jax.jvp(outcome, (flat,), (v,))[1])(direction)
    np.testing.assert_allclose(forward, expected, rtol=1e-6)
    np.testing.assert_allclose(solve(flat)[1] @ direction, forward, rtol=1e-9)


@every_rule
@pytest.mark.slow
def test_derivative_is_finite_where_every_gradient_is_exactly_zero(name):
    """And where it would not be for other parameters, as at a minimum."""
    rule, params = RULES[name], {**draw({"matrix": (2, 3)}), "zero": jnp.zeros(())}

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(eta, params):
        def gradient(params):
            return jax.tree.map(lambda x: x - jax.lax.stop_gradient(x), params)

        return loss(trained(rule, eta, params, gradient))

    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes(generic(rule), params)))


@every_rule
def test_every_rank_has_updates_in_its_dtype_and_slots_that_keep_theirs(name):
    rule = RULES[name]
    params = {
        **draw(SHAPES, dtype=jnp.float32),
        "half": draw({"half": (2, 2)}, dtype=jnp.bfloat16)["half"],
        "masked": optax.MaskedNode(),
        "none": None,
    }
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds(updates) == kinds(params)
    assert kinds(after) == kinds(state)
    assert updates["masked"] == optax.MaskedNode() and updates["none"] is None
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.usefixtures("x64")
@every_rule
def test_a_float64_eta_and_float32_parameters_stay_what_they_are(name):
    rule, params = RULES[name], draw({"matrix": (2, 3)}, dtype=jnp.float32)
    after = trained(rule, generic(rule), params, jax.grad(loss), steps=2)  # scan: no dtype changes
    assert after["matrix"].dtype == jnp.float32


@every_rule
def test_rules_are_mapped_over_eta(name):
    rule, params = RULES[name], draw({"matrix": (2, 3)})
    etas = [generic(rule, key) for key in (1, 5)]
    outcome = jax.jit(lambda eta: trained(rule, eta, params, jax.grad(loss), 2)["matrix"])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *etas)
    expected = jnp.stack([outcome(eta) for eta in etas])
    np.testing.assert_allclose(jax.vmap(outcome)(stacked), expected, rtol=2e-5)
    assert jnp.abs(expected[0] - expected[1]).max() > 1e-4


def test_every_public_rule_feature_and_network_is_tested_here():
    public = [getattr(algorithms, name) for name in algorithms.__all__]
    bases = UpdateRule, Feature, Network
    found = {c for c in public if inspect.isclass(c) and issubclass(c, bases)} - {*bases}
    assert found == {type(x) for x in (*RULES.values(), *FEATURES, *NETWORKS)}


def test_equal_rules_are_equal_and_hash():
    assert PerParameter() == PerParameter() != PerParameter(step_scale=1e-2)
    assert all(isinstance(hash(rule), int) for rule in RULES.values())


# Hyperparameters.


@pytest.mark.usefixtures("x64")
def test_a_tuned_rule_is_the_optimizer_with_the_same_numbers():
    params = draw({k: SHAPES[k] for k in ("scalar", "matrix")})
    eta = generic(ADAMW)
    values = {name: float(value) for name, value in ADAMW.values(eta).items()}
    optimizer, state = optax.adamw(**values, b2=0.95), None
    state, expected = optimizer.init(params), params
    for _ in range(4):
        updates, state = optimizer.update(jax.grad(loss)(expected), state, expected)
        expected = optax.apply_updates(expected, updates)
    after = trained(ADAMW, eta, params, jax.grad(loss), steps=4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), after, expected)
    assert ADAMW.values(ADAMW.init(jax.random.key(0))) == pytest.approx(
        {"learning_rate": 0.02, "b1": 0.8, "weight_decay": 0.01}
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ((optax.sgd, {}), ValueError, "needs at least one"),
        ((optax.sgd(0.1), LEARNED), TypeError, r"`functools.partial\(optax.adamw, b1=0.95\)`"),
        ((optax.sgd, LEARNED), ValueError, "No hyperparameter is called 'b1'"),
        ((optax.adam, {"b1": LEARNED["b1"]}), ValueError, "needs learning_rate, which is not"),
        (
            (sgd, {"learning_rate": Hyperparameter(0, 1, windows=2)}),
            ValueError,
            "one number for 'learning_rate', not windows=2.*`FDS`",
        ),
    ],
)
def test_a_tuned_rule_refuses_what_it_cannot_learn(fields, error, message):
    with pytest.raises(error, match=message):
        TunedRule(*fields)


# Mirror descent.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.3, 1e6])
def test_mirror_descent_steps_in_the_mirror_and_is_gradient_descent_for_a_large_beta(beta):
    rule = MirrorDescent(rate=0.1, beta=beta, momentum=0.5)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    theta, velocity = np.array([-2.0, 0.0, 0.7]), np.zeros(3)
    params = jnp.asarray(theta)
    state = optimizer.init(params)
    for grads in np.array([[1.0, -0.5, 0.2], [0.3, 0.4, -2.0]]):
        updates, state = optimizer.update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.5 * velocity + grads
        mirrored = beta * np.arcsinh(theta / beta) - 0.1 * velocity
        theta = beta * np.sinh(mirrored / beta)
    np.testing.assert_allclose(params, theta, rtol=1e-9)


# Hypergradients.


def gains(rates, gradients):
    """What each tensor's rate has been multiplied with, in the end."""
    rule = HypergradientRule(rate=0.1, hyper_rate=0.5, momentum=0.5, rates=rates)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    state = optimizer.init(gradients[0])
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state)
    return updates, jax.tree.map(jnp.exp, state.gain)


def test_a_rate_grows_while_gradients_point_along_the_last_step_and_shrinks_when_they_turn():
    one = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 1.0])}
    turned = {"a": one["a"], "b": -one["b"]}
    updates, gain = gains("per tensor", [one, turned])
    assert gain == pytest.approx({"a": np.exp(0.5), "b": np.exp(-0.5)}, rel=1e-5)
    np.testing.assert_allclose(updates["a"], [-0.1 * np.exp(0.5) * 4.5, 0], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [0, 0.1 * np.exp(-0.5) * 0.5], rtol=1e-5)
    _, gain = gains("global", [one, turned])
    assert gain == pytest.approx({"a": np.exp(0.4), "b": np.exp(0.4)}, rel=1e-5)


def test_no_gradient_changes_a_rate_by_more_than_its_factor():
    huge = [{"a": jnp.array([scale])} for scale in (1e-3, 1e9, 1e9, -1e12)]
    _, gain = gains("per tensor", huge)
    assert gain["a"] == pytest.approx(np.exp(0.5), rel=1e-5)  # two up, one down


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 and hyper_rate=0.02 must be positive. Start from a small one"),
        ({"momentum": 1.0}, "momentum=1.0 must lie strictly between 0 and 1"),
        ({"rates": "tensor"}, "No kind of rates is called 'tensor'.*global, per tensor"),
    ],
)
def test_a_hypergradient_rule_refuses_numbers_that_have_no_coordinate(fields, message):
    with pytest.raises(ValueError, match=message):
        HypergradientRule(**fields)


# Features.


@functools.partial(jax.jit, static_argnums=0)
def observed(features, grads, param):
    """Return (slots, values [width, *shape]) after some gradients."""
    slots = init_slots(features, param)
    for step, grad in enumerate(grads):
        empty = jnp.zeros((0, *grad.shape), grad.dtype)
        slots, values = evaluate(features, slots, Tensor(grad, param, jnp.asarray(step), empty))
    return slots, values


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("shape", quick(SHAPES, lambda name: name in ("vector", "kernel")))
def test_a_feature_has_as_many_values_as_it_says_at_every_rank(feature, shape):
    param = jnp.ones(SHAPES[shape])
    for features in ((feature,), (Gradient(), Momenta((0.5, 0.9)), feature)):
        _, values = observed(features, [param, param], param)
        assert values.shape == (width(features), *param.shape)
        assert jnp.isfinite(values).all()


def test_features_have_a_root_mean_square_of_one_over_the_tensor_but_those_of_the_step():
    param = 1e3 * draw({"w": (4, 5)})["w"]
    _, values = observed(USUAL, [1e-4 * jnp.sin(param), 1e-4 * jnp.cos(param)], param)
    rms = jnp.sqrt((values**2).mean((1, 2)))
    steps = StepFeatures().size(0)
    np.testing.assert_allclose(rms[:-steps], 1, rtol=1e-2)
    np.testing.assert_allclose(
        values[-steps:, 0, 0], jnp.tanh(1 / np.array(StepFeatures().scales) - 1), rtol=1e-5
    )


def test_normalized_zeros_are_zeros_with_a_finite_derivative():
    values, slopes = jax.jvp(normalized, (jnp.zeros((2, 3)),), (jnp.ones((2, 3)),))
    assert not values.any() and jnp.isfinite(slopes).all()


def test_momenta_and_second_moments_are_running_means():
    grads = [jnp.array([2.0, -1.0]), jnp.array([1.0, 3.0])]
    features = Momenta((0.5, 0.9)), SecondMoments((0.8,))
    (momenta, square), _ = observed(features, grads, grads[0])
    np.testing.assert_allclose(momenta[0], 0.25 * grads[0] + 0.5 * grads[1], rtol=1e-6)
    np.testing.assert_allclose(momenta[1], 0.09 * grads[0] + 0.1 * grads[1], rtol=1e-6)
    np.testing.assert_allclose(square[0], 0.16 * grads[0] ** 2 + 0.2 * grads[1] ** 2, rtol=1e-6)


def last(moments, grad, directions=1):
    """The directions over their roots, which come last."""
    _, values = moments(moments.init(grad), Tensor(grad, grad, jnp.asarray(0), grad[None]))
    return values[-len(moments.decays) * directions :]


@pytest.mark.parametrize(
    "shape", quick([((),), ((4,),), ((2, 3),), ((3, 1, 2, 2),)], lambda shape: len(shape) < 3)
)
def test_factored_moments_are_exact_where_the_second_moment_is_an_outer_product(shape):
    grad = functools.reduce(
        jnp.multiply,
        [
            jnp.arange(1.0, 1 + n).reshape([-1 if i == axis else 1 for i in range(len(shape))])
            for axis, n in enumerate(shape)
        ],
        jnp.ones(shape),
    )
    decays = (0.5, 0.9)
    expected = last(SecondMoments(decays), grad)
    np.testing.assert_allclose(last(FactoredMoments(decays), grad), expected, rtol=1e-4)


def test_factored_moments_hold_a_row_and_a_column_of_the_longest_axes():
    slots = FactoredMoments((0.9,)).init(jnp.zeros((3, 5, 2, 7)))
    assert [slot.shape for slot in slots] == [(1, 3, 5, 2, 1), (1, 3, 1, 2, 7)]


@pytest.mark.parametrize("part", [Momenta, SecondMoments, FactoredMoments])
@pytest.mark.parametrize("decays", [(), (0.9, 1.0)])
def test_decays_are_below_one(part, decays):
    with pytest.raises(ValueError, match="Decays are one or more numbers from 0 to below 1"):
        part(decays)


# The network.


def test_a_rule_begins_as_its_base_and_without_one_moves_nothing():
    params = draw({"matrix": (2, 3)})
    rule = PerParameter(base=ADAMW)
    eta = rule.init(jax.random.key(0))
    after = trained(rule, eta, params, jax.grad(loss))
    expected = trained(ADAMW, eta["base"], params, jax.grad(loss))
    np.testing.assert_array_equal(after["matrix"], expected["matrix"])
    alone = PerParameter()
    after = trained(alone, alone.init(jax.random.key(0)), params, jax.grad(loss))
    np.testing.assert_array_equal(after["matrix"], params["matrix"])


@functools.partial(jax.jit, static_argnums=0)
def update(rule, eta, grad, param):
    optimizer = rule.optimizer(eta)
    return optimizer.update(grad, optimizer.init(param), param)[0]


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_updates_do_not_depend_on_the_scale_of_the_loss(scale):
    rule, grad = PerParameter(), draw({"g": (3, 4)})["g"]
    eta, param = generic(rule), jnp.ones((3, 4))
    expected = update(rule, eta, grad, param)
    assert jnp.abs(expected).max() > 1e-4
    np.testing.assert_allclose(
        update(rule, eta, scale * grad, param), expected, rtol=0.02, atol=1e-6
    )


def test_the_two_scales_are_those_of_the_formula():
    features, network = (Gradient(),), PointwiseMLP(())
    eta = {"network": [{"w": jnp.array([[2.0, 0.0]]), "b": jnp.array([0.0, 3.0])}]}
    rule = PerParameter(features, network, step_scale=0.1, magnitude_scale=0.5)
    expected = -0.1 * 2 * np.exp(1.5) * np.array([1.0, -1.0])
    grad, param = jnp.array([1.0, -1.0]), jnp.array([3.0, 4.0])
    np.testing.assert_allclose(update(rule, eta, grad, param), expected, rtol=1e-5)
    relative = PerParameter(features, network, 0.1, 0.5, factors=(ParameterScale(),))
    rms = np.sqrt(12.5)
    np.testing.assert_allclose(update(relative, eta, grad, param), rms * expected, rtol=1e-5)


def test_a_recurrent_network_carries_its_hidden_numbers():
    rule, params = PerParameter((Gradient(),), PointwiseGRU(4)), draw({"w": (2, 3)})
    optimizer = rule.optimizer(generic(rule))
    start = optimizer.init(params)
    assert start.hidden["w"].shape == (2, 3, 4)
    move = jax.jit(optimizer.update)
    first, state = move(params, start, params)
    second, _ = move(params, state, params)
    forgotten, _ = move(params, state._replace(hidden=start.hidden), params)
    assert jnp.abs(second["w"] - first["w"]).max() > 1e-5
    np.testing.assert_array_equal(forgotten["w"], first["w"])


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: type(n).__name__)
def test_a_network_treats_every_parameter_alike(network):
    weights = jax.tree.map(lambda w: w + 0.1, network.init(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (4, 5, 3))
    outputs, _ = network.apply(weights, network.start((4, 5), x.dtype), x)
    assert outputs.shape == (4, 5, 2)
    alone, _ = network.apply(weights, network.start((), x.dtype), x[1, 2])
    np.testing.assert_allclose(outputs[1, 2], alone, rtol=1e-5)


@pytest.mark.parametrize("rule", [HypergradientRule(), PerParameter()], ids=["sgd", "network"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_parameters_that_are_no_real_numbers_are_refused_by_name(rule, dtype):
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    name = type(rule).__name__
    with pytest.raises(TypeError, match=f"`{name}` moves.*layer/w is of .*`optax.masked`"):
        optimizer.init({"layer": {"w": jnp.zeros(2, dtype)}})


def test_an_update_without_parameters_is_refused():
    rule = PerParameter()
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    grads = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`optimizer.update\(grads, state, params\)`"):
        optimizer.update(grads, optimizer.init(grads))


def test_features_and_factors_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="needs features: give it one, such as `Gradient"):
        PerParameter(())
    with pytest.raises(ValueError, match="A factor is a feature of one value.*has 3"):
        PerParameter(factors=(Momenta(),))
    with pytest.raises(ValueError, match="would never move with least=0"):
        ParameterScale(0)


def test_learned_optimizers_compose_as_optax_ones_do():
    rule = PerParameter(features=(Gradient(), ParameterValue()))
    learned = rule.optimizer(generic(rule))
    params = {"w": jnp.ones(3), "frozen": jnp.ones(2)}
    optimizer = optax.chain(
        optax.clip(1.0), optax.masked(learned, {"w": True, "frozen": False}), optax.scale(2.0)
    )
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    alone = update(rule, generic(rule), params["w"], params["w"])
    np.testing.assert_allclose(updates["w"], 2 * alone, rtol=1e-5)
