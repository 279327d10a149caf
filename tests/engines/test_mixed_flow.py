"""What `MixedFlow` may keep less of, and what it must not change by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Episode, ExampleMean, MixedFlow, Reverse, Unroll
from metalearn.algorithms import LearningRates, LossWeights, TokenWeights
from metalearn.datasets.text import Windows
from metalearn.models import Functions
from metalearn.models.transformer import Architecture
from metalearn.optimizers import reversible
from tests.cases import MODELS

T, BATCH, S, TOKENS = 5, 4, 3, 5
SHAPE = Architecture(vocabulary=TOKENS, width=4, layers=2, heads=2, remat="block")
ADAM = {"eps_root": 1e-6}


def transformer(dtype=jnp.float64):
    def init(key):
        params = jax.tree.map(lambda x: x.astype(dtype), SHAPE.init(key))
        return jax.tree.map(lambda x: jnp.round(1024 * x) / 1024, params)

    return Functions(init, SHAPE.apply)


def network(dtype=jnp.float64, width=4):
    """A network that compiles fast: [batch, S] tokens -> logits."""

    def init(key):
        w, v = jnp.sin(jnp.arange(2.0 * TOKENS * width)).reshape(2, TOKENS, width)
        return {"w": w.astype(dtype), "v": v.T.astype(dtype)}

    return Functions(init, lambda params, x: jnp.tanh(params["w"][x]) @ params["v"])


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, shape), jnp.int32)


def rates(optimizer=None, steps=T, model=None):
    optimizer = optax.adam(1.0, **ADAM) if optimizer is None else optimizer
    model = network() if model is None else model
    algorithm = LearningRates(model, optimizer=optimizer, initial=0.02, mean_over_examples=True)
    data = tokens(steps, BATCH, S + 1)
    support = data[..., :-1], data[..., 1:]
    return algorithm, Episode(support, jax.tree.map(lambda x: x[0], support))


def weights():
    algorithm = LossWeights(transformer(), TokenWeights(hidden=(3,)), optax.adam(0.02, **ADAM))
    data = tokens(T, BATCH, S + 1)
    support = Windows(data[..., :-1], data[..., 1:], jnp.zeros((T, BATCH), jnp.int32), None)
    return algorithm, Episode(support, jax.tree.map(lambda x: x[0], support))


def solve(problem, engine):
    """Return ((loss, aux), gradient), away from the symmetric start."""
    algorithm, episode = problem
    key = jax.random.key(0)
    flat, unravel = ravel_pytree(algorithm.init(key))
    eta = unravel(flat + 0.1 * jnp.sin(jnp.arange(flat.size, dtype=flat.dtype)))

    @jax.jit
    def run(eta, episode):
        unroll = algorithm.unroll(episode, key)
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode, key))

    return run(eta, episode)


PROBLEMS = {
    "rates": lambda: rates(model=transformer()),
    "weights": weights,
    "small-rates": rates,
}


@functools.cache
def expected(name):
    return solve(PROBLEMS[name](), Reverse())


def error(ours, theirs):
    ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def assert_same(ours, theirs):
    assert error(ours[1], theirs[1]) < 1e-10
    assert error(ours[0][0], theirs[0][0]) < 1e-12
    assert error(ours[0][1].inner.losses, theirs[0][1].inner.losses) < 1e-12
    assert error(ours[0][1].state.params, theirs[0][1].state.params) < 1e-12


EXACT = {
    "default": MixedFlow(),
    "parts": MixedFlow(micro_batches=2),
    "parts-of-one": MixedFlow(micro_batches=BATCH),
    "parts-nested": MixedFlow("nested", segment=2, micro_batches=2),
    "host": MixedFlow(store="host"),
    "host-parts": MixedFlow(store="host", micro_batches=2),
}


SETTINGS = [(engine, name) for engine in EXACT for name in ("rates", "weights")]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "name"), SETTINGS)
def test_exact_settings_agree_with_reverse_mode_on_a_transformer(x64, name, engine):
    assert_same(solve(PROBLEMS[name](), EXACT[engine]), expected(name))


# Several inner gradients a step, aux, an eta in the arguments, integers and keys.


def varied(given_eta):
    """An unroll whose loss value and aux are used, with `ExampleMean` and shared arguments."""

    def example_loss(theta, example, shared):
        x, y, key, count = example
        prediction = jnp.tanh(theta["w"] @ x) * shared + theta["b"]
        noise = 0.1 * jax.random.normal(key, dtype=x.dtype)
        value = (prediction - y + noise) ** 2 * (1 + count)
        return value, {"prediction": prediction, "count": count}

    def step(eta, state, batch, grad):
        theta, total = state
        shared = eta["scale"] if given_eta else jnp.ones(())
        grads, aux = grad(ExampleMean(example_loss), has_aux=True)(theta, batch, shared)
        theta = jax.tree.map(lambda p, g: p - jnp.exp(eta["rate"]) * g, theta, grads)
        total = total + jnp.sin(aux["prediction"]).sum() * aux["count"].sum()
        return theta, total

    def init(eta):
        return {"w": eta["w"], "b": jnp.zeros(())}, jnp.zeros(())

    def loss(eta, state):
        return (state[0]["w"] ** 2).sum() + state[0]["b"] + state[1], {}

    return Unroll(init, step, loss)


IN_PARTS = MixedFlow(micro_batches=3), MixedFlow(store="host", micro_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "given_eta"),
    [(engine, given_eta) for engine in IN_PARTS for given_eta in (False, True)],
    ids=repr,
)
def test_parts_carry_aux_keys_counts_and_shared_arguments(x64, engine, given_eta):
    keys = jax.random.split(jax.random.key(3), (4, 6))
    x = jax.random.normal(jax.random.key(1), (4, 6, 3))
    batches = x, x.sum(-1), keys, jnp.arange(24).reshape(4, 6)
    eta = {"w": jnp.array([0.3, -0.2, 0.1]), "rate": jnp.array(-5.0), "scale": jnp.array(0.7)}
    run = jax.jit(
        lambda eta, engine: engine.value_and_grad(varied(given_eta), eta, batches), static_argnums=1
    )
    ours, theirs = run(eta, engine), run(eta, Reverse())
    assert error(ours[1], theirs[1]) < 1e-12
    assert (theirs[1]["scale"] != 0) == given_eta
    assert error(ours[0][1].inner.losses, theirs[0][1].inner.losses) < 1e-12


def test_parts_are_refused_for_a_loss_that_is_not_a_mean_over_examples():
    plain = Unroll(
        lambda eta: eta,
        lambda eta, theta, batch, grad: theta - grad(lambda p: (p**2).sum())(theta),
        lambda eta, theta: (theta.sum(), {}),
    )
    with pytest.raises(ValueError, match=r"micro_batches=2\).*exact for a mean over examples"):
        MixedFlow(micro_batches=2).value_and_grad(plain, jnp.ones(3), jnp.arange(2))


def test_parts_that_do_not_divide_the_batch_are_refused(x64):
    with pytest.raises(ValueError, match=r"micro_batches=3 does not divide .* array of shape \[4"):
        solve(rates(), MixedFlow(micro_batches=3))


# What is kept.


@functools.cache
def temporaries(engine, steps, optimizer=None):
    algorithm, episode = rates(optimizer, steps, network(jnp.float32, 64))

    def run(eta, episode):
        unroll = algorithm.unroll(episode, jax.random.key(0))
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode, jax.random.key(0)))[1]

    eta = jax.eval_shape(algorithm.init, jax.random.key(0))
    return jax.jit(run).lower(eta, episode).compile().memory_analysis().temp_size_in_bytes


REVERSIBLE = reversible.adam(1.0, **ADAM)


@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.0, 5)], ids=["0.1", "linear"])
def test_reversible_adam_is_optax_adam_and_undoes_its_step(x64, rate):
    params = {"w": jnp.array([0.3, -1.0, 2.0])}
    ours, theirs = reversible.adam(rate, eps_root=1e-8), optax.adam(rate, eps_root=1e-8)
    state, other = ours.init(params), theirs.init(params)
    for i in range(3):
        grads = {"w": jnp.array([1.0, -2.0, 0.5]) * (i - 0.5)}
        before = state
        updates, state = ours.update(grads, state)
        expected_updates, other = theirs.update(grads, other)
        assert error(updates, expected_updates) < 1e-12
        assert error(ours.last_update(state), updates) == 0
        undone = ours.before(state, grads)
        assert jnp.allclose(undone.mu["w"], before.mu["w"], atol=1e-14)
        assert jnp.allclose(undone.nu["w"], before.nu["w"], atol=1e-14)
        assert undone.count == before.count


@pytest.mark.slow
@pytest.mark.parametrize("segment", [None, 2, 3])
def test_reconstructed_states_are_right_up_to_what_rounding_adds(x64, segment):
    engine = MixedFlow("inexact_reconstruct", segment=segment)
    ours = solve(rates(REVERSIBLE), engine)
    assert error(ours[1], expected("small-rates")[1]) < 1e-8
    assert error(ours[0][1].inner.losses, expected("small-rates")[0][1].inner.losses) < 1e-12


@pytest.mark.slow
def test_reconstruction_over_a_thousand_steps_stays_finite_in_float32():
    engine = MixedFlow("inexact_reconstruct", segment=16)
    (loss, _), grads = solve(rates(REVERSIBLE, 1000, network(jnp.float32)), engine)
    assert jnp.isfinite(loss) and jnp.isfinite(ravel_pytree(grads)[0]).all()


@pytest.mark.slow
def test_memory_of_reconstruction_is_flat_in_the_horizon():
    engine = MixedFlow("inexact_reconstruct", segment=1000)
    short, long = (temporaries(engine, steps, REVERSIBLE) for steps in (8, 64))
    indices = 56 * BATCH * S * 4 * 2
    assert long - short < 3 * indices
    assert temporaries(MixedFlow(), 64) > 3 * long


def test_bfloat16_copies_are_close_and_not_exact(x64):
    found = error(
        solve(rates(), MixedFlow(store="inexact_bfloat16"))[1], expected("small-rates")[1]
    )
    assert 1e-6 < found < 0.1


@pytest.mark.slow
def test_bfloat16_copies_take_less_memory_than_states():
    assert temporaries(MixedFlow(store="inexact_bfloat16"), 64) < 0.7 * temporaries(MixedFlow(), 64)


@pytest.mark.slow
def test_nested_checkpoints_keep_inner_gradients_and_few_states():
    assert temporaries(MixedFlow("nested"), 64) < 0.6 * temporaries(MixedFlow(), 64)


@pytest.mark.parametrize("calls", [0, 2])
def test_an_undo_that_takes_other_gradients_than_its_step_is_refused(calls):
    def step(eta, theta, batch, grad):
        return theta - eta * grad(lambda p: (p**2).sum())(theta)

    def undo(eta, theta, batch, grad):
        for _ in range(calls):
            theta = theta + eta * grad(lambda p: (p**2).sum())(theta)
        return theta

    unroll = Unroll(jnp.ones_like, step, lambda eta, theta: (theta.sum(), {}), undo)
    with pytest.raises(ValueError, match="at the same points and in the same order.*more or fewer"):
        MixedFlow("inexact_reconstruct").value_and_grad(unroll, 0.1 * jnp.ones(3), jnp.arange(3))


@pytest.mark.parametrize("engine", [MixedFlow(store="host"), MixedFlow("inexact_reconstruct")])
def test_a_single_step_needs_nothing_kept(x64, engine):
    assert_same(solve(rates(REVERSIBLE, 1), engine), solve(rates(REVERSIBLE, 1), Reverse()))


def test_a_model_with_a_state_cannot_be_a_mean_over_examples_nor_undone(x64):
    model = MODELS["linen-ConvNet"]
    with pytest.raises(ValueError, match="has a mutable state.*or mean_over_examples=False"):
        LearningRates(model, mean_over_examples=True)
    algorithm = LearningRates(model, optimizer=REVERSIBLE)
    assert algorithm.unroll(Episode((), ()), jax.random.key(0)).undo is None


@pytest.mark.parametrize("options", [{"b1": 0.0}, {"b2": 1.0}])
def test_a_reversible_adam_that_cannot_be_undone_is_refused(options):
    with pytest.raises(
        ValueError, match="divides its moments by b1 and b2, which therefore lie between"
    ):
        reversible.adam(**{"learning_rate": 0.1, **options})


def test_an_unroll_that_cannot_be_undone_is_refused(x64):
    with pytest.raises(
        ValueError, match="has no `undo`.*metalearn.optimizers.reversible.*remat='nested'"
    ):
        solve(rates(), MixedFlow("inexact_reconstruct"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, r"^`MixedFlow\(micro_batches=0\)`: it is an integer, 1 or"),
        ({"store": "disk"}, "No store is called 'disk'. There are: device, host, inexact"),
        ({"store": "host", "remat": "nested"}, "is for what remat='step' keeps, not for 'nested'"),
        ({"remat": "inexact"}, "There are: inexact_reconstruct, nested, none, segments, step"),
        ({"remat": "nested", "segment": 0}, r"`MixedFlow\(segment=0\)`: it is an integer, 1 or"),
        ({"remat": "segments", "segment": 2.5}, r"segment=2.5\)`: it is an integer, 1 or more"),
        ({"remat": "step", "segment": 3}, "cannot be 3 with remat='step'"),
        ({"remat": "inexact_reconstruct", "segment": 0}, r"segment=0\)`: it is an integer, 1 or"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixedFlow(**options)


# The first step.


@pytest.mark.slow
def test_a_peeled_first_step_saves_its_hessian_product():
    from metalearn.cost import cost

    algorithm, episode = rates(steps=2, model=network(jnp.float32))
    key = jax.random.key(0)

    def flops(engine):
        def run(eta, episode):
            unroll = algorithm.unroll(episode, key)
            return engine.value_and_grad(unroll, eta, algorithm.batches(episode, key))[1]

        return cost(jax.jit(run), jax.eval_shape(algorithm.init, key), episode).flops

    assert flops(MixedFlow()) < 0.75 * flops(MixedFlow(peel=False))
    assert flops(Reverse("step", peel=True)) < flops(Reverse("step"))
