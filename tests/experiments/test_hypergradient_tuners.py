"""FDS and online hypergradients as tuners: what they find, and what they are charged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import Forward, MixedFlow, Reverse
from metalearn.algorithms import Hyperparameter
from metalearn.experiments.tuners.fds import Hypergradients
from metalearn.experiments.tuners.online import Online, constant
from tests.helpers.tuning import KEY, T, problem, problem_of


def slow_start():
    """A learning rate far too small, and nothing else."""
    rate = Hyperparameter(1e-4, 1.0, start=1e-3, windows=3, space="log")
    return problem_of({"learning_rate": rate})


@pytest.mark.slow
def test_hypergradients_are_charged_by_their_flops_and_keep_to_the_budget():
    tuned = problem()
    price = tuned.charge(MixedFlow("nested"))
    assert 2 * T < price < 6 * T
    assert price < tuned.charge(Reverse("nested"))
    found = list(Hypergradients(steps=9).tune(tuned, 3.5 * price, KEY))
    np.testing.assert_allclose([f.spent for f in found], price * np.arange(1, 4))
    assert len(list(Hypergradients(steps=2).tune(tuned, 1e9, KEY))) == 2


@pytest.mark.slow
def test_hypergradients_raise_a_learning_rate_that_is_too_small():
    tuned = slow_start()
    found = list(Hypergradients(steps=4).tune(tuned, 1e9, KEY))
    assert (found[-1].eta["learning_rate"] > tuned.algorithm.init(KEY)["learning_rate"]).all()
    etas = jax.tree.map(lambda a, b: jnp.stack([a, b]), tuned.algorithm.init(KEY), found[-1].eta)
    before, after = tuned.tester()(etas, jnp.stack([KEY, KEY])).loss
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_online_run_answers_with_the_value_of_every_step(decay):
    tuned = slow_start()
    found = list(Online(decay, rates=(1e-2, 1.0)).tune(tuned, 1e9, KEY))
    path = found[-1].eta["learning_rate"]
    assert path.shape == (T,)
    np.testing.assert_allclose(path[0], np.log(1e-3), rtol=1e-5)
    assert path[-1] > path[0]
    assert found[-1].loss <= found[0].loss
    price = tuned.charge(Forward(inexact_decay=decay), constant(tuned.algorithm)) + 2 * T
    np.testing.assert_allclose([f.spent for f in found], [price, 2 * price])
    assert len(list(Online(decay).tune(tuned, 2.5 * price, KEY))) == 2


@pytest.mark.slow
def test_greedy_and_full_memory_are_different_ways():
    tuned = slow_start()
    greedy, full = (
        list(Online(decay, rates=(1.0,)).tune(tuned, 1e9, KEY))[0].eta["learning_rate"]
        for decay in (0.0, 1.0)
    )
    np.testing.assert_allclose(greedy[1], full[1], rtol=1e-4)  # after one step they agree
    assert abs(greedy[-1] - full[-1]) > 1e-4


def test_a_constant_schedule_begins_with_the_first_window():
    several = {"learning_rate": Hyperparameter(0.0, 1.0, (0.1, 0.2), windows=2)}
    single = constant(problem_of(several).algorithm).hyperparameters["learning_rate"]
    assert (single.windows, single.start) == (1, 0.1)


@pytest.mark.slow
def test_windows_of_every_hyperparameter_cost_a_hypergradient_nothing():
    tuned = slow_start()
    price = tuned.charge(MixedFlow("nested"))
    (found,) = Hypergradients(steps=1, windows=3).tune(tuned, 1e9, KEY)
    assert {len(x) for x in found.eta.values()} == {3}
    np.testing.assert_allclose(found.spent, price, rtol=0.02)
    assert jnp.isfinite(
        tuned.tester(found.algorithm)(jax.tree.map(lambda x: x[None], found.eta), KEY[None]).loss
    ).all()
