"""Engines through thousands of steps: streams, what has not begun, budgets, many devices."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from metalearn import (
    Algorithm,
    Episode,
    Faults,
    Forward,
    MixedFlow,
    Reverse,
    Tasks,
    Trainer,
    Unroll,
)
from metalearn.algorithms import Hyperparameter, fds_rule
from metalearn.cost import cost
from metalearn.engines.forward.tangents import PARTS, Part, parts
from metalearn.engines.grad_recorder import joined
from metalearn.engines.inner_loop import state_bytes
from metalearn.engines.nested_scan import saved_states, segment_lengths
from metalearn.training.faults import NonFiniteError
from tests.helpers.fds import KEY, flat, make, make_episode, solve

LEARNED = {
    "learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=7),
    "momentum": Hyperparameter(0.0, 1.0, 0.5),
}
# Forward mode compiles a loop for every window.
FEWER = LEARNED | {"learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=2)}


# Streams.


@pytest.mark.slow
def test_a_stream_that_was_saved_in_mid_trajectory_goes_on_as_if_it_had_not_been(tmp_path):
    algorithm, engine, episode = make(FEWER, 30), Forward(), make_episode()
    eta = algorithm.init(KEY)
    unroll, batches = algorithm.unroll(episode, KEY), algorithm.batches(episode, KEY)
    advance = jax.jit(
        lambda s, b, until: engine.advance(unroll, eta, s, b, until), static_argnums=2
    )

    def through(stream, cuts):
        seen = []
        for start, stop in cuts:
            part = jax.tree.map(lambda x, cut=slice(start, stop): x[cut], batches)
            stream, inner = advance(stream, part, stop)
            seen.append(inner)
        return stream, seen

    start = jax.jit(lambda: engine.start(unroll, eta))()
    straight, seen = through(start, [(0, 10), (10, 20), (20, 30)])
    half, _ = through(start, [(0, 10), (10, 20)])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stream", half._asdict())
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: half._asdict())
        again = type(half)(**checkpointer.restore(tmp_path / "stream", shapes))
    resumed, _ = through(again, [(20, 30)])
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), straight, resumed))

    everything, _ = advance(start, batches, None)  # from the first step on
    np.testing.assert_allclose(
        flat(everything.tangents), flat(straight.tangents), rtol=1e-4, atol=1e-6
    )

    finish = jax.jit(lambda s, inner: engine.finish(unroll, eta, s, inner))
    (loss, _), grads = finish(resumed, joined(seen))
    (whole, _), expected = solve(algorithm, Reverse(), eta)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(flat(grads), flat(expected), rtol=1e-4, atol=1e-6)


def test_parts_push_the_fewest_tangents_that_will_do():
    begins = np.array([0, 0, 0, 100, 200, 300])
    assert parts(begins, 400) == [
        Part(0, 100, 3),
        Part(100, 200, 4),
        Part(200, 300, 5),
        Part(300, 400, 6),
    ]
    assert parts(begins, 400, limit=1) == [Part(0, 400, 6)]
    assert parts(np.zeros(3, int), 50) == [Part(0, 50, 3)]
    many = parts(np.arange(1000), 1000)
    assert len(many) == PARTS and many[-1].active == 1000
    assert all(a.stop == b.start for a, b in zip(many, many[1:], strict=False))


@pytest.mark.slow
def test_windows_that_have_not_begun_cost_nothing_and_change_nothing():
    algorithm, episode = make(LEARNED, 28), make_episode()
    eta = algorithm.init(KEY)

    def program(begins):
        def run(eta):
            unroll = algorithm.unroll(episode, KEY)
            unroll = unroll if begins else unroll._replace(begins=None)
            return Forward().value_and_grad(unroll, eta, algorithm.batches(episode, KEY))

        return jax.jit(run)

    few, all_ = program(True), program(False)
    assert cost(few, eta).flops < 0.75 * cost(all_, eta).flops
    np.testing.assert_allclose(flat(few(eta)[1]), flat(all_(eta)[1]), rtol=1e-4, atol=1e-6)


def test_begins_of_another_shape_are_refused():
    algorithm, episode = make(LEARNED, 28), make_episode()
    eta = algorithm.init(KEY)
    unroll = algorithm.unroll(episode, KEY)._replace(
        begins={"learning_rate": np.zeros(3), "momentum": np.zeros(1)}
    )
    for wrong in (unroll, unroll._replace(begins={"momentum": np.zeros(1)})):
        with pytest.raises(ValueError, match="a step for every entry of eta"):
            Forward().value_and_grad(wrong, eta, algorithm.batches(episode, KEY))


@pytest.mark.slow
def test_batches_may_be_numpy_arrays():
    algorithm, episode = make(FEWER, 7), make_episode()
    eta = algorithm.init(KEY)
    batches = jax.tree.map(np.asarray, algorithm.batches(episode, KEY))

    @jax.jit
    def run(eta):
        return Forward().value_and_grad(algorithm.unroll(episode, KEY), eta, batches)

    _, grads = run(eta)
    np.testing.assert_allclose(
        flat(grads), flat(solve(algorithm, Forward(), eta)[1]), rtol=1e-4, atol=1e-6
    )


def test_tangents_in_chunks_are_not_spread_over_devices():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="Choose one"):
        Forward(chunk=2, sharding=sharding)


@pytest.mark.slow
def test_an_outer_step_of_fds_compiles_once():
    trainer = Trainer(make(LEARNED, 7), MixedFlow(), fds_rule(LEARNED), tasks_per_step=1)
    state = trainer.init(KEY)
    for _ in range(3):
        state, _ = trainer.step(state, Runs())
    assert trainer.step._cache_size() == 1


@pytest.mark.slow
def test_memory_of_forward_mode_does_not_grow_with_the_horizon_but_for_indices():
    episode, temporaries, indices = make_episode(), [], []
    for horizon in (200, 20_000):
        algorithm = make(FEWER, horizon)

        def run(eta, batches, algorithm=algorithm):
            unroll = algorithm.unroll(episode, KEY)
            (loss, _), grads = Forward().value_and_grad(unroll, eta, batches)
            return loss, grads

        batches = jax.eval_shape(lambda algorithm=algorithm: algorithm.batches(episode, KEY))
        found = cost(jax.jit(run), algorithm.init(KEY), batches)
        temporaries.append(found.temporaries)
        indices.append(state_bytes(batches))
    print(temporaries, indices)
    assert temporaries[1] - temporaries[0] <= indices[1]


@pytest.mark.slow
def test_a_decay_of_one_is_exact_and_of_zero_sees_the_last_step_alone():
    algorithm = make(FEWER, 2)
    eta = algorithm.init(KEY)
    exact = solve(algorithm, Forward(), eta)[1]
    kept = solve(algorithm, Forward(inexact_decay=1.0), eta)[1]
    np.testing.assert_array_equal(flat(kept), flat(exact))
    greedy = solve(algorithm, Forward(inexact_decay=0.0), eta)[1]["learning_rate"]
    np.testing.assert_allclose(greedy[-1], exact["learning_rate"][-1], rtol=1e-5)
    np.testing.assert_array_equal(greedy[:-1], np.zeros(1))
    with pytest.raises(ValueError, match="between 0, greedy, and 1"):
        Forward(inexact_decay=1.5)


# Budgets.


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Reverse, MixedFlow])
def test_nesting_keeps_to_its_budget_and_to_the_gradient(engine):
    algorithm, episode = make(LEARNED, 120), make_episode()
    eta = algorithm.init(KEY)
    state = state_bytes(algorithm.unroll(episode, KEY).init(eta))
    expected, temporaries = flat(solve(algorithm, Reverse(), eta)[1]), []
    for states in (130, 40, 16):
        chosen = engine("nested", budget=states * state * (2 if engine is MixedFlow else 1))

        @jax.jit
        def run(eta, chosen=chosen):
            unroll = algorithm.unroll(episode, KEY)
            return chosen.value_and_grad(unroll, eta, algorithm.batches(episode, KEY))

        temporaries.append(cost(run, eta).temporaries)
        np.testing.assert_allclose(flat(run(eta)[1]), expected, rtol=1e-4, atol=1e-6)
    assert temporaries[0] > temporaries[1] > temporaries[2]


@pytest.mark.parametrize(
    ("steps", "states", "lengths"),
    [
        (1000, 1000, []),
        (1000, 999, [32]),
        (1000, 64, [32]),
        (1000, 63, [100, 10]),
        (10**6, 300, [10_000, 100]),
        (1, 1, []),
    ],
)
def test_a_budget_takes_as_few_levels_as_will_do(steps, states, lengths):
    assert segment_lengths(steps, 8, 8 * states) == lengths
    assert saved_states(steps, len(lengths) + 1) <= states


def test_a_budget_that_no_nesting_meets_names_the_least_that_would_do():
    with pytest.raises(ValueError, match="saves at least 20 states.*that is 2,000 bytes"):
        segment_lengths(1000, 100, 1999)
    assert segment_lengths(1000, 100, 2000)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "step", "budget": 10},
        {"remat": "nested", "budget": 10, "segment": 2},
    ],
)
def test_a_budget_elsewhere_is_refused(options):
    with pytest.raises(ValueError, match="`budget` chooses the segments of remat='nested'"):
        Reverse(**options)
    with pytest.raises(ValueError, match="anchors take a `segment`"):
        MixedFlow("inexact_reconstruct", budget=10)


# Chaos.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing(Tasks):
    def sample(self, key):
        del key
        return Episode(jnp.arange(400), jnp.zeros(1))


@dataclasses.dataclass(frozen=True)
class LogisticMap(Algorithm):
    """Gradient descent that is bounded and chaotic: its tangents overflow, its losses do not."""

    def init(self, key):
        del key
        return {"rate": jnp.asarray(3.9)}

    def unroll(self, episode, key):
        del episode, key

        def step(eta, theta, batch, grad):
            del batch
            r = eta["rate"]
            return theta - grad(lambda x, r: (1 - r) * x**2 / 2 + r * x**3 / 3)(theta, r)

        return Unroll(lambda eta: jnp.asarray(0.3), step, lambda eta, theta: (theta**2, {}))


def test_tangents_that_overflow_are_seen_at_the_step_where_they_do():
    trainer = Trainer(LogisticMap(), Forward(), optax.sgd(0.1), tasks_per_step=1)
    _, metrics = trainer.step(trainer.init(KEY), Nothing())
    assert metrics["inner_finite"] == 1 and jnp.isfinite(metrics["loss"])
    assert not jnp.isfinite(metrics["inner_tangent_norm"])
    assert 50 < metrics["inner_steps_finite"] < 400  # chaos: rounding decides
    first = int(metrics["inner_steps_finite"]) + 1
    message = f"the tangents overflow from inner step {first} of 400 on"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(Nothing(), 2, key=KEY, progress=False)


@pytest.mark.slow
def test_a_run_that_explodes_is_skipped_where_asked_and_nothing_is_lost():
    learned = {"learning_rate": Hyperparameter(0.0, 3e38, 3e38)}
    algorithm = make(learned, 50)
    trainer = Trainer(algorithm, Forward(), fds_rule(learned), tasks_per_step=1)
    state = trainer.fit(Runs(), 3, key=KEY, progress=False, faults=Faults(nonfinite="pass"))
    assert int(state.step) == 3
    np.testing.assert_array_equal(
        state.eta["learning_rate"], trainer.init(KEY).eta["learning_rate"]
    )
    with pytest.raises(NonFiniteError, match="not finite from inner step"):
        trainer.fit(Runs(), 3, key=KEY, progress=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs(Tasks):
    def sample(self, key):
        del key
        inputs, targets, rows = make_episode().support
        return Episode((inputs, targets, rows), make_episode().query)


# Devices.

PROGRAM = """
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jax.flatten_util import ravel_pytree
    from metalearn import Forward
    from metalearn.algorithms import Hyperparameter
    from metalearn.cost import cost
    from metalearn.algorithms import FDS, sgd
    from metalearn.models import Functions
    from tests.helpers.fds import KEY, make_episode
    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.array(jax.devices()), ("tangents",))
    spread = NamedSharding(mesh, PartitionSpec("tangents"))
    learned = {"learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=30)}
    model = Functions(
        lambda key: [jax.random.normal(key, shape) / 9 for shape in ((6, 400), (400, 3))],
        lambda params, x: jax.numpy.tanh(x @ params[0]) @ params[1],
    )
    algorithm = FDS(model, learned, 60, 8, sgd)
    eta = algorithm.init(KEY)

    def program(engine):
        def run(eta):
            episode = make_episode()
            unroll = algorithm.unroll(episode, KEY)
            return engine.value_and_grad(unroll, eta, algorithm.batches(episode, KEY))
        return jax.jit(run)

    one, many = program(Forward()), program(Forward(sharding=spread))
    a, b = (ravel_pytree(run(eta)[1])[0] for run in (one, many))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    print(len(jax.devices()), error, cost(one, eta).temporaries, cost(many, eta).temporaries)
"""


@pytest.mark.slow
def test_tangents_spread_over_devices_give_the_same_gradient_in_less_memory_each():
    """Thirty tangents on four devices: 32, two of them zero."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    devices, error, alone, spread = found.stdout.split()
    assert int(devices) == 4
    assert float(error) < 1e-12
    assert int(spread) < 0.5 * int(alone)


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_run_may_begin_before_eta_is_read(chunk):
    def step(eta, theta, batch, grad):
        rate = jnp.where(batch < 2, 0.1, eta["rate"])
        return theta - rate * grad(lambda x: jnp.sum(jnp.cosh(x)))(theta)

    unroll = Unroll(
        lambda eta: jnp.ones(2), step, lambda eta, theta: (jnp.sum(theta**2), {})
    )._replace(begins={"rate": np.array(2)})
    eta = {"rate": 0.3}  # a number of Python, as it is
    found = Forward(chunk=chunk).value_and_grad(unroll, eta, jnp.arange(4))[1]
    expected = Reverse().value_and_grad(unroll, eta, jnp.arange(4))[1]
    np.testing.assert_allclose(found["rate"], expected["rate"], rtol=1e-5)


def test_products_of_a_bfloat16_state_are_summed_in_float32():
    def step(eta, state, batch, grad):
        return jax.tree.map(lambda x: (x * (1 + eta)).astype(x.dtype), state)

    def loss(eta, state):
        a, b = (jnp.sum(x.astype(jnp.float32)) for x in state)
        return a - b, {}

    state = jnp.ones(4096, jnp.bfloat16), jnp.ones(4100, jnp.bfloat16)
    unroll = Unroll(lambda eta: state, step, loss)
    for engine in (Forward(), Reverse()):
        assert engine.value_and_grad(unroll, jnp.float32(0), jnp.arange(1))[1] == -4


@pytest.mark.parametrize("engine", [Reverse("nested"), MixedFlow("segments")], ids=str)
def test_batches_may_have_an_empty_field(engine):
    def step(eta, theta, batch, grad):
        return theta - eta * grad(lambda x: jnp.sum(x**2))(theta)

    unroll = Unroll(lambda eta: jnp.ones(2), step, lambda eta, theta: (theta.sum(), {}))
    batches = jnp.arange(5), jnp.zeros((5, 0))
    found = engine.value_and_grad(unroll, jnp.array(0.1), batches)[1]
    expected = Reverse().value_and_grad(unroll, jnp.array(0.1), batches)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_step_with_a_rule_that_has_no_tangents_is_refused_with_who_takes_it():
    clipped = jax.custom_vjp(lambda x: x)
    clipped.defvjp(lambda x: (x, None), lambda _, bar: (jnp.clip(bar, -1, 1),))

    def step(eta, theta, batch, grad):
        return clipped(theta - eta * grad(lambda x: jnp.sum(x**2))(theta))

    unroll = Unroll(lambda eta: jnp.ones(2), step, lambda eta, theta: (theta.sum(), {}))
    with pytest.raises(TypeError, match=r"`jax.custom_vjp`, which has none. Use `Reverse\(\)`"):
        Forward().value_and_grad(unroll, jnp.array(0.1), jnp.arange(2))
    assert jnp.isfinite(Reverse().value_and_grad(unroll, jnp.array(0.1), jnp.arange(2))[1])
