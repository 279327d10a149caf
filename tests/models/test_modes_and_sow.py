"""A network trains and is evaluated in its own mode, and what it sows is no part of its state."""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metalearn import Episode, MixedFlow, Trainer, Truncation
from metalearn.algorithms import MAML, Hyperparameter, TunedRule, squared_error
from metalearn.engines.inner_loop import rollout
from metalearn.models import NNX, Haiku, Linen, no_flag, train_flag
from tests.cases import ALGORITHMS, Float64, to_float64

KEY, OTHER = jax.random.key(0), jax.random.key(1)
ROW = jax.ShapeDtypeStruct((1, 3), jnp.float32)
X = jax.random.normal(jax.random.key(2), (6, 3))


# Modes of NNX modules.


class Layers(nnx.Module):
    """Batch normalisation and dropout, told by their attributes."""

    def __init__(self, rngs, norm=True, rate=0.5, fixed=None):
        told = {} if fixed is None else {"use_running_average": fixed}
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.0, rngs=rngs, **told) if norm else None
        told = {} if fixed is None else {"deterministic": fixed}
        self.dropout = nnx.Dropout(rate, rngs=rngs, **told)

    def __call__(self, x):
        x = self.dense(x)
        return self.dropout(x if self.norm is None else self.norm(x))


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Layers(rngs), nnx.Sequential(Layers(rngs))])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Argued(Layers):
    """The dropout is told by an argument of the call, the batch normalisation by train()."""

    def __call__(self, x, train):
        return self.dropout(self.norm(self.dense(x)), deterministic=not train)


class Own(Layers):
    """A flag of its own, and one called like the method that sets the mode."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.training = self.train = True

    def __call__(self, x):
        return super().__call__(x) + 10 * self.training + 100 * self.train


class Viewed(Layers):
    """A mode that `nnx.view` sets."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.phase = "fit"

    def set_view(self, deterministic=None):
        if deterministic is not None:
            self.phase = "test" if deterministic else "fit"

    def __call__(self, x):
        return super().__call__(x) + {"fit": 10, "test": 0}[self.phase]


BUILDS = {
    "both": Layers,
    "dropout alone": functools.partial(Layers, norm=False),
    "batch norm alone": functools.partial(Layers, rate=0.0),
    "nested": Nested,
    "built to evaluate": functools.partial(Layers, fixed=True),
    "built to train": functools.partial(Layers, fixed=False),
    "an argument too": Argued,
    "an attribute too": Own,
    "a view too": Viewed,
}


def in_mode(build, train):
    """A module as its author would put it into a mode, and the arguments of its call."""
    module = build(nnx.Rngs(KEY))
    (nnx.Module.train if train else nnx.Module.eval)(module)
    if isinstance(module, Own):
        module.training = module.train = train
    if isinstance(module, Viewed):
        module.phase = "fit" if train else "test"
    return module, ({"train": train} if isinstance(module, Argued) else {})


@pytest.mark.parametrize("name", BUILDS)
def test_an_nnx_module_is_put_into_the_mode_of_train(name):
    build = BUILDS[name]
    model = NNX(build)
    params, state = model.init(KEY)
    for train in (True, False):
        module, flags = in_mode(build, train)
        nnx.reseed(module, default=OTHER)
        ours, new = model.apply(params, state, X, train=train, key=OTHER)
        np.testing.assert_allclose(ours, module(X, **flags), rtol=1e-6)
        theirs = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        stats = [leaf for leaf in jax.tree.leaves(theirs) if leaf is not None]
        moved = jax.tree.structure(new) == jax.tree.structure(state)
        assert moved
        changed = [bool((leaf != 0).any()) for leaf in stats[::2]]  # the means
        assert changed == [train] * len(changed)


@pytest.mark.slow
def test_running_statistics_of_an_nnx_module_serve_its_queries():
    """A rate of 0: the query loss is that of the module in evaluation, after one support set."""
    x, y = X[:4], jnp.ones((4, 3))
    query = X[2:], jnp.zeros((4, 3))
    algorithm = MAML(
        NNX(Layers), squared_error, optax.sgd(0.0), inner_steps=1, batch_norm="running"
    )
    unroll = algorithm.unroll(Episode((x, y), query), KEY)
    loss, _ = rollout(unroll, algorithm.init(KEY), jax.random.split(KEY, 1))
    module = Layers(nnx.Rngs(KEY))
    module(x)
    module.eval()
    np.testing.assert_allclose(loss, jnp.mean(module(query[0]) ** 2), rtol=1e-5)
    module.train()
    assert abs(loss - jnp.mean(module(query[0]) ** 2)) > 1e-2


