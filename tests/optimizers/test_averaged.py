"""The average of an optimizer's iterates: its weights, and what is judged by it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from metalearn import MixedFlow, Trainer
from metalearn.algorithms import FDS, MAML, Hyperparameter, squared_error
from metalearn.experiments import build
from metalearn.experiments.configs import maml_sinusoid
from metalearn.optimizers import averaged, master_weights
from metalearn.optimizers.updates import evaluation_params
from tests.cases import MODELS, TASKS

KEY = jax.random.key(0)
RATE = {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1)}
PARAMS = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5)}
SUPPORT = [{"w": jnp.full((1, 2), t - 2.0), "b": jnp.array(0.3 * t)} for t in range(7)]


def iterates(optimizer, params=PARAMS, pace=1.0):
    """The parameters before and after each step, and the last state."""
    state, found = optimizer.init(params), [params]
    for grads in SUPPORT:
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = optimizer.update(grads, state, found[-1])
        updates = jax.tree.map(lambda u: pace * u, updates)
        found.append(optax.apply_updates(found[-1], updates))
    return found, state


def by_hand(found, decay):
    """The mean of the first iterates, and then the moving average of the others."""
    average, mean_of = np.zeros_like(np.asarray(found[0])), 0
    for x in map(np.asarray, found):
        mean_of += 1
        weight = max(1 / mean_of, 1 - decay)
        average = (1 - weight) * average + weight * x
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.999])
def test_it_is_the_mean_of_the_first_iterates_and_then_a_moving_average(decay):
    found, state = iterates(averaged(optax.adam(0.1), decay))
    plain, _ = iterates(optax.adam(0.1))
    judged = evaluation_params(state, found[-1])
    for name in PARAMS:
        assert all((a[name] == b[name]).all() for a, b in zip(found, plain, strict=True))
        expected = by_hand([x[name] for x in found], decay)
        np.testing.assert_allclose(judged[name], expected, rtol=1e-5, atol=1e-6)
    if decay == 0.999:
        mean = np.mean([x["w"] for x in found], axis=0)
        np.testing.assert_allclose(judged["w"], mean, rtol=1e-5)
    if decay == 0:
        np.testing.assert_allclose(judged["w"], found[-1]["w"], rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.chain(optax.clip(1.0), inner),
        master_weights,
        lambda inner: optax.masked(inner, {"w": True, "b": False}),
    ],
    ids=["chain", "master_weights", "masked"],
)
def test_it_averages_what_the_parameters_were_wherever_it_stands(wrap):
    # What comes after it scales its updates, as a trainer does that has backed off.
    pace = 1.0 if wrap is master_weights else 0.5  # which has a copy that nothing may scale
    found, state = iterates(wrap(averaged(optax.sgd(0.1), 0.6)), pace=pace)
    judged = evaluation_params(state, found[-1])
    expected = by_hand([x["w"] for x in found], 0.6)
    np.testing.assert_allclose(judged["w"], expected, rtol=1e-5, atol=1e-6)
    masked = isinstance(state, optax.MaskedState)
    assert (judged["b"] == found[-1]["b"]) == masked


def test_half_precision_is_averaged_in_float32():
    params = {"w": jnp.full((1, 2), 1.0, jnp.bfloat16), "b": jnp.array(1.0, jnp.bfloat16)}
    optimizer = averaged(optax.sgd(0.0), 0.999)
    state = optimizer.init(params)._replace(steps=jnp.array(10_000))
    moved = jax.tree.map(lambda p: p + 1, params)
    for _ in range(10):  # a thousandth of the way each: less than bfloat16 has
        _, state = optimizer.update(params, state, moved)
    np.testing.assert_allclose(state.average["w"], 2 - 0.999**10, rtol=1e-5)
    judged = evaluation_params(state, moved)
    assert judged["w"].dtype == jnp.bfloat16 and judged["w"][0, 0] > 1


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_another_decay_is_refused(decay):
    with pytest.raises(ValueError, match=re.escape(f"`averaged(decay={decay})`: it is from 0")):
        averaged(optax.sgd(0.1), decay)


@pytest.mark.parametrize(
    "inner",
    [
        contrib.schedule_free_sgd(0.1),
        optax.chain(optax.clip(1.0), contrib.sam(optax.sgd(0.1), optax.sgd(0.05))),
        optax.chain(optax.clip(1.0), averaged(optax.sgd(0.1))),
        contrib.sam(contrib.schedule_free_sgd(0.1), optax.sgd(0.05), opaque_mode=True),
    ],
    ids=["schedule_free", "sam", "averaged", "opaque sam"],
)
def test_an_optimizer_that_is_judged_elsewhere_already_is_refused(inner):
    with pytest.raises(ValueError, match=r"`averaged` got an optimizer that trains at one point"):
        averaged(inner).init(PARAMS)


def test_sharpness_aware_steps_that_come_back_at_once_are_averaged():
    sam = contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    assert averaged(sam).init(PARAMS).steps == 0


def test_a_run_that_goes_on_with_another_decay_has_that_one():
    found, state = iterates(averaged(optax.sgd(0.1), 0.999))
    _, state = averaged(optax.sgd(0.1), 0.5).update(SUPPORT[0], state, found[-1])
    assert state.least == 0.5


def test_it_has_a_copy_of_the_parameters_which_may_be_donated():
    params = jax.tree.map(jnp.array, PARAMS)
    optimizer = averaged(optax.sgd(0.1))
    step = jax.jit(lambda p, s: optimizer.update(p, s, p), donate_argnums=(0, 1))
    updates, state = step(params, optimizer.init(params))
    assert updates["b"] == -0.05 and state.average["b"] == 0.5


def test_a_weight_of_one_is_the_iterate_itself_and_integers_are_as_they_are():
    start = {"w": jnp.float32(1e8), "n": jnp.int32(2**24 + 1)}
    last = {"w": jnp.float32(1e-3), "n": jnp.int32(2**24 + 3)}
    state = averaged(optax.set_to_zero(), 0.0).init(start)
    judged = evaluation_params(state, last)
    assert judged["w"] == last["w"] and judged["n"] == last["n"]


def test_it_asks_for_the_parameters():
    optimizer = averaged(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`averaged` needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


def trained(optimizer, steps, **options):
    algorithm = MAML(MODELS["Functions"], squared_error, optax.sgd(0.05))
    trainer = Trainer(algorithm, MixedFlow(), optimizer, tasks_per_step=2, **options)
    return trainer, trainer.fit(TASKS["Sinusoid"], steps, key=KEY, progress=False)


def test_a_trainer_learns_the_average_and_trains_as_without_it():
    each = [trained(optax.adam(0.1), steps)[1].eta for steps in range(5)]
    trainer, state = trained(averaged(optax.adam(0.1), 0.6), 4)
    leaves = [jax.tree.leaves(eta) for eta in each]
    pairs = zip(jax.tree.leaves(state.eta), jax.tree.leaves(trainer.learned(state)), strict=True)
    for number, (last, learned) in enumerate(pairs):
        np.testing.assert_array_equal(last, leaves[-1][number])
        expected = by_hand([eta[number] for eta in leaves], 0.6)
        np.testing.assert_allclose(learned, expected, rtol=1e-5, atol=1e-6)
        assert abs(learned - last).max() > 1e-3


def test_a_config_names_its_decay():
    config = build.to_json(maml_sinusoid.get_config())["optimizer"]
    assert config["average"] is None
    plain = build.outer_optimizer(config, steps=10)
    learned = build.outer_optimizer({**config, "average": 0.6, "clip": 0.5}, steps=10)
    clipped = build.outer_optimizer({**config, "clip": 0.5}, steps=10)
    found, state = iterates(learned)
    assert all((a["w"] == b["w"]).all() for a, b in zip(found, iterates(clipped)[0], strict=True))
    expected = by_hand([x["w"] for x in found], 0.6)
    np.testing.assert_allclose(evaluation_params(state, found[-1])["w"], expected, rtol=1e-5)
    last = iterates(plain)
    np.testing.assert_array_equal(evaluation_params(last[1], last[0][-1])["w"], last[0][-1]["w"])
    rule = {"name": "fds_rule", "share": 0.1, "schedule": "linear", "average": 0.9}
    with pytest.raises(
        ValueError, match="'fds_rule' has no option 'average'"
    ):  # it takes steps back
        build.outer_optimizer(rule, 10, FDS(MODELS["Functions"], RATE, inner_steps=2, batch=2))
    with pytest.raises(ValueError, match=r"averaged\(decay=1.5\)"):
        build.outer_optimizer({**config, "average": 1.5}, steps=10)
