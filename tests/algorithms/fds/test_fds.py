"""FDS: what is learned, over which windows, in which space; exact through long runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Episode, Forward, MixedFlow, Reverse
from metalearn.algorithms import (
    FDS,
    Hyperparameter,
    Schedule,
    jitter,
    load_schedules,
    save_schedules,
    sgd,
    weighted_cross_entropy,
)
from metalearn.algorithms.fds import schedule as windows
from metalearn.engines.inner_loop import rollout
from metalearn.models import Functions
from tests.helpers.fds import KEY, flat, make, make_episode, make_network, solve

# The hypergradient.

OPTIMIZERS = {
    "sgd": (
        sgd,
        {
            "learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=7),
            "momentum": Hyperparameter(0.0, 1.0, 0.5),
            "weight_decay": Hyperparameter(0.0, 1.0, 1e-3),
        },
    ),
    "adamw": (
        functools.partial(optax.adamw, eps=1e-4),
        {
            "learning_rate": Hyperparameter(1e-5, 1.0, 0.01, windows=6, space="log"),
            "b1": Hyperparameter(0.0, 1.0, 0.9, space="logit"),
            "b2": Hyperparameter(0.0, 1.0, 0.99, space="logit"),
            "weight_decay": Hyperparameter(0.0, 1.0, 1e-3),
        },
    ),
    "adopt": (
        functools.partial(optax.contrib.adopt, eps=1e-2),
        {
            "learning_rate": Hyperparameter(1e-5, 1.0, 0.01, windows=7, space="log"),
            "b1": Hyperparameter(0.0, 1.0, 0.9, space="logit"),
            "b2": Hyperparameter(0.0, 1.0, 0.99, space="logit"),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_engines_give_the_same_hypergradient_through_a_long_run(name):
    optimizer, learned = OPTIMIZERS[name]
    algorithm = make(learned, optimizer=optimizer)
    eta = algorithm.init(KEY)
    assert flat(eta).size == 9
    (loss, _), expected = solve(algorithm, Reverse("nested"), eta)
    for engine in (Forward(), MixedFlow("nested"), Reverse("segments"), MixedFlow("segments")):
        (again, _), grads = solve(algorithm, engine, eta)
        np.testing.assert_allclose(again, loss, rtol=1e-12)
        error = jnp.linalg.norm(flat(grads) - flat(expected)) / jnp.linalg.norm(flat(expected))
        assert error < 1e-10

    batches, unravel = algorithm.batches(make_episode(), KEY), ravel_pytree(eta)[1]

    @jax.jit
    @jax.vmap
    def value(x):
        return rollout(algorithm.unroll(make_episode(), KEY), unravel(x), batches)[0]

    steps = 1e-5 * jnp.eye(9)
    differences = (value(flat(eta)[None] + steps) - value(flat(eta)[None] - steps)) / 2e-5
    error = jnp.linalg.norm(differences - flat(expected)) / jnp.linalg.norm(flat(expected))
    assert error < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_reverse_pass_without_sharing_gives_every_window_size():
    learned = {
        "learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2, 0.3), windows=(0, 3, 9, 12)),
        "momentum": Hyperparameter(0.0, 1.0, 0.5, windows=5),
    }
    algorithm = make(learned, inner_steps=12)
    eta = algorithm.init(KEY)
    (loss, _), shared = solve(algorithm, Reverse(), eta)
    single = algorithm.unshared()
    per_step_eta = algorithm.spread(eta)
    np.testing.assert_allclose(flat(single.init(KEY)), flat(per_step_eta), rtol=1e-12)
    (again, _), per_step = solve(single, Reverse(), per_step_eta)
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    for name, grads in per_step.items():
        assert grads.shape == (12,)
        found = windows.shared(grads, algorithm.edges(name))
        np.testing.assert_allclose(found, shared[name], rtol=1e-10)


@pytest.mark.slow
def test_a_gradient_that_is_exactly_zero_leaves_the_hypergradient_finite():
    """Adam's root has no derivative at zero, and an unused input has a gradient of zero."""
    episode = make_episode()
    blank = episode.support[0].at[:, 2].set(0.0)
    episode = Episode(*((blank, *split[1:]) for split in episode))
    algorithm = make({"learning_rate": Hyperparameter(0, 1, 0.01)}, 5, optax.adam)
    _, grads = solve(algorithm, MixedFlow(), episode=episode)
    assert jnp.isfinite(flat(grads)).all() and jnp.abs(flat(grads)).max() > 0


