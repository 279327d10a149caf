"""One outer step, and evaluation: what they compute, whatever computes it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.stats import t as student

from metalearn import Forward, MixedFlow, Reverse, Trainer, Truncation
from metalearn._utils.intervals import half_width, interval
from metalearn.algorithms import MAML, squared_error
from metalearn.cost.jaxpr import largest_factor
from metalearn.datasets import Sinusoid
from metalearn.engines.inner_loop import rollout
from metalearn.model import Model
from metalearn.sharding import batched_means
from metalearn.sharding.batched_means import mean_and_each, sum_over_tasks
from tests.cases import MODELS, TASKS, Float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
MODEL, WAVES = Float64(MODELS["Functions"]), TASKS["Sinusoid"]
ALGORITHM = MAML(MODEL, squared_error, optax.sgd(0.05), inner_steps=2)
TRAINER = Trainer(ALGORITHM, optimizer=optax.adam(0.01), tasks_per_step=6)
KEY = jax.random.key(0)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("chunk", quick([1, 2, 3, 6], lambda chunk: chunk == 2))
def test_a_step_in_chunks_is_the_same_step(chunk):
    state, metrics = TRAINER.step(TRAINER.init(KEY), WAVES)
    chunked = dataclasses.replace(TRAINER, chunk=chunk)
    chunked_state, chunked_metrics = chunked.step(chunked.init(KEY), WAVES)
    np.testing.assert_allclose(flat(chunked_state.eta), flat(state.eta), rtol=1e-12)
    np.testing.assert_allclose(
        flat(chunked_state.optimizer), flat(state.optimizer), rtol=1e-11, atol=1e-15
    )
    assert chunked_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(chunked_metrics[name], value, rtol=1e-12)


def temporaries(monkeypatch, backend="cpu", cache=10, **settings):
    """Bytes of the compiled step of the six tasks of `TRAINER`, where a cache has so many bytes."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(batched_means, "CACHE", cache)
    trainer = dataclasses.replace(TRAINER, **settings)
    start = trainer.init(KEY)
    compiled = trainer.step.lower(start, WAVES).compile()
    state = compiled(start, WAVES)[0]
    np.testing.assert_allclose(flat(state.eta), flat(TRAINER.step(start, WAVES)[0].eta), rtol=1e-11)
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_cpu_takes_tasks_one_at_a_time_that_would_outgrow_its_cache(monkeypatch):
    all_at_once = temporaries(monkeypatch, chunk=6)
    one_at_a_time = temporaries(monkeypatch, chunk=1)
    assert one_at_a_time < all_at_once
    assert temporaries(monkeypatch) == one_at_a_time
    assert temporaries(monkeypatch, cache=10**6) == all_at_once
    assert temporaries(monkeypatch, backend="gpu") == all_at_once


@pytest.mark.parametrize("chunk", [None, 1, 2, 6])
@pytest.mark.parametrize("cache", [10, 10**6])
def test_a_task_is_traced_once_however_many_are_taken_at_once(monkeypatch, chunk, cache):
    monkeypatch.setattr(batched_means, "CACHE", cache)
    traced = []

    def of_task(x):
        traced.append(x)
        return {"square": (x @ x).sum(), "count": 1}, x + 1

    x = jax.random.normal(KEY, (6, 3, 3))
    means, each = jax.jit(lambda x: mean_and_each(of_task, x, chunk))(x)
    assert len(traced) == 1
    np.testing.assert_allclose(means["square"], (x @ x).sum((1, 2)).mean(), rtol=1e-12)
    assert means["count"] == 1
    np.testing.assert_array_equal(each, x + 1)


def test_what_segments_keep_is_of_all_tasks_unless_told_otherwise():
    assert dataclasses.replace(TRAINER, segment=1).batch.chunk == 6
    assert dataclasses.replace(TRAINER, segment=1, chunk=2).batch.chunk == 2


