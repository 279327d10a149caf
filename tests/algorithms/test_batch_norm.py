"""The three answers to what batch normalisation does inside an inner loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Episode
from metalearn.algorithms import (
    CAVIA,
    COMLN,
    MAML,
    R2D2,
    LearnedLoss,
    MAMLPlusPlus,
    MetaCurvature,
    MetaNTK,
    ProtoNet,
    Reptile,
)
from metalearn.algorithms.maml import batch_norm_policy
from metalearn.engines.inner_loop import rollout
from metalearn.models import Model
from tests.cases import LIBRARIES, TASKS, Float64, conv_net, to_float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
MOMENTUM = 0.7


def episodes(n=2):
    keys = jax.random.split(jax.random.key(4), n)
    sample = jax.jit(TASKS["FewShot"].sample)
    return [to_float64(sample(key)) for key in keys]


def adapted(library, policy, *episodes, steps=2, rate=0.1):
    """[(query logits, final statistics)] of adapting one initialisation to each episode."""

    def logits_of(outputs, labels):
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
        return loss, {"outputs": outputs}

    model = Float64(conv_net(library, momentum=MOMENTUM))
    algorithm = MAML(model, logits_of, optax.sgd(rate), steps, batch_norm=policy)
    key = jax.random.key(0)
    eta = jax.jit(algorithm.init)(key)

    @jax.jit
    def run(episode):
        unroll = algorithm.unroll(episode, key)
        _, aux = rollout(unroll, eta, algorithm.batches(episode, key))
        return aux.metrics["outputs"], aux.state.statistics

    _, initial = jax.jit(model.init)(key)
    return [run(episode) for episode in episodes], initial


def with_other_queries(episode):
    """The same episode, but for all queries after the first."""
    x, y = episode.query
    return Episode(episode.support, (x.at[1:].set(x[1:, ::-1] * 0.5), y))


def with_other_support(episode):
    x, y = episode.support
    return Episode((x * 0.5 + 0.1, y), episode.query)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-12)), a, b))


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "linen"))
def test_transductive_queries_help_each_other(library):
    episode, _ = episodes()
    results, initial = adapted(library, "transductive", episode, with_other_queries(episode))
    (one, statistics), (other, _) = results
    assert abs(one[0] - other[0]).max() > 1e-3
    assert same(statistics, initial)  # and no running average is kept


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "nnx"))
def test_running_queries_are_predicted_one_by_one(library):
    episode, _ = episodes()
    results, _ = adapted(library, "running", episode, with_other_queries(episode))
    np.testing.assert_allclose(results[0][0][0], results[1][0][0], rtol=1e-12)
    assert abs(results[0][0][1:] - results[1][0][1:]).max() > 1e-3  # those did change


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "haiku"))
def test_running_statistics_are_those_of_the_support_set_and_start_anew_for_every_task(library):
    one, two = episodes()
    results, initial = adapted(library, "running", one, two, with_other_support(one), one)
    statistics = [s for _, s in results]
    assert not same(statistics[0], initial)
    assert not same(statistics[0], statistics[1]) and not same(statistics[0], statistics[2])
    assert same(statistics[0], statistics[3])  # whatever was adapted to in between


@pytest.mark.slow
def test_running_statistics_are_the_average_that_the_momentum_says():
    """With a rate of 0 the network stands still, and its first mean can be written down."""
    episode, _ = episodes(2)
    ((_, statistics),), initial = adapted("linen", "running", episode, steps=3, rate=0.0)
    model = Float64(conv_net("linen", momentum=0.0))  # trusts the last batch alone
    params, state = jax.jit(model.init)(jax.random.key(0))
    train = jax.jit(functools.partial(model.apply, train=True))
    _, state = train(params, state, episode.support[0])
    of_batch, ours = (s["batch_stats"]["norm_0"] for s in (state, statistics))
    kept = MOMENTUM**3
    np.testing.assert_allclose(ours["mean"], (1 - kept) * of_batch["mean"], rtol=1e-10)
    np.testing.assert_allclose(ours["var"], kept + (1 - kept) * of_batch["var"], rtol=1e-10)
    assert initial["batch_stats"]["norm_0"]["mean"].tolist() == [0, 0]


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "linen"))
def test_frozen_statistics_never_change_and_queries_are_predicted_one_by_one(library):
    episode, _ = episodes()
    results, initial = adapted(library, "frozen", episode, with_other_queries(episode))
    assert all(same(statistics, initial) for _, statistics in results)
    np.testing.assert_allclose(results[0][0][0], results[1][0][0], rtol=1e-12)
    assert abs(results[0][0][1:] - results[1][0][1:]).max() > 1e-3


class Centred(Model):
    """A hidden layer whose mean is taken away: a batch normalisation that compiles quickly."""

    def __init__(self, width):
        self.width = width

    def init(self, key):
        w, v = (jax.random.normal(jax.random.fold_in(key, i), (self.width, 2)) for i in range(2))
        return {"w": w, "v": v[:2]}, {"mean": jnp.full(2, 0.3)}

    def apply(self, params, state, inputs, *, train, dropout=True, key=None):
        hidden = inputs @ params["w"]
        mean = hidden.mean(0) if train else state["mean"]
        if train:
            state = {"mean": (state["mean"] + mean) / 2}
        return jnp.tanh(hidden - mean[None]) @ params["v"], state


POLICY_OF = {
    "MAML": lambda **policy: MAML(Centred(3), **policy),
    "MAML++": lambda **policy: MAMLPlusPlus(Centred(3), **policy),
    "Reptile": lambda **policy: Reptile(Centred(3), **policy),
    "CAVIA": lambda **policy: CAVIA(Centred(5), context=2, **policy),
    "MetaCurvature": lambda **policy: MetaCurvature(Centred(3), **policy),
    "LearnedLoss": lambda **policy: LearnedLoss(Centred(3), **policy),
    "COMLN": lambda **policy: COMLN(Centred(3), 2, **policy),
    "ProtoNet": lambda **policy: ProtoNet(Centred(3), 2, **policy),
    "R2D2": lambda **policy: R2D2(Centred(3), 2, **policy),
    "MetaNTK": lambda **policy: MetaNTK(Centred(3), **policy),
}


@pytest.mark.parametrize("name", POLICY_OF)
def test_every_algorithm_keeps_to_the_policy_in_the_inner_loop_and_for_queries(name):
    support, queries = jax.random.normal(jax.random.key(2), (2, 4, 3))
    others = queries.at[1:].multiply(0.5)
    initial = {"mean": jnp.full(2, 0.3)}
    adapted = {}
    for policy in ("transductive", "running", "frozen"):
        algorithm = POLICY_OF[name](batch_norm=policy)
        key = jax.random.key(0)
        learner = algorithm.adapt(algorithm.init(key), (support, jnp.array([0, 1, 0, 1])), key)
        alone = same(learner.predict(queries)[0], learner.predict(others)[0])
        assert alone == (policy != "transductive")
        assert same(learner.statistics, initial) == (policy != "running")
        adapted[policy] = learner.params
    assert same(adapted["transductive"], adapted["running"])
    assert not same(adapted["transductive"], adapted["frozen"])


def test_an_unknown_policy_is_refused_with_those_there_are():
    message = "No batch-normalisation policy is called 'local'. There are: frozen, running, "
    with pytest.raises(ValueError, match="^" + re.escape(message + "transductive.")):
        batch_norm_policy("local")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        MAML(conv_net("linen"), batch_norm="local")