def test_every_random_stream_of_an_nnx_module_follows_the_key():
    def build(rngs):
        return nnx.Dropout(0.5, rngs=nnx.Rngs(params=0, dropout=1))

    model = NNX(build)
    params, state = model.init(KEY)
    x = jnp.ones((8, 8))
    one, again, other = (
        model.apply(params, state, x, train=True, key=key)[0] for key in (KEY, KEY, OTHER)
    )
    assert (one == again).all() and (one != other).any()


def test_no_flag_passes_no_argument_and_sets_the_mode_all_the_same():
    class Counting(Layers):
        def __call__(self, x, train=True):
            return super().__call__(x) + 10 * train

    params, state = NNX(Counting).init(KEY)
    ours, told = (
        NNX(Counting, mode).apply(params, state, X, train=False)[0] for mode in (no_flag, None)
    )
    np.testing.assert_allclose(ours, told + 10, rtol=1e-5)


def test_state_that_an_nnx_module_makes_in_its_call_is_refused():
    class Late(Layers):
        def __call__(self, x):
            self.mean = nnx.BatchStat(x.mean())
            return super().__call__(x)

    params, state = NNX(Late).init(KEY)
    message = (
        "A call of the module makes a `BatchStat` of its own, mean, and a model's state is there "
        "from the beginning. Make it in the module's `__init__`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NNX(Late).apply(params, state, X, train=True)


# Modes of linen modules and Haiku functions, by the names of their arguments.


class Told(nn.Module):
    """A module whose call has one of the usual arguments."""

    word: str

    def inner(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(nn.Dense(3)(x))
        return nn.Dropout(0.5)(x, deterministic=not train)


class Training(Told):
    @nn.compact
    def __call__(self, x, training):
        return self.inner(x, training)


class Deterministic(Told):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        return self.inner(x, not deterministic)


class Field(Told):
    is_training: bool = True

    @nn.compact
    def __call__(self, x):
        return self.inner(x, self.is_training)


def haiku_forward(x, is_training):
    return hk.BatchNorm(True, True, 0.0)(hk.Linear(3)(x), is_training)


def plain(module, params, state, train):
    """What a linen module does when it is called by hand."""
    variables, rngs = {"params": params, **state}, {"dropout": OTHER}
    if isinstance(module, Field):
        module, flags = module.clone(is_training=train), {}
    else:
        flags = {"training": train} if module.word == "training" else {"deterministic": not train}
    return module.apply(variables, X, rngs=rngs, mutable=["batch_stats"], **flags)


@pytest.mark.parametrize("module", [Training("training"), Deterministic("not"), Field("field")])
def test_a_linen_module_is_told_by_the_word_it_has(module):
    model = Linen(module, ROW)
    params, state = model.init(KEY)
    outputs = []
    for train in (True, False):
        ours = model.apply(params, state, X, train=train, key=OTHER)
        theirs = plain(module, params, state, train)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)
        outputs.append(ours[0])
    assert (outputs[0] != outputs[1]).any()


def test_a_haiku_function_is_told_by_the_word_it_has():
    model = Haiku(haiku_forward, ROW)
    params, state = model.init(KEY)
    transformed = hk.transform_with_state(haiku_forward)
    for train in (True, False):
        ours, _ = model.apply(params, state, X, train=train)
        theirs, _ = transformed.apply(params, state, None, X, train)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


REFUSED = {
    "dropout": (
        Linen(nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)]), ROW),
        "The model is applied with train=False, but its Dropout at layers_1 has "
        "deterministic=False, its training mode. Give the module's call an argument, such as "
        "`train`, and the layer `deterministic=not train`; or say that this is meant: "
        "`Linen(..., mode=no_flag)`.",
    ),
    "batch norm": (
        Linen(nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)]), ROW),
        "its BatchNorm at layers_1 has use_running_average=False, its training mode",
    ),
    "haiku": (
        Haiku(lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), is_training=True), ROW),
        "its BatchNorm batch_norm has is_training=True. Give the forward function an argument",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_told_is_refused_unless_that_is_meant(name):
    model, message = REFUSED[name]
    params, state = model.init(KEY)
    model.apply(params, state, X, train=True, key=OTHER)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.apply(params, state, X, train=False, key=OTHER)
    meant = dataclasses.replace(model, mode=no_flag)
    meant.apply(params, state, X, train=False, key=OTHER)


# What is sown.


class Sowing(nn.Module):
    """Sows at two depths, into flax's collection and its own, as tuples and as a sum."""

    outputs: int = 3

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = SowingBlock(self.outputs)(x, train)
            self.sow("intermediates", "x", x)
        return x