def test_the_largest_factor_is_that_of_products_inside_loops_too():
    def function(x):
        big = jnp.zeros((1000, 1000)).sum()

        def body(carry, _):
            return carry @ jnp.ones((7, 7)), None

        return jax.lax.scan(body, x, None, length=2)[0] + big

    x = jnp.ones((30, 7))
    assert largest_factor(jax.make_jaxpr(function)(x)) == 30 * 7 * 8
    assert largest_factor(jax.make_jaxpr(lambda x: jnp.sin(x))(x)) == 0


@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_means_of_low_precision_are_summed_in_float32(chunk):
    ones = jnp.ones((512, 3), jnp.bfloat16)
    (mean, share), _ = mean_and_each(lambda x: ((x, x[0] > 0), ()), ones, chunk)
    assert mean.dtype == jnp.bfloat16 and share.dtype == jnp.float32
    assert (mean == 1).all() and share == 1


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 40, 50), (1000, 64, 32)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "complex128"])
def test_a_sum_over_tasks_is_that_of_numpy(shape, dtype):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    found = sum_over_tasks(jnp.asarray(x))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, x.sum(0), rtol=1e-5, atol=1e-4 if dtype == "float32" else 0)


@pytest.mark.parametrize("chunk", [0, 4, 12])
def test_a_chunk_that_does_not_divide_is_refused_with_those_that_fit(chunk):
    message = (
        f"^tasks_per_step=6 does not divide into chunks of {chunk}. Chunks that fit: 1, 2, 3, 6.$"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(ALGORITHM, tasks_per_step=6, chunk=chunk)


@pytest.mark.parametrize(
    "engine",
    quick([Reverse(), Forward(), MixedFlow()], lambda engine: engine == MixedFlow()),
    ids=repr,
)
def test_a_step_descends_the_mean_of_the_meta_gradients_of_its_tasks(engine):
    trainer = dataclasses.replace(TRAINER, engine=engine, optimizer=optax.sgd(0.5))
    start = trainer.init(KEY)
    end, metrics = trainer.step(start, WAVES)
    keys = jax.random.split(jax.random.fold_in(start.key, 0), 6)
    of_each = jax.jit(jax.vmap(lambda key: trainer.task_gradient(start.eta, WAVES, key)))
    grads, losses = of_each(keys)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    np.testing.assert_allclose(flat(end.eta), flat(start.eta) - 0.5 * flat(mean), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], losses["loss"].mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["meta_grad_norm"], np.linalg.norm(flat(mean)), rtol=1e-12)
    assert np.unique(losses["loss"]).size == 6  # six different tasks


def test_a_step_reports_the_outer_loss_the_metrics_and_the_inner_loop():
    always = {"loss", "inner_loss_first", "inner_loss_last", "inner_finite"}
    always |= {"inner_steps_finite", "inner_update_norm", "meta_grad_norm", "meta_update_norm"}
    _, metrics = TRAINER.step(TRAINER.init(KEY), WAVES)
    assert metrics.keys() == always
    assert all(value.shape == () for value in metrics.values())
    assert metrics["inner_finite"] == 1
    assert metrics["inner_loss_last"] < metrics["inner_loss_first"]
    classifier = Trainer(MAML(Float64(MODELS["linen-ConvNet"])), tasks_per_step=2)
    _, metrics = classifier.step(classifier.init(KEY), TASKS["FewShot"])
    assert metrics.keys() == always | {"accuracy"}


def test_an_inner_gradient_that_is_not_finite_is_counted():
    """One wave in two is infinite far from zero: its loss is infinite, its gradient NaN."""
    wild = Sinusoid(shots=3, queries=4, amplitude=(-3e38, 3e38))
    trainer = Trainer(MAML(MODELS["Functions"], squared_error, optax.sgd(1e30)), tasks_per_step=2)
    _, metrics = trainer.step(trainer.init(KEY), wild)
    assert metrics["inner_finite"] < 1


