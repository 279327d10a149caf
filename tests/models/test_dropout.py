"""Dropout is off for queries and in evaluation, whatever batch normalisation uses."""

import dataclasses
import functools
import re

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metalearn import Forward, MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML
from metalearn.model import Model
from metalearn.models import NNX, Functions, Haiku, Linen, Precision, no_flag
from tests.cases import TASKS, Float64, to_float64

KEY = jax.random.key(0)
ROW = jax.ShapeDtypeStruct((1, 3), jnp.float32)
X = jax.random.normal(jax.random.key(2), (6, 3))
LIBRARIES = ("linen", "nnx", "haiku")


class LinenNet(nn.Module):
    """One flag for both layers, as most networks have."""

    rate: float = 0.5
    outputs: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.outputs)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dropout(self.rate)(x, deterministic=not train)


class NNXNet(nnx.Module):
    def __init__(self, rngs, rate=0.5, inputs=3, outputs=3):
        self.dense = nnx.Linear(inputs, outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, train):
        x = self.dense(x.reshape(x.shape[0], -1))
        x = self.norm(x, use_running_average=not train)
        return self.dropout(x, deterministic=not train)


def haiku_net(x, is_training, rate=0.5, outputs=3):
    x = hk.Linear(outputs)(hk.Flatten()(x))
    x = hk.BatchNorm(True, True, 0.5)(x, is_training)
    return hk.dropout(hk.next_rng_key(), rate, x) if is_training else x


def network(library, rate=0.5, inputs=ROW, outputs=3):
    if library == "linen":
        return Linen(LinenNet(rate, outputs), inputs)
    if library == "nnx":
        size = int(np.prod(inputs.shape))
        build = functools.partial(NNXNet, rate=rate, inputs=size, outputs=outputs)
        return NNX(lambda rngs: build(rngs))
    return Haiku(lambda x, is_training: haiku_net(x, is_training, rate, outputs), inputs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_batch_statistics_come_without_dropout(library):
    model = network(library)
    params, state = model.init(KEY)
    apply = functools.partial(model.apply, params, state, X, train=True)
    dropped, _ = apply(key=KEY)
    undropped, updated = apply(key=KEY, dropout=False)
    assert (dropped == 0).any() and not (undropped == 0).any()
    np.testing.assert_allclose(undropped.mean(0), 0, atol=1e-5)  # normalised by the batch
    np.testing.assert_allclose(undropped.std(0), 1, atol=1e-2)
    expected, same = network(library, rate=0.0).apply(params, state, X, train=True, key=KEY)
    np.testing.assert_allclose(undropped, expected, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (updated, same)), strict=True):
        if jnp.issubdtype(ours.dtype, jnp.floating):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_array_equal(apply(key=KEY)[0], dropped)  # the module is as it was


POLICIES = [
    (library, policy)
    for library in LIBRARIES
    for policy in ("transductive", "running", "frozen")
    if (library, policy) != ("haiku", "frozen")  # the initial variance of hk.BatchNorm is 0
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "policy"),
    POLICIES,
)
def test_queries_are_predicted_without_dropout_under_every_policy(library, policy):
    images = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    learned, losses = MAML(network(library, 0.9, images, outputs=2)).init(KEY), []
    for rate in (0.9, 0.0):
        model = network(library, rate, images, outputs=2)
        algorithm = MAML(model, optimizer=optax.sgd(0.0), batch_norm=policy)  # stands still
        trainer = Trainer(algorithm, tasks_per_step=2)
        losses.append(trainer.evaluate(learned, TASKS["FewShot"], KEY, 2)["loss"].mean)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_inner_steps_have_dropout_unless_the_policy_is_frozen(library):
    images = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    model = network(library, 0.9, images, outputs=2)
    episode = TASKS["FewShot"].sample(KEY)
    other = jax.random.key(1)
    for policy, random in (("running", True), ("frozen", False)):
        algorithm = MAML(model, optimizer=optax.sgd(0.1), batch_norm=policy)
        eta = algorithm.init(KEY)
        params = [algorithm.adapt(eta, episode.support, key).params for key in (KEY, other)]
        same = jax.tree.map(lambda a, b: bool((a == b).all()), *params)
        assert jax.tree.all(same) != random


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        attention = nn.MultiHeadDotProductAttention(1, dropout_rate=0.9, deterministic=not train)
        return attention(x[:, None])[:, 0]


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        options = {"dropout_rate": 0.9, "decode": False, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(1, 3, **options)

    def __call__(self, x, train):
        return self.attention(x[:, None], deterministic=not train)[:, 0]


@pytest.mark.parametrize("model", [Linen(LinenAttention(), ROW), NNX(NNXAttention)], ids=type)
@pytest.mark.slow
def test_dropout_inside_attention_is_off_too(model):
    params, state = model.init(KEY)
    apply = functools.partial(model.apply, params, state, X, key=KEY)
    expected, _ = apply(train=False)
    np.testing.assert_allclose(apply(train=True, dropout=False)[0], expected, rtol=1e-5)
    assert abs(apply(train=True)[0] - expected).max() > 1e-2


class ByHand(nn.Module):
    stream: str = "dropout"

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x)
        return x * jax.random.bernoulli(self.make_rng(self.stream), 0.5, x.shape) if train else x


