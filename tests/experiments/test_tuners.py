"""Every tuner on one tiny problem: what it finds, what it charges, what it refuses."""

import dataclasses
import functools
import importlib
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.algorithms import Hyperparameter, cross_entropy, sgd
from metalearn.experiments.tuners.black_box import BOHB, BayesianOptimization, Hyperband
from metalearn.experiments.tuners.fixed import Cosine, LearningRateFree, MetaRegularization
from metalearn.experiments.tuners.problem import Score, TuningProblem
from metalearn.experiments.tuners.random_search import Ledger, RandomSearch
from tests.helpers.selection import quick
from tests.helpers.tuning import KEY, T, problem, problem_of

SMALL = Hyperband(batch=2, rungs=2)
RACES = [4, 4, 4, 12, 12, 12]  # of SMALL: 3 runs of 4 steps and 1 of 12; 2 of 12
TUNERS = {
    "RandomSearch": (RandomSearch(batch=4), [T] * 6),
    "BayesianOptimization": (BayesianOptimization(), [T] * 12),
    "Hyperband": (SMALL, RACES * 2),
    "BOHB": (BOHB(SMALL), RACES * 4),
    "Cosine": (Cosine(peaks=(0.03, 0.1, 0.3)), [T] * 3),
    "mechanic": (LearningRateFree("mechanic"), [T]),
    "prodigy": (LearningRateFree("prodigy", annealed=True), [T]),
    "MetaRegularization": (MetaRegularization(rates=(0.1, 1.0)), [T] * 2),
}
SEARCHES = ("RandomSearch", "BayesianOptimization", "Hyperband", "BOHB")


def one_of_each(names, kinds=("RandomSearch", "Hyperband", "Cosine", "prodigy")):
    """Of random, racing, fixed and learning-rate-free tuners one is quick."""
    return quick(names, lambda name: name in kinds)


class Bowl(TuningProblem):
    """Nothing is trained: the loss is the distance from 0.2, and nearly as much when short."""

    def validator(self, algorithm=None, inner_steps=None):
        def validate(etas, keys):
            away = jnp.stack([jnp.abs(x - 0.2).max(1) for x in etas.values()]).max(0)
            noise = jax.vmap(jax.random.normal)(keys) / 100
            return Score(away + noise * (inner_steps != self.algorithm.inner_steps), away)

        return validate


def fragile(outputs, targets):
    loss, metrics = cross_entropy(outputs, targets)
    return jnp.where(loss < 5, loss, jnp.nan), metrics


def hopeless(outputs, targets):
    loss, metrics = cross_entropy(outputs, targets)
    return loss * jnp.nan, metrics


def bowl(windows=2, horizon=27):
    return problem_of({"learning_rate": Hyperparameter(-1, 1, windows=windows)}, horizon, Bowl)


def tuned(name, tuning=None, key=KEY):
    """All that a tuner finds; its budget is what it should cost, and less than a run more."""
    tuner, costs = TUNERS[name]
    return list(tuner.tune(tuning or problem(), sum(costs) + 0.5, key))


tuned_once = functools.cache(tuned)


def same(one, other):
    equal = jax.tree.map(np.array_equal, (one.eta, one.loss), (other.eta, other.loss))
    return all(jax.tree.leaves(equal))


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("name", one_of_each(TUNERS, ("RandomSearch", "prodigy")))
def test_a_tuner_finds_an_eta_in_its_ranges(name):
    for found in tuned_once(name):
        low, high = TuningProblem(found.algorithm, None, None).bounds
        assert found.eta.keys() == low.keys()
        assert all(found.eta[n].shape == low[n].shape for n in low)
        assert all(((low[n] <= x) & (x <= high[n])).all() for n, x in found.eta.items())
        assert np.isfinite(found.loss)


@pytest.mark.parametrize("name", one_of_each(TUNERS))
def test_every_run_is_charged_and_none_is_begun_that_exceeds_the_budget(name):
    tuner, costs = TUNERS[name]
    assert [found.spent for found in tuned_once(name)] == list(itertools.accumulate(costs))
    assert list(tuner.tune(problem(), min(costs) - 1, KEY)) == []


@pytest.mark.parametrize("name", one_of_each(TUNERS))
def test_incumbents_of_full_length_never_get_worse(name):
    full = TUNERS[name][1].index(T)
    seen = [found.loss for found in tuned_once(name)][full:]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("name", one_of_each(TUNERS))
def test_a_tuner_finds_the_same_again_with_the_same_key(name):
    assert all(map(same, tuned(name), tuned_once(name)))


@pytest.mark.parametrize("name", one_of_each(SEARCHES))
def test_a_tuner_finds_something_else_with_another_key(name):
    assert not same(tuned(name, key=jax.random.key(1))[-1], tuned_once(name)[-1])


@pytest.mark.parametrize("name", one_of_each(["Hyperband", "Cosine", "prodigy"], ["Cosine"]))
def test_what_was_found_trains_a_longer_run_on_all_the_data(name):
    found = tuned_once(name)[-1]
    score = problem().tester(found.algorithm)(
        jax.tree.map(lambda x: jnp.asarray(x)[None], found.eta), KEY[None]
    )
    assert np.isfinite(score.loss).all() and 0 <= score.accuracy[0] <= 1


@functools.cache
def diverging(objective=fragile, **settings):
    wide = {"learning_rate": Hyperparameter(1e-3, 1e20, start=1e-3, space="log")}
    return problem_of(wide, objective=objective, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each(SEARCHES, ["RandomSearch"]))