def test_the_key_decides_the_run_and_the_step_its_tasks():
    states = {}
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        state = TRAINER.init(jax.random.key(seed))
        for _ in range(3):
            state, _ = TRAINER.step(state, WAVES)
        states[name] = flat(state.eta)
    assert (states["one"] == states["again"]).all() and (states["one"] != states["other"]).all()
    state = TRAINER.init(KEY)
    _, first = TRAINER.step(state, WAVES)
    _, later = TRAINER.step(dataclasses.replace(state, step=state.step + 1), WAVES)
    assert first["loss"] != later["loss"]


def test_evaluation_is_the_mean_over_tasks_with_its_95_percentinterval():
    eta = TRAINER.init(KEY).eta
    result = TRAINER.evaluate(eta, WAVES, jax.random.key(9), count=12)["loss"]

    def loss_of(key):  # as documented: one key each for the task, the unroll, the batches
        sample_key, unroll_key, batch_key = jax.random.split(key, 3)
        episode = WAVES.sample(sample_key)
        unroll = ALGORITHM.unroll(episode, unroll_key)
        return rollout(unroll, eta, ALGORITHM.batches(episode, batch_key))[0]

    losses = np.asarray(jax.jit(jax.vmap(loss_of))(jax.random.split(jax.random.key(9), 12)))
    assert result.tasks == 12
    np.testing.assert_allclose(result.mean, losses.mean(), rtol=1e-12)
    interval = student.ppf(0.975, 11) * np.std(losses, ddof=1) / np.sqrt(12)
    np.testing.assert_allclose(result.ci95, interval, rtol=1e-10)
    assert str(result) == f"{losses.mean():.4f} +- {interval:.4f}"


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (1000, 1.9623)])
def test_the_interval_of_a_mean_is_by_students_t(n, t):
    values = np.random.default_rng(n).normal(size=n)
    expected = t * np.std(values, ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(interval(values).ci95, expected, rtol=1e-4)
    np.testing.assert_allclose(half_width(np.stack([values] * 2, 1)), [expected] * 2, rtol=1e-4)


def test_a_single_value_says_nothing_of_its_spread():
    assert np.isnan(half_width([3.0])) and np.isnan(half_width(np.ones((1, 2)))).all()


def test_evaluation_is_decided_by_its_key():
    eta = TRAINER.init(KEY).eta
    once, again, other = (
        TRAINER.evaluate(eta, WAVES, jax.random.key(seed), count=12) for seed in (1, 1, 2)
    )
    assert once == again and once["loss"].mean != other["loss"].mean


def test_evaluation_takes_any_number_of_tasks_in_chunks_of_a_step():
    eta = TRAINER.init(KEY).eta
    result = TRAINER.evaluate(eta, WAVES, KEY, count=8)  # chunks of 6
    assert result["loss"].tasks == 8
    keys = jax.random.split(KEY, 12)[:8]
    losses = jnp.concatenate(
        [TRAINER._evaluate(eta, WAVES, k)["loss"] for k in (keys[:4], keys[4:])]
    )
    np.testing.assert_allclose(result["loss"].mean, losses.mean(), rtol=1e-12)
    single = TRAINER.evaluate(eta, WAVES, KEY, count=1)["loss"]
    assert np.isnan(single.ci95) and np.isfinite(single.mean)


@pytest.mark.slow
def test_a_hundred_steps_of_sinusoid_lower_the_loss():
    algorithm = MAML(MODELS["linen-MLP"], squared_error, optax.sgd(0.02))
    trainer = Trainer(algorithm, optimizer=optax.adam(0.02), tasks_per_step=16)
    state, waves, key = trainer.init(KEY), Sinusoid(), jax.random.key(5)
    before = trainer.evaluate(state.eta, waves, key, 320)["loss"]
    for _ in range(100):
        state, _ = trainer.step(state, waves)
    after = trainer.evaluate(state.eta, waves, key, 320)["loss"]
    assert after.mean + after.ci95 < before.mean


def test_an_engine_by_name_is_refused_where_objects_are_taken():
    with pytest.raises(TypeError, match=r"takes an engine, such as `MixedFlow\(\)`, not 'reverse'"):
        Trainer(ALGORITHM, engine="reverse")


def test_a_truncation_is_no_number():
    with pytest.raises(TypeError, match=r"takes `Truncation\(steps\)`, not 5"):
        Trainer(ALGORITHM, truncation=5)


def test_a_state_of_whole_runs_is_refused_in_truncated_training():
    cut = dataclasses.replace(TRAINER, truncation=Truncation(1))
    with pytest.raises(ValueError, match="has no inner runs to go on with"):
        cut.step(TRAINER.init(KEY), WAVES)


def test_a_step_of_no_tasks_is_refused():
    with pytest.raises(ValueError, match="^An outer step takes at least one task, not 0.$"):
        Trainer(ALGORITHM, tasks_per_step=0)


@dataclasses.dataclass(frozen=True)
class WithMetrics(MAML):
    """Returns these metrics."""

    metrics: Any = None

    def unroll(self, episode, key):
        unroll = super().unroll(episode, key)
        return unroll._replace(loss=lambda eta, state: (unroll.loss(eta, state)[0], self.metrics))


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "returns a metric called 'loss', a name that the Trainer"),
        (
            {"each": jnp.ones(3)},
            TypeError,
            r"returns a metric 'each' of shape \[3\]\. Take its mean",
        ),
        ({"group": {"a": 1.0}}, TypeError, r"returns a metric 'group' of shape \{'a': \[\]\}"),
    ],
)
def test_metrics_are_numbers_by_names_that_are_free(metrics, error, message):
    algorithm = WithMetrics(MODEL, squared_error, metrics=metrics)
    trainer = Trainer(algorithm, tasks_per_step=2)
    state = trainer.init(KEY)
    with pytest.raises(error, match=message):
        trainer.step(state, WAVES)
    with pytest.raises(error, match=message):
        trainer.evaluate(trainer.learned(state), WAVES, KEY, 2)