@pytest.mark.slow
def test_augmentation_strength_has_a_hypergradient():
    images = jax.random.uniform(jax.random.key(2), (30, 4, 4, 1))
    targets = jnp.arange(30) % 3
    episode = Episode((images, targets, jnp.arange(20)), (images, targets, jnp.arange(20, 30)))
    strengths = {name: Hyperparameter(0.0, 2.0, 0.5) for name in ("noise", "contrast", "shift")}
    model = Functions(
        lambda key: jax.random.normal(key, (16, 3)), lambda w, x: x.reshape(len(x), -1) @ w
    )
    algorithm = FDS(model, strengths, 4, 5, functools.partial(optax.sgd, 0.1), augment=jitter)
    (_, _), grads = solve(algorithm, MixedFlow(), episode=episode)
    assert (jnp.abs(flat(grads)) > 1e-6).all()


# Windows.


def test_equal_windows_hold_the_steps_that_the_paper_says():
    found = windows.edges(7, 1000)
    steps = np.arange(1000)
    numbers = jax.vmap(lambda t: windows.window_of(t, found))(steps)
    np.testing.assert_array_equal(numbers, 7 * steps // 1000)
    np.testing.assert_array_equal(np.diff(found).sum(), 1000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 5, 9), r"the horizon is 10: they do not cover it. Write windows=\(0, ..., 10\)"),
        ((1, 10), "do not cover it"),
        ((0, 5, 5, 10), "each window holding a step"),
        (0, "at least one window and at most 10"),
        (11, "at least one window and at most 10"),
    ],
)
def test_windows_that_do_not_cover_the_horizon_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make({"learning_rate": Hyperparameter(0.0, 1.0, windows=given)}, inner_steps=10)