def test_a_linen_dropout_by_hand_is_refused_where_it_would_stay_on():
    model = Linen(ByHand(), ROW)
    params, state = model.init(KEY)
    message = (
        "The model is applied in training mode without dropout, for batch statistics, and a layer "
        'other than `nn.Dropout` draws from the stream "dropout"'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        model.apply(params, state, X, train=True, dropout=False, key=KEY)
    noise = Linen(ByHand("noise"), ROW, rngs=("dropout", "noise"))
    outputs, _ = noise.apply(params, state, X, train=True, dropout=False, key=KEY)
    assert (outputs == 0).any()


def test_a_haiku_function_that_always_drops_is_refused_where_it_should_not():
    def forward(x):
        return hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(3)(x))

    model = Haiku(forward, ROW)
    params, state = model.init(KEY)
    message = (
        "The model is applied in training mode without dropout, for batch statistics, but its "
        "forward function draws random numbers and has no argument that says whether it trains. "
        "Give it one, such as `is_training`, and call `hk.dropout` where it is true."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.apply(params, state, X, train=True, dropout=False, key=KEY)


def test_a_haiku_function_without_dropout_keeps_its_own_normalisation():
    def forward(x, is_training):  # a normalisation that no interceptor knows
        x = hk.Linear(3)(x)
        return x - x.mean(0, keepdims=True) if is_training else x

    model = Haiku(forward, ROW)
    params, state = model.init(KEY)
    outputs, _ = model.apply(params, state, X, train=True, dropout=False, key=KEY)
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-6)


def test_plain_functions_have_no_mode():
    model = Functions(lambda key: 2.0, lambda params, x: params * x)
    outputs, _ = model.apply(2.0, (), X, train=True, dropout=False)
    np.testing.assert_array_equal(outputs, 2 * X)


def test_the_mode_of_a_model_is_said_in_words():
    algorithm = MAML(network("linen"))
    assert algorithm.model_mode() == (
        "batch statistics and dropout in inner steps; batch statistics without dropout for queries"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "engine"),
    [(library, engine) for library in LIBRARIES for engine in (MixedFlow(), Forward())],
    ids=str,
)
def test_the_meta_gradient_through_queries_without_dropout_is_that_of_reverse_mode(
    library, engine, x64
):
    images = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    algorithm = MAML(Float64(network(library, 0.5, images, outputs=2)), optimizer=optax.sgd(0.1))
    eta, episode = algorithm.init(KEY), to_float64(TASKS["FewShot"].sample(KEY))
    unroll, batches = algorithm.unroll(episode, KEY), algorithm.batches(episode, KEY)
    ours, expected = (
        jax.jit(e.value_and_grad, static_argnums=0)(unroll, eta, batches)[1]
        for e in (engine, Reverse())
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), ours, expected
    )
    assert any(abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))


@dataclasses.dataclass(frozen=True)
class WithoutDropout(Model):
    """A model of a user who did not expect the argument `dropout`."""

    def init(self, key):
        return jnp.zeros(3), ()

    def apply(self, params, state, inputs, *, train, key=None):
        return inputs @ params, state


@pytest.mark.parametrize("wrap", [lambda model: model, Precision])
def test_a_model_without_the_argument_dropout_is_refused_by_its_name(wrap):
    with pytest.raises(
        TypeError,
        match=r"`MAML\(model=\)` computes queries without dropout, but `WithoutDropout.apply` has "
        r"no argument `dropout`. Define it as `def apply\(self, params, state, inputs, \*, train, "
        r"dropout=True, key=None\)`",
    ):
        MAML(wrap(WithoutDropout()))


class Stacked(nnx.Module):
    """Two layers as one, each with a random stream of its own."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(axis_size=2)
        def layer(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        self.weight = nnx.Param(jnp.ones(3))
        self.drop = layer(rngs)

    def __call__(self, x, train):
        drop = nnx.vmap(lambda layer, x: layer(x, deterministic=not train), in_axes=(0, None))
        return drop(self.drop, x * self.weight[None])


def test_stacked_layers_of_nnx_draw_apart():
    model = NNX(Stacked)
    params, state = model.init(KEY)
    ones = jnp.ones((1, 3000))
    first, second = model.apply(params, state, ones[:, :3], train=True, key=KEY)[0]
    assert first.shape == second.shape == (1, 3)
    runs = [
        model.apply({"weight": jnp.ones(3000)}, state, ones, train=True, key=key)[0]
        for key in (KEY, KEY, jax.random.key(1))
    ]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()
    assert (runs[0][0] != runs[0][1]).any()


class TwoStreams(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.stack([jax.random.uniform(self.make_rng(n)) for n in ("dropout", "noise")])


def test_two_streams_of_a_linen_network_are_two():
    model = Linen(TwoStreams(), ROW, no_flag, rngs=("dropout", "noise"))
    dropout, noise = model.apply({}, {}, X, train=True, key=KEY)[0]
    assert dropout != noise
