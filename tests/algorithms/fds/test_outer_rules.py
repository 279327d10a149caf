"""Signed steps for hyperparameters: halved on a flip, stopped when small, taken back when worse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn.algorithms import Hyperparameter, fds_rule, in_ranges, sign_steps, within

ETA = {"rate": jnp.array([1.0, 1.0]), "decay": jnp.array([1.0])}


def gradient(first, second=1.0, third=1.0):
    return {"rate": jnp.array([first, second]), "decay": jnp.array([third])}


def follow(rule, gradients, values=None, eta=ETA):
    """Return the eta before each update and after the last."""
    state, path = rule.init(eta), [eta]
    for i, grads in enumerate(gradients):
        value = None if values is None else jnp.asarray(values[i])
        updates, state = jax.jit(rule.update)(grads, state, path[-1], value=value)
        path.append(optax.apply_updates(path[-1], updates))
    return path


def first(path):
    return [round(float(eta["rate"][0]), 6) for eta in path]


def test_a_step_has_a_size_of_its_own_that_is_halved_when_the_sign_flips():
    path = follow(sign_steps(0.4), [gradient(g) for g in (1e-9, 1e9, -1.0, -1.0, 1.0)])
    assert first(path) == [1.0, 0.6, 0.2, 0.4, 0.6, 0.5]
    assert [float(eta["rate"][1]) for eta in path] == pytest.approx([1, 0.6, 0.2, -0.2, -0.6, -1])


def test_a_hypergradient_that_is_not_finite_is_no_move_and_no_flip():
    path = follow(sign_steps(0.2), [gradient(g) for g in (1.0, jnp.nan, jnp.inf, 1.0, -1.0)])
    assert first(path) == [1.0, 0.8, 0.8, 0.8, 0.6, 0.7]


def test_a_hyperparameter_stops_where_its_step_is_less_than_a_twentieth_of_it():
    path = follow(sign_steps(0.1), [gradient((-1.0) ** i) for i in range(6)])
    assert first(path) == [1.0, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95]
    assert float(path[-1]["decay"][0]) == pytest.approx(0.4)


def test_steps_grow_where_asked_up_to_the_largest():
    path = follow(sign_steps(0.1, grow=2.0, largest=0.3), [gradient(-1.0)] * 4)
    assert first(path) == [1.0, 1.1, 1.3, 1.6, 1.9]


def test_steps_of_each_hyperparameter_may_be_given():
    path = follow(sign_steps({"rate": 0.1, "decay": 0.5}), [gradient(1.0)])
    assert first(path)[-1] == 0.9 and float(path[-1]["decay"][0]) == 0.5


def test_a_move_after_which_the_loss_is_worse_is_taken_back_and_halved():
    rule = sign_steps(0.4, tolerance=0.1)
    path = follow(rule, [gradient(1.0)] * 5, [1.0, 1.05, 1.2, 9.0, 0.9])
    # 1.05 is within the tolerance: it moves on from there, comes back twice, then goes on.
    assert first(path) == [1.0, 0.6, 0.2, 0.4, 0.5, 0.4]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_is_taken_back_and_the_best_is_kept(value):
    rule = sign_steps(0.4, tolerance=0.1)
    path = follow(rule, [gradient(1.0), gradient(jnp.nan), gradient(1.0)], [1.0, value, 1.0])
    assert first(path) == [1.0, 0.6, 0.8, 0.6]


def test_a_start_without_a_finite_loss_is_not_left():
    rule = sign_steps(0.4, tolerance=0.1)
    assert first(follow(rule, [gradient(jnp.nan)] * 3, [jnp.nan] * 3)) == [1.0] * 4


def test_a_tolerance_needs_the_loss():
    with pytest.raises(ValueError, match="its `update` takes the loss as `value=`"):
        follow(sign_steps(0.1, tolerance=0.1), [gradient(1.0)])


def test_moves_follow_a_schedule():
    rule = sign_steps(0.4, schedule=optax.linear_schedule(1.0, 0.5, 2))
    assert first(follow(rule, [gradient(1.0)] * 3)) == [1.0, 0.6, 0.3, 0.1]


def test_any_optimizer_can_be_kept_within_bounds():
    path = follow(
        within(optax.sgd(1.0), 0.5, {"rate": 2.0, "decay": 1.5}), [gradient(9.0, -9.0, -9.0)]
    )
    np.testing.assert_allclose(path[-1]["rate"], [0.5, 2.0])
    np.testing.assert_allclose(path[-1]["decay"], [1.5])


def test_hyperparameters_stay_in_their_ranges():
    chosen = {"rate": Hyperparameter(1e-3, 1.0, space="log", start=0.1, windows=2)}
    eta = {"rate": jnp.log(jnp.array([0.1, 0.1]))}
    rule = in_ranges(optax.sgd(100.0), chosen)
    path = follow(rule, [{"rate": jnp.array([1.0, -1.0])}], eta=eta)
    np.testing.assert_allclose(jnp.exp(path[-1]["rate"]), [1e-3, 1.0], rtol=1e-5)


def test_the_rule_of_fds_begins_with_a_share_of_each_range_and_stops_at_a_twentieth():
    chosen = {
        "rate": Hyperparameter(1e-2, 1.0, space="log", start=0.1, windows=2),
        "decay": Hyperparameter(0.0, 2.0, 1.0),
    }
    eta = {"rate": jnp.log(jnp.array([0.1, 0.1])), "decay": jnp.array([1.0])}
    path = follow(fds_rule(chosen, share=0.1, tolerance=None), [gradient(1.0)], eta=eta)
    assert float(eta["rate"][0] - path[1]["rate"][0]) == pytest.approx(0.1 * np.log(100))
    assert float(path[1]["decay"][0]) == pytest.approx(0.8)
    flips = [gradient((-1.0) ** i) for i in range(12)]
    moved = follow(fds_rule(chosen, share=0.1, tolerance=None), flips, eta=eta)
    sizes = [
        abs(float(b["rate"][0] - a["rate"][0])) for a, b in zip(moved, moved[1:], strict=False)
    ]
    assert min(size for size in sizes if size) > 0.05 and sizes[-1] == 0


def test_the_last_of_its_steps_goes_back_to_what_was_last_accepted():
    chosen = {"decay": Hyperparameter(0.0, 2.0, 1.0)}
    eta, slopes = {"decay": jnp.array([1.0])}, [{"decay": jnp.array([1.0])}] * 3
    path = follow(fds_rule(chosen, steps=3), slopes, [1.0, 0.9, 5.0], eta=eta)
    found = [float(each["decay"][0]) for each in path]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.8])  # the third was not accepted
    path = follow(fds_rule(chosen, steps=3), slopes, [1.0, 0.9, 0.8], eta=eta)
    assert float(path[-1]["decay"][0]) == float(path[-2]["decay"][0])  # and here it was
    with pytest.raises(ValueError, match="Leave one of them out"):
        fds_rule(chosen, steps=3, tolerance=None)


def test_a_narrow_range_moves_all_the_same():
    chosen = {"b1": Hyperparameter(0.8, 0.99, start=0.9)}
    path = follow(fds_rule(chosen), [{"b1": jnp.array([1.0])}], [1.0], eta={"b1": jnp.array([0.9])})
    assert float(path[-1]["b1"][0]) == pytest.approx(0.881)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_below_zero_is_refused(tolerance):
    with pytest.raises(ValueError, match=rf"^`fds_rule\(tolerance={tolerance}\)`: it is 0 or more"):
        fds_rule({"b1": Hyperparameter(0.8, 0.99, start=0.9)}, tolerance=tolerance)


def test_a_range_without_an_end_has_no_share():
    with pytest.raises(ValueError, match="that of 'rate' goes from 0.0 to inf"):
        fds_rule({"rate": Hyperparameter(0.0, float("inf"), 0.1)})