def test_starts_are_one_for_all_windows_or_one_for_each():
    each = {"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2), windows=2)}
    np.testing.assert_allclose(make(each).init(KEY)["learning_rate"], [0.1, 0.2])
    with pytest.raises(ValueError, match="'learning_rate' in the optimizer has 3 windows and 2"):
        make({"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2), windows=3)})


# Names, ranges, spaces.


def test_a_name_that_nothing_takes_is_refused_with_those_there_are():
    message = (
        "No hyperparameter is called 'momentun'. Did you mean 'momentum'\\? There are: the "
        "optimizer has learning_rate, momentum, weight_decay; the objective has label_smoothing, "
        "class_weights."
    )
    with pytest.raises(ValueError, match=message):
        make({"momentun": Hyperparameter(0.0, 1.0)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0, "high": 1.0, "start": 2.0}, "start=2.0 is not in the range from 0.0 to 1.0"),
        ({"low": 1.0, "high": 0.0}, "low < high"),
        ({"low": 0.0, "high": 1.0, "space": "log"}, "only positive values, not low=0.0"),
        ({"low": -1.0, "high": 1.0, "start": 0.5, "space": "log"}, "only positive values"),
        ({"low": 0.0, "high": 1.0, "space": "logit"}, "strictly between 0.0 and 1.0"),
        ({"low": 0.0, "high": 1.0, "space": "logg"}, "No space is called 'logg'"),
    ],
)
def test_a_range_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Hyperparameter(**options)


@pytest.mark.parametrize("space", ["raw", "log", "logit"])
def test_a_coordinate_stands_for_its_value(space):
    chosen = Hyperparameter(0.01, 3.0, 0.5, space=space)
    np.testing.assert_allclose(chosen.value(chosen.coordinate(jnp.asarray(0.5))), 0.5, rtol=1e-6)
    low, high = chosen.bounds()
    ends = chosen.value(jnp.asarray([low - 5, low, high, high + 5]))
    assert (ends >= 0.01).all() and (ends <= 3.0).all()


def test_a_coordinate_far_outside_stands_for_the_bound_exactly():
    far = jnp.array([-1e8, 1e8])
    np.testing.assert_array_equal(Hyperparameter(0.125, 1.0, 0.5).value(far), [0.125, 1.0])
    log = Hyperparameter(1e-5, 0.1, 1e-3, space="log")
    np.testing.assert_allclose(log.value(far), [1e-5, 0.1], rtol=1e-5)


def test_a_start_in_the_last_thousandth_of_a_logit_range_is_refused():
    with pytest.raises(ValueError, match="start=0.9999 is in one. Start from 0.001 to 0.999"):
        Hyperparameter(0.0, 1.0, 0.9999, space="logit")


def test_a_value_at_its_bound_has_a_derivative_that_leads_back():
    chosen = Hyperparameter(0.0, 1.0)
    value, slope = jax.value_and_grad(chosen.value)(2.0)
    assert (value, slope) == (1.0, 1.0)
    assert jax.grad(chosen.value)(0.5) == 1.0


def test_an_optimizer_in_place_of_what_makes_one_is_refused():
    with pytest.raises(TypeError, match="such as `optax.adamw`, not an optimizer"):
        make(optimizer=optax.adamw(1e-3))


def test_what_an_optimizer_needs_and_is_not_learned_is_named():
    learned = {"weight_decay": Hyperparameter(0.0, 1.0)}
    with pytest.raises(ValueError, match="needs learning_rate, which is not learned"):
        make(learned, optimizer=optax.adamw)
    make(learned, optimizer=functools.partial(optax.adamw, learning_rate=0.1))


def test_an_eta_of_other_windows_is_refused():
    algorithm = make({"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2), windows=2)}, 10)
    eta = algorithm.init(KEY)
    for use in (lambda a: a.values(eta, 0), lambda a: a.schedules(eta)):
        with pytest.raises(ValueError, match="10 windows here, but 2 in eta.*`spread`"):
            use(algorithm.unshared())


def test_a_schedule_is_not_stretched_over_fewer_steps():
    with pytest.raises(ValueError, match="eval_steps=5 steps, which are fewer than the 10"):
        make(inner_steps=10, eval_steps=5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_slots_keep_the_type_of_the_parameters_whatever_is_learned():
    learned = {"momentum": Hyperparameter(0.0, 1.0, 0.5), "weight_decay": Hyperparameter(0.0, 1.0)}
    algorithm = make(learned, 4, functools.partial(sgd, learning_rate=0.1))
    narrow = Functions(
        lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_network().init_fn(key)),
        make_network().apply_fn,
    )
    algorithm = dataclasses.replace(algorithm, model=narrow)
    for engine in (Reverse(), Forward(), MixedFlow()):
        (_, aux), _ = solve(algorithm, engine)
        assert {leaf.dtype for leaf in jax.tree.leaves(aux.state.optimizer)} == {jnp.bfloat16.dtype}


def test_dropout_draws_anew_at_every_inner_step():
    seen = []

    class Noisy(Functions):
        def apply(self, params, state, inputs, *, train, key=None):
            seen.append(key)
            return super().apply(params, state, inputs, train=train, key=key)

    model = Noisy(make_network().init_fn, make_network().apply_fn)
    algorithm = dataclasses.replace(make(inner_steps=2), model=model)
    unroll, batches = algorithm.unroll(make_episode(), KEY), algorithm.batches(make_episode(), KEY)
    eta = algorithm.init(KEY)

    @jax.jit
    def keys_of_steps(eta):
        for step in (0, 1):
            batch = jax.tree.map(lambda x, step=step: x[step], batches)
            unroll.step(eta, unroll.init(eta), batch, jax.grad)
        return [jax.random.key_data(key) for key in seen]

    first, second = keys_of_steps(eta)
    assert (first != second).any()


# Data.


def test_every_example_is_read_once_before_any_is_read_again():
    algorithm = make(inner_steps=15)  # 40 examples, 8 a step: three epochs of five steps
    now, rows = algorithm.batches(make_episode(), KEY)
    np.testing.assert_array_equal(now, np.arange(15))
    epochs = np.asarray(rows).reshape(3, 40)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(40), (3, 1)))
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_larger_than_the_data_is_refused():
    algorithm = FDS(make_network(), {"learning_rate": Hyperparameter(0.0, 1.0)}, 5, batch=41)
    with pytest.raises(ValueError, match="batch=41, but there are 40 training examples"):
        solve(algorithm, MixedFlow())


# What is taken away.


def test_a_learned_schedule_is_an_optax_schedule_and_json():
    learned = {"learning_rate": Hyperparameter(0.01, 1.0, (0.1, 0.4), 2, "log")}
    algorithm = make(learned, inner_steps=10)
    schedule = algorithm.schedules(algorithm.init(KEY))["learning_rate"]
    values = [float(schedule(step)) for step in (0, 4, 5, 9, 10, 99)]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)
    assert Schedule.from_json(schedule.to_json()) == schedule
    again = schedule.stretched(100)
    np.testing.assert_allclose([float(again(step)) for step in (49, 50)], [0.1, 0.4], rtol=1e-6)

    optimizer, params = optax.sgd(schedule), jnp.zeros(())
    state = optimizer.init(params)
    for _ in range(10):
        updates, state = jax.jit(optimizer.update)(jnp.ones(()), state)
        params += updates
    np.testing.assert_allclose(params, -(5 * 0.1 + 5 * 0.4), rtol=1e-5)


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(ValueError, match="has edges and values"):
        Schedule.from_json('{"values": [1]}')
    with pytest.raises(ValueError, match="not 2 edges and 2 values"):
        Schedule.from_json('{"edges": [0, 1], "values": [1, 2]}')