class SowingBlock(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.outputs)(x))
        self.sow("losses", "l2", (x**2).sum(), reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
        self.sow("activations", "x", x)
        return self.perturb("x", jnp.tanh(x))


class NNXSowing(nnx.Module):
    def __init__(self, rngs, inputs=3, outputs=3):
        self.blocks = nnx.List([NNXBlock(a, outputs, rngs) for a in (inputs, outputs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
            self.sow(nnx.Intermediate, "x", x)
        return x


class NNXBlock(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.dense = nnx.Linear(inputs, outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x))
        self.sow("losses", "l2", (x**2).sum(), reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
        self.sow("activations", "x", x)
        self.seen = nnx.Intermediate(x)
        return self.perturb("perturbed", jnp.tanh(x))


def sowing(library, width=3):
    if library == "linen":
        inputs = jax.ShapeDtypeStruct((1, width), jnp.float32)
        return Linen(Sowing(width), inputs, train_flag)
    return NNX(functools.partial(NNXSowing, inputs=width, outputs=width))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_sown_variables_are_no_part_of_the_state(library):
    model = sowing(library)
    params, state = model.init(KEY)
    names = {str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names == {"['mean']", "['var']"}

    def step(state, key):
        outputs, state = model.apply(params, state, X, train=True, key=key)
        return state, outputs

    last, outputs = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, 3)))(state)
    assert jax.tree.structure(last) == jax.tree.structure(state)
    assert (outputs == outputs[:1]).all()


def test_a_linen_collection_that_is_read_stays_in_the_state():
    class Optional(nn.Module):
        """Reads a collection that its initialisation alone makes, and can do without it."""

        @nn.compact
        def __call__(self, x):
            if self.is_initializing():
                self.put_variable("pretrained", "scale", jnp.full((1, 3), 2.0))
            return x * self.get_variable("pretrained", "scale", jnp.ones((1, 3)))

    model = Linen(Optional(), ROW)
    params, state = model.init(KEY)
    np.testing.assert_allclose(model.apply(params, state, X, train=True)[0], 2 * X)


def test_a_collection_that_holds_state_and_is_sown_into_is_refused():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("mixed", "count", lambda: jnp.zeros(()))
            count.value += 1
            self.sow("mixed", "x", x.mean())
            return x * count.value

    model = Linen(Mixed(), ROW)
    params, state = model.init(KEY)
    message = "A call of the module changes the structure of its collection 'mixed'"
    with pytest.raises(ValueError, match=message):
        model.apply(params, state, X, train=True)


ALGORITHMS_WITH_STATE = ["running", "FDS", "LearnedOptimizer", "LearningRates"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library"),
    [*itertools.product(ALGORITHMS_WITH_STATE, ("linen", "nnx"))],
)
def test_every_algorithm_trains_a_network_that_sows(name, library, x64):
    """The loss is that of the same network with no sowing: it is finite, and has a gradient."""
    case = ALGORITHMS["MAML" if name == "running" else name]
    algorithm, tasks = case.problem(library)
    task = to_float64(jax.jit(tasks.sample)(OTHER))
    width = {"classifier": 5}.get(case.network, 1)
    model = Float64(sowing(library, width))
    if name == "LearnedOptimizer":
        problem = dataclasses.replace(algorithm.problem, model=model)
        algorithm = dataclasses.replace(algorithm, problem=problem)
    else:
        algorithm = dataclasses.replace(algorithm, model=model)
    if name == "running":
        algorithm = dataclasses.replace(algorithm, batch_norm="running", inner_steps=3)

    @jax.jit
    def run(eta):
        return MixedFlow().value_and_grad(
            algorithm.unroll(task, KEY), eta, algorithm.batches(task, KEY)
        )

    (loss, aux), grads = run(to_float64(algorithm.init(KEY)))
    assert jnp.isfinite(loss) and (jax.flatten_util.ravel_pytree(grads)[0] != 0).any()
    _, initial = model.init(KEY)
    assert jax.tree.structure(aux.state.statistics) == jax.tree.structure(initial)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_truncated_training_carries_no_sown_variables(library):
    algorithm, tasks = ALGORITHMS["LearnedOptimizer"].problem(library)
    problem = dataclasses.replace(algorithm.problem, model=sowing(library, 5))
    rule = TunedRule(optax.sgd, {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log")})
    algorithm = dataclasses.replace(algorithm, problem=problem, rule=rule, inner_steps=4)
    trainer = Trainer(algorithm, tasks_per_step=2, truncation=Truncation(2))
    state = trainer.fit(tasks, 3, key=KEY, progress=False)
    names = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.inner.state.statistics)
    }
    assert names and all("mean" in name or "var" in name for name in names)