def test_where_nearly_all_runs_diverge_the_incumbent_is_one_that_does_not(name):
    keys = jax.random.split(KEY, 32)
    drawn = diverging().validator()(jax.vmap(diverging().draw)(keys), keys).loss
    assert np.isinf(drawn).mean() > 0.7
    finite = np.isfinite([found.loss for found in tuned(name, diverging())])
    assert len(finite) == len(TUNERS[name][1])
    assert finite[-1] and (np.diff(finite.astype(int)) >= 0).all()


@pytest.mark.parametrize("name", one_of_each(TUNERS, ["RandomSearch"]))
def test_where_all_runs_diverge_the_first_candidate_is_the_answer(name):
    found = tuned(name, diverging(objective=hopeless))
    assert [f.loss for f in found] == [np.inf] * len(TUNERS[name][1])
    assert found[0].eta is not None and all(same(f, found[0]) for f in found)


def test_a_longer_run_is_believed_before_a_better_shorter_one_unless_it_diverged():
    ledger = Ledger(problem().algorithm)
    runs = [(4, 1, np.inf), (4, 2, 0.5), (12, 3, np.inf), (12, 4, 0.9), (4, 5, 0.1), (12, 6, 0.8)]
    assert [ledger.charged(*run).eta for run in runs] == [1, 2, 2, 4, 4, 6]


@pytest.mark.slow
def test_random_search_finds_the_same_whatever_is_trained_at_once():
    other = list(RandomSearch(batch=5).tune(problem(), 6 * T, KEY))
    for found, expected in zip(other, tuned_once("RandomSearch"), strict=True):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.eta, expected.eta)))
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)


@pytest.mark.slow
def test_hyperband_costs_what_its_rungs_add_up_to():
    rungs = [[27, 9, 3, 1], [0, 12, 4, 1], [0, 0, 6, 2], [0, 0, 0, 4]]
    lengths = [1, 3, 9, 27]
    expected = [s for race in rungs for n, s in zip(race, lengths, strict=True) for _ in range(n)]
    assert sum(expected) == 4 * 27 + (12 * 3 + 4 * 9 + 27) + 4 * 27 + 4 * 27 == 423
    found = list(Hyperband().tune(bowl(windows=1), 423, KEY))
    assert [f.spent for f in found] == list(itertools.accumulate(expected))


def test_the_best_of_a_rung_go_on_to_the_next():
    found = list(Hyperband(rungs=3).tune(bowl(windows=1), 9 * 3 + 3 * 9 + 27, KEY))
    assert [f.spent for f in found][-1] == 81 and len(found) == 13
    best = min(found[:9], key=lambda f: f.loss)  # by more than the noise of short runs
    assert same(found[-1]._replace(loss=0.0), best._replace(loss=0.0))


@pytest.mark.parametrize(("windows", "lengths"), [(1, [27, 9, 3, 1]), (3, [27, 9, 3]), (27, [27])])
def test_no_run_of_hyperband_is_shorter_than_its_schedule_has_windows(windows, lengths):
    assert Hyperband().lengths(bowl(windows).algorithm) == lengths


@pytest.mark.parametrize("tuner", [BayesianOptimization(), BOHB(Hyperband(rungs=2))], ids=str)
@pytest.mark.slow
def test_a_model_of_what_was_seen_finds_better_than_chance(tuner):
    tuning = bowl(windows=4)
    *_, chance = RandomSearch().tune(tuning, 80 * 27, KEY)
    *_, found = tuner.tune(tuning, 80 * 27, KEY)
    assert found.loss < 0.8 * chance.loss


def test_a_cosine_falls_from_its_peak_and_leaves_the_rest_where_it_starts():
    found = tuned_once("Cosine")[0]
    values = found.algorithm.schedules(found.eta)
    np.testing.assert_allclose([values["learning_rate"](t) for t in (0, 6)], [0.03, 0.015], 1e-5)
    assert 0 < values["learning_rate"](T - 1) < 0.001
    rest = {name: values[name](0) for name in ("momentum", "weight_decay", "smoothing")}
    np.testing.assert_allclose([*rest.values()], [0.9, 5e-4, 0.1], 1e-6)


def plain(learning_rate):
    return sgd(learning_rate)


def test_a_cosine_refuses_an_optimizer_without_momentum_unless_told_to_do_without():
    bare = dataclasses.replace(diverging(), algorithm=diverging(optimizer=plain).algorithm)
    with refused(
        "`Cosine` sets the optimizer's momentum, and the problem's optimizer takes learning_rate. "
        "Use one that takes it, such as `metalearn.algorithms.sgd`, or `Cosine(momentum=None)`."
    ):
        Cosine().tune(bare, T, KEY)
    *_, found = Cosine(momentum=None, weight_decay=None).tune(bare, 5 * T, KEY)
    assert found.eta.keys() == {"learning_rate"}


def test_settings_that_make_no_tuner_are_refused():
    with refused("Hyperband has runs `factor` >= 2 times as long from rung to rung"):
        Hyperband(factor=1)
    with refused("peaks are positive, and there is at least one of them; not peaks=()."):
        Cosine(peaks=())
    with refused("No learning-rate-free optimizer is called 'prodigi'. Did you mean 'prodigy'?"):
        LearningRateFree("prodigi")
    with refused("A first learning rate is positive, and there is at least one; not rates=()."):
        MetaRegularization(rates=())
    with refused("No divergence is called 'reverse-kl'. Did you mean 'reverse_kl'?"):
        MetaRegularization(divergence="reverse-kl")


def test_without_optuna_the_import_names_the_extra(monkeypatch):
    name = "metalearn.experiments.tuners.black_box"
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=re.escape('pip install "metalearn-jax[tuners]"')):
        importlib.import_module(name)