def test_schedules_come_back_from_one_file_by_name(tmp_path):
    algorithm = make({"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2), windows=2)}, 10)
    learned = algorithm.schedules(algorithm.init(KEY))
    save_schedules(tmp_path / "learned.json", learned)
    assert load_schedules(tmp_path / "learned.json") == learned
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other.json holds no schedules: it is \[1\]"):
        load_schedules(tmp_path / "other.json")


@pytest.mark.slow
def test_training_with_the_exported_schedule_is_the_run_that_was_learned():
    """The same parameters from plain optax, outside the framework."""
    learned = {"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.3), windows=2)}
    algorithm, episode = make(learned, inner_steps=6), make_episode()
    (_, aux), _ = solve(algorithm, MixedFlow())
    optimizer = optax.sgd(algorithm.schedules(algorithm.init(KEY))["learning_rate"])
    model = make_network()
    params, _ = model.init(jax.random.split(KEY)[0])
    state = optimizer.init(params)
    for rows in algorithm.batches(episode, KEY)[1]:

        def loss(params, rows=rows):
            inputs, targets = episode.support[0][rows], episode.support[1][rows]
            return weighted_cross_entropy(model.apply(params, (), inputs, train=True)[0], targets)[
                0
            ]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(flat(aux.state.params), flat(params), rtol=2e-5)


def test_evaluation_stretches_the_schedule():
    algorithm = make(
        {"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.3), windows=(0, 2, 10))},
        inner_steps=10,
        eval_steps=100,
    )
    longer = algorithm.evaluation()
    assert longer.inner_steps == 100
    np.testing.assert_array_equal(longer.edges("learning_rate"), [0, 20, 100])
    assert jax.tree.map(jnp.shape, longer.init(KEY)) == jax.tree.map(jnp.shape, algorithm.init(KEY))


def test_values_are_metrics_by_window_and_their_mean_where_there_are_many():
    learned = {
        "learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=2),
        "momentum": Hyperparameter(0.0, 1.0, 0.5, windows=20),
    }
    (_, aux), _ = solve(make(learned, inner_steps=20), MixedFlow())
    assert {"learning_rate/0", "learning_rate/1", "momentum/mean", "accuracy"} == aux.metrics.keys()


@pytest.mark.parametrize("windows", [1, 2])
def test_a_schedule_for_the_b1_of_a_schedule_free_optimizer_is_refused(windows):
    learned = {
        "learning_rate": Hyperparameter(1e-3, 1.0, 0.1, windows=2),
        "interpolation": Hyperparameter(0.1, 0.99, 0.9, windows=windows),
    }

    def optimizer(learning_rate, interpolation):
        free = optax.contrib.schedule_free_sgd(learning_rate, b1=interpolation)
        return optax.chain(optax.clip(1.0), free)

    algorithm = make(learned, 4, optimizer)
    if windows == 1:
        (loss, _), grads = jax.eval_shape(lambda: solve(algorithm, Reverse()))
        assert grads["interpolation"].shape == (1,)
        return
    with pytest.raises(ValueError, match="'interpolation' has several windows and sets the b1"):
        jax.eval_shape(lambda: solve(algorithm, Reverse()))