def test_an_unroll_that_is_a_plain_tuple_is_refused_by_what_it_has_to_be():
    class Plain(MAML):
        def unroll(self, episode, key):
            return tuple(super().unroll(episode, key))

    trainer = Trainer(Plain(MODEL, squared_error))
    message = r"^`Plain.unroll` returns a `metalearn.Unroll\(init, step, loss\)`, not a tuple\."
    with pytest.raises(TypeError, match=message):
        trainer.step(trainer.init(KEY), WAVES)
    with pytest.raises(TypeError, match=message):
        trainer.fit(WAVES, 1, key=KEY, progress=False)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("init", lambda: TRAINER.init(0)),
        ("fit", lambda: TRAINER.fit(WAVES, 1, key=0, progress=False)),
        ("evaluate", lambda: TRAINER.evaluate({}, WAVES, 0, 2)),
    ],
)
def test_a_seed_is_no_key(method, call):
    message = rf"^`Trainer.{method}\(key=\)` takes a key, not 0. Of a seed: `jax.random.key\(0\)`.$"
    with pytest.raises(TypeError, match=message):
        call()


def test_the_outer_step_compiles_once_though_eta_begins_with_weak_types():
    model = MODELS["Functions"]
    trainer = Trainer(MAML(Scaled(model), squared_error), tasks_per_step=2)
    state = trainer.init(KEY)
    for _ in range(3):
        state, _ = trainer.step(state, WAVES)
    assert trainer.step._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class Scaled(Model):
    """A model with one more parameter, weakly typed: a gain."""

    model: Model

    def init(self, key):
        params, state = self.model.init(key)
        gain = jnp.exp(0.0)
        assert gain.weak_type
        return {"params": params, "gain": gain}, state

    def apply(self, params, state, inputs, **mode):
        outputs, state = self.model.apply(params["params"], state, inputs, **mode)
        return params["gain"] * outputs, state
