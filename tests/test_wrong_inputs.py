"""Something of the wrong kind at every public door: one clear paragraph, before anything runs.

The fuzz at the end gives every field of every public dataclass values of the wrong types.
"""

import dataclasses
import inspect
import re
from typing import NamedTuple

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import metalearn
from metalearn import Episode, Tasks, Trainer, algorithms, datasets, models
from metalearn._utils.fields import _hints
from metalearn._utils.labels import known
from metalearn.algorithms import (
    FDS,
    MAML,
    DataWeights,
    Hyperparameter,
    LearnedOptimizer,
    LearningRates,
    LossWeights,
    Streamed,
    Supervised,
    TokenWeights,
    cross_entropy,
    weighted_cross_entropy,
)
from metalearn.algorithms.epochs import read_rows
from metalearn.datasets import (
    ClassIndex,
    FewShot,
    HeldOut,
    Images,
    Sinusoid,
    TrainingRuns,
    from_labels,
    select,
)
from metalearn.models import NNX, Functions, Haiku, Linen
from metalearn.planning import plan
from metalearn.training.faults import NonFiniteError
from tests import cases

KEY = jax.random.key(0)
TRAINER = Trainer(MAML(cases.MODELS["Functions"], algorithms.squared_error), tasks_per_step=2)
ETA = TRAINER.algorithm.init(KEY)


def said(error, message):
    return pytest.raises(error, match=message)


# Tasks: what is no distribution over tasks, at every door.


class Plain(Tasks):
    def sample(self, key):
        return Sinusoid().sample(key)


@dataclasses.dataclass(frozen=True)
class Unregistered(Plain):
    shots: int = 3


class Attributes:
    """As attrs makes them, and no Tasks at all."""

    def __init__(self):
        self.shots = 3

    sample = Plain.sample


class Loader:
    """As PyTorch's: of some dataset, batch by batch."""

    dataset, batch_size = range(9), 3

    def __iter__(self):
        return iter(self.dataset)


class Stream:
    """As a dataset of tf.data."""

    element_spec = None

    def batch(self, size): ...

    def __iter__(self):
        return iter(())


EPISODE = Sinusoid().sample(KEY)
NO_TASKS = {
    "an unregistered class": (Plain(), "got a `Plain`, a class that JAX does not know as a pytree"),
    "an unregistered dataclass": (
        Unregistered(),
        "got a `Unregistered`, a dataclass that JAX does",
    ),
    "a class with attributes": (Attributes(), "got a `Attributes`, a class that JAX does not know"),
    "a class": (Sinusoid, r"got the class `Sinusoid`: it has no data yet. Make an .*`Sinusoid\("),
    "a generator": (
        (EPISODE for _ in "ab"),
        "got a generator: it is an iterator, .*with `TaskStream",
    ),
    "an iterator": (iter([EPISODE]), "got a list_iterator: it is an iterator, and jit cannot draw"),
    "a list": ([EPISODE] * 3, "got a list of 3: .*become one with `GivenTasks.create"),
    "a tuple": ((EPISODE,), "got a tuple of 1: nothing says how to draw from it"),
    "a loader": (Loader(), "got a loader, `Loader`: it hands out batches on .*pass its dataset"),
    "tf.data": (Stream(), "got a loader, `Stream`: it hands out batches on the host"),
    "a dict": (
        {"a": Sinusoid()},
        "got a dict with the keys 'a': .*`metalearn.datasets.SideBySide`",
    ),
    "an array": (
        np.zeros((3, 2)),
        r"got an array \[3, 2\]: nothing says .*`FewShot`, `TrainingRuns`",
    ),
    "one episode": (EPISODE, "got one episode: a distribution draws many"),
    "a function": (Sinusoid().sample, "got a function, `method`: jit takes what holds arrays"),
    "an index": (cases._INDEX, "got a ClassIndex: it has no `sample`. .* with `FewShot`"),
    "a text": ("sinusoid", "got a str: it has no `sample`"),
    "a number": (3, "got a int: it has no `sample`"),
}
DOORS = {
    "Trainer.fit(tasks=)": lambda tasks: TRAINER.fit(tasks, 1, key=KEY, progress=False),
    "Trainer.fit(held_out=)": lambda tasks: TRAINER.fit(
        Sinusoid(), 1, key=KEY, held_out=tasks, progress=False
    ),
    "Trainer.evaluate(tasks=)": lambda tasks: TRAINER.evaluate(ETA, tasks, KEY, 2),
    "Trainer.init(tasks=)": lambda tasks: TRAINER.init(KEY, tasks),
    "Trainer.task_gradient(tasks=)": lambda tasks: TRAINER.task_gradient(ETA, tasks, KEY),
    "Trainer.check_health(tasks=)": lambda tasks: TRAINER.check_health(TRAINER.init(KEY), tasks),
    "plan(tasks=)": lambda tasks: plan.plan(TRAINER, tasks),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", NO_TASKS)
def test_what_is_no_distribution_over_tasks_is_refused_at_every_door(name, door):
    tasks, message = NO_TASKS[name]
    with said(TypeError, f"^`{re.escape(door)}` .*{message}"):
        DOORS[door](tasks)


def test_no_tasks_at_all_are_refused():
    with said(TypeError, r"^`Trainer.fit\(tasks=\)` .*got nothing: there is nothing to draw from"):
        TRAINER.fit(None, 1, key=KEY, progress=False)


def test_an_unregistered_class_is_refused_with_how_to_register_it():
    with said(TypeError, "`@jax.tree_util.register_dataclass`.*`jax.tree_util.register_pytree"):
        TRAINER.evaluate(ETA, Unregistered(), KEY, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fields(Tasks):
    """A distribution of one's own whose fields may be of the wrong kind."""

    value: object
    returned: object = dataclasses.field(default=Episode, metadata={"static": True})

    def sample(self, key):
        inputs = jnp.zeros((self.value, 1)) if isinstance(self.returned, str) else jnp.ones((2, 1))
        return self.returned((inputs, inputs), (inputs, inputs))


class Both(NamedTuple):
    """An episode of one's own."""

    support: object
    query: object


@pytest.mark.parametrize("value", ["digits", object(), np.array(["a"]), np.array([None])])
def test_a_field_that_is_no_array_is_named_and_how_to_make_it_static(value):
    with said(TypeError, r"a `Fields` whose `\.value` is a \w+, which .* `dataclasses.field\("):
        TRAINER.evaluate(ETA, Fields(value), KEY, 2)


def test_a_number_of_examples_that_is_not_static_is_named():
    with said(TypeError, r"a `Fields` whose `sample` cannot be traced .* its \.value are arrays"):
        TRAINER.evaluate(ETA, Fields(3, returned="shape"), KEY, 2)


def test_what_sample_returns_is_an_episode():
    with said(TypeError, r"`Fields.sample` returned a tuple, but .*`metalearn.Episode\("):
        TRAINER.evaluate(ETA, Fields(1.0, returned=lambda *parts: parts), KEY, 2)


@pytest.mark.parametrize("returned", [Episode, Both])
def test_a_class_of_ones_own_that_is_right_is_taken(returned):
    found = TRAINER.evaluate(ETA, Fields(3, returned), KEY, 2)
    assert np.isfinite(found["loss"].mean)


# Models: what another library has, or the wrong part of it.


class LinenNet(nn.Module):
    outputs: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Keyword(NNXNet):
    def __init__(self, width, *, rngs):
        super().__init__(rngs)


def forward(x):
    return hk.Linear(1)(x)


SHAPE = jax.ShapeDtypeStruct((1, 1), jnp.float32)
NO_MODELS = {
    "a linen module": (LinenNet(), r"not a linen module, `LinenNet`. .*`Linen\(module, inputs\)`"),
    "a linen class": (LinenNet, r"not the class LinenNet, of a linen modules?. .*`Linen\("),
    "an NNX module": (NNXNet(nnx.Rngs(0)), r"not an NNX module, `NNXNet`. .*`NNX\(lambda rngs"),
    "an NNX class": (NNXNet, r"not the class NNXNet, .*`NNX\(lambda rngs"),
    "a Haiku network": (
        hk.transform(forward),
        r"not a Haiku network, `Transformed`. .*`Haiku\(",
    ),
    "a function": (forward, r"not a function. .*`Linen\(.*`NNX\(.*`Haiku\(.*`Functions\("),
    "a pair": ((forward, forward), r"not `tuple`. `metalearn.models` makes one"),
    "an adapter": (
        Functions,
        r"not the class Functions. Make one: `Functions\(",
    ),
    "nothing": (None, "not `NoneType`. `metalearn.models` makes one"),
}
RATE = {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1)}
TAKERS = {
    "MAML": MAML,
    "FDS": lambda model: FDS(model, RATE, 3, 2),
    "LearningRates": LearningRates,
    "LossWeights": lambda model: LossWeights(model, TokenWeights()),
    "Supervised": Supervised,
    "Streamed": Streamed,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_refused_with_the_adapter_it_needs(name, taker):
    model, message = NO_MODELS[name]
    if model is None and taker == "FDS":
        assert TAKERS[taker](None).schedules({"learning_rate": jnp.ones(1)})
        with said(TypeError, rf"^`FDS\(model=None\)`: it is a Model,.*{message[4:]}"):
            TAKERS[taker](None).unroll(None, KEY)
        return
    with said(TypeError, rf"^`{taker}\(model=.*\)`: it is a Model,.*{message[4:]}"):
        TAKERS[taker](model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Linen(LinenNet, SHAPE),
            r"not the class `LinenNet`. Write `Linen\(LinenNet\(",
        ),
        (lambda: Linen(NNXNet(nnx.Rngs(0)), SHAPE), r"not an NNX module, .*Write `NNX\(lambda"),
        (
            lambda: Linen(forward, SHAPE),
            r"`Linen\(module=\)` takes a linen module, .*not a func",
        ),
        (lambda: NNX(NNXNet(nnx.Rngs(0))), r"a function that builds .*not an NNX module, `NNXNet`"),
        (lambda: NNX(LinenNet()), r"not a linen module, `LinenNet`. Write `Linen\("),
        (lambda: NNX(LinenNet), r"not the class `LinenNet`. Write `Linen\("),
        (
            lambda: NNX(Keyword),
            r"which `Keyword` does not .*`NNX\(lambda rngs: Keyword\(",
        ),
        (lambda: NNX(lambda: NNXNet(nnx.Rngs(0))), r"is called with one argument, the random stre"),
        (
            lambda: Haiku(hk.transform(forward), SHAPE),
            r"the forward function itself, .*`Haiku\(forw",
        ),
        (lambda: Haiku(hk.transform_with_state(forward), SHAPE), r"the forward function itself"),
        (lambda: Haiku(LinenNet(), SHAPE), r"not a linen module, .*Write `Linen\("),
        (lambda: Haiku(hk.Linear, SHAPE), r"not the class `Linear`. Write `Haiku\("),
        (
            lambda: Linen(LinenNet(), (1, 28)),
            r"`Linen\(inputs=\(1, 28\)\)` is what a batch",
        ),
        (
            lambda: Haiku(forward, None),
            r"`Haiku\(inputs=None\)` is what a batch of inputs",
        ),
        (lambda: Functions(forward, 3), r"`Functions\(apply_fn=3\)`: it is a function, not an int"),
    ],
)
def test_an_adapter_refuses_what_is_of_another_kind(make, message):
    with said(TypeError, message):
        make()


def test_a_class_that_takes_random_streams_alone_builds_itself():
    params, _ = NNX(NNXNet).init(KEY)
    assert jax.tree.map(jnp.shape, params) == {"layer": {"bias": (1,), "kernel": (1, 1)}}


# Data: lists, dictionaries, sizes that are no integers.

PIXELS = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)


def test_labels_and_images_may_be_lists():
    labels = [7, 2, 7, 7, 2, 30]
    ours = from_labels(PIXELS, labels), from_labels(list(PIXELS), np.array(labels))
    for index in ours:
        assert index.counts.tolist() == [2, 3, 1]
        assert (index.examples == from_labels(PIXELS, np.array(labels)).examples).all()
    named = from_labels(PIXELS, ["b", "a", "b", "b", "a", "c"])
    assert (named.examples == ours[0].examples).all()


def test_an_index_may_be_made_of_lists():
    index = ClassIndex([[[1.5], [2.5]], [[3.5], [4.5]]], [2, 2])
    (x, y), _ = FewShot.create(index, ways=2, shots=1, queries=1).sample(KEY)
    assert set(x[:, 0].tolist()) <= {1.5, 2.5, 3.5, 4.5} and y.tolist() == [0, 1]
    assert select(index, [1]).examples.tolist() == [[[3.5], [4.5]]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_labels(PIXELS, np.zeros(6)), TypeError, "labels of float64 .*`labels.astype"),
        (lambda: from_labels(PIXELS, [[1], [1, 2]] * 3), (TypeError, ValueError), "label|inhomo"),
        (lambda: from_labels(PIXELS, None), TypeError, r"labels of object \(NoneType\)"),
        (lambda: from_labels(PIXELS, {"a": 1}), TypeError, r"labels of object \(dict\)"),
        (
            lambda: from_labels({"image": PIXELS}, [1]),
            ValueError,
            r"6 inputs and labels of shape \[1\]",
        ),
        (
            lambda: from_labels(PIXELS, np.eye(6, dtype=int)),
            ValueError,
            r"labels of shape \[6, 6\]",
        ),
        (
            lambda: few(Images(PIXELS, [0] * 6)),
            TypeError,
            r"`ClassIndex`, .*not a Images. .*`from",
        ),
        (
            lambda: few((PIXELS, [0])),
            TypeError,
            "takes a `ClassIndex`, examples by class, not a t",
        ),
        (
            lambda: few(ClassIndex(PIXELS, [0, 1])),
            ValueError,
            r"examples \[6, 2, 2\] and counts int",
        ),
        (
            lambda: few(ClassIndex(PIXELS, [1.0] * 6)),
            ValueError,
            r"counts float64\[6\], but counts",
        ),
        (
            lambda: few(ClassIndex(PIXELS, [3] * 6)),
            ValueError,
            "class 0 has 3 examples, .*hold 2",
        ),
        (
            lambda: few(ClassIndex(PIXELS, [-1] * 6)),
            ValueError,
            r"counts int64\[6\], but counts",
        ),
        (lambda: few(ClassIndex({}, [1])), TypeError, "`ClassIndex` got an empty dict for its ex"),
        (
            lambda: few(ClassIndex(["a"], [1])),
            TypeError,
            "list of <U1 for its examples, but",
        ),
    ],
)
def test_an_index_of_something_else_is_refused(make, error, message):
    with said(error, message):
        make()


def few(index, **sizes):
    return FewShot.create(index, **{"ways": 1, "shots": 1, "queries": 1, **sizes})


@pytest.mark.parametrize("name", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", [1.0, "1", None, np.float32(1), [1]])
def test_a_size_of_a_task_is_an_integer(name, value):
    with said(ValueError, rf"`FewShot\({name}={re.escape(repr(value))}\)`: it is an integer"):
        few(cases._INDEX, **{name: value})


@pytest.mark.parametrize("name", ["length", "inner_steps", "batch", "queries", "probes", "pieces"])
def test_a_size_of_a_text_is_an_integer(name):
    sizes = {"length": 2, "inner_steps": 1, "batch": 1, "queries": 1, name: 1.0}
    with said(ValueError, rf"`Text\({name}=1\.0\)`: it is an integer"):
        datasets.Text.create("a text", "a text", **sizes)


@pytest.mark.parametrize("kind", ["TrainingRuns", "HeldOut"])
@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            {"image": PIXELS, "mask": PIXELS},
            np.arange(6),
            "dict with the keys 'image', 'mask'",
        ),
        ({}, np.arange(6), "inputs that are a dict"),
        (None, np.arange(6), "nothing for its inputs, but inputs are an array of numbers"),
        ([[1.0], [1.0, 2.0]], [0, 1], "a list for its inputs, .*`np.stack"),
        (PIXELS, {"label": [0] * 6}, "targets that are a dict with the keys 'label'"),
        (PIXELS, ["a"] * 6, "list of <U1 for its targets, .*number classes that have names"),
        (PIXELS, np.array([None] * 6), "ndarray of object for its targets"),
    ],
)
def test_data_that_are_no_arrays_are_refused(kind, inputs, targets, message):
    with said(TypeError, f"`{kind}` got .*{message}"):
        if kind == "HeldOut":
            HeldOut.create(inputs, targets, PIXELS, np.arange(6))
        TrainingRuns.create(inputs, targets, validation=1)


@pytest.mark.parametrize("validation", ["3", None, [3]])
def test_validation_is_a_number(validation):
    with said(TypeError, r"`TrainingRuns` got validation=.*a number of examples, such as 1000, or"):
        TrainingRuns.create(PIXELS, np.arange(6), validation=validation)


def test_lists_of_numbers_are_data():
    tasks = TrainingRuns.create([[1.0], [2.0], [3.0]], [0, 1, 2], validation=1)
    assert tasks.inputs.tolist() == [[1], [2], [3]] and tasks.targets.tolist() == [0, 1, 2]


# Pixels: uint8 images are read as 0..1, and nothing else is rescaled.

VALUES = [0, 1, 7, 255]
OTHERS = [np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint16, np.bool_]


def episodes(examples):
    """What an inner loop reads of examples [4, ...] by each of the ways to them."""
    index = ClassIndex(np.stack([examples] * 2), np.array([4, 4], np.int32))
    support, query = FewShot.create(index, ways=1, shots=2, queries=2).sample(KEY)
    yield jnp.concatenate([support[0], query[0]])
    for tasks in (
        TrainingRuns.create(examples, np.arange(4), validation=2),
        HeldOut.create(examples, np.arange(4), examples, np.arange(4)),
    ):
        yield read_rows(tasks.sample(KEY).support, jnp.arange(4))[0]


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("shape", [(3,), (2, 2, 1)])
def test_what_is_not_uint8_is_never_rescaled(dtype, shape):
    values = np.array(VALUES).astype(dtype)
    if dtype in (np.float32, np.int32):
        values[0] = -7
    examples = np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (4, *shape))
    for found in episodes(examples):
        assert found.shape == (4, *shape) and found.dtype == jnp.asarray(values).dtype
        assert sorted(found.reshape(4, -1)[:, 0].tolist()) == sorted(values.tolist())


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 1)])
def test_images_of_uint8_are_read_as_zero_to_one(shape):
    values = np.array(VALUES, np.uint8)
    examples = np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (4, *shape))
    for found in episodes(examples):
        assert found.dtype == jnp.float32
        expected = np.sort(values.astype(np.float32) / np.float32(255))
        np.testing.assert_allclose(np.sort(found.reshape(4, -1)[:, 0]), expected, rtol=1e-6)
        assert found.max() == 1


@pytest.mark.parametrize("shape", [(), (3,)])
def test_bytes_that_may_be_tokens_are_refused_with_both_ways_out(shape):
    tokens = np.zeros((4, *shape), np.uint8)
    index = ClassIndex(tokens[None], np.array([4]))
    message = (
        rf"got uint8 inputs, an example of which has the shape \[{3 if shape else ''}\]. uint8 is "
        r"read as pixels and divided by 255, .*`inputs.astype\(np.int32\)`. Pixels in a row: resha"
    )
    for make in (
        lambda: few(index),
        lambda: TrainingRuns.create(tokens, np.arange(4), validation=1),
        lambda: HeldOut.create(tokens, np.arange(4), tokens, np.arange(4)),
        lambda: read_rows((jnp.asarray(tokens), jnp.arange(4)), jnp.arange(4)),
    ):
        with said(ValueError, message):
            make()


def test_windows_of_a_text_are_tokens():
    text = datasets.Text.create("zzzz", "zzzz", length=2, inner_steps=1, batch=1, queries=1)
    assert set(np.asarray(text.sample(KEY).query.inputs).ravel().tolist()) == {ord("z")}


# Labels: beside the outputs of the network.


def linear(outputs):
    return Functions(
        lambda key: {"w": 0.1 * jax.random.normal(key, (2, outputs))},
        lambda params, x: x.reshape(x.shape[0], -1)[:, :2] @ params["w"],
    )


def runs(labels):
    return TrainingRuns.create(np.ones((len(labels), 2), np.float32), labels, validation=2)


def learner(outputs, objective=cross_entropy):
    return FDS(linear(outputs), RATE, 2, 2, objective=objective)


def trained(tasks, algorithm, **options):
    trainer = Trainer(algorithm, metalearn.Reverse(), tasks_per_step=2)
    return trainer.fit(tasks, 1, key=KEY, progress=False, **options)


BEYOND = [
    ([0, 1, 2, 3, 0, 1], "from 0 to 3, but the network has 3 outputs, .*4 outputs or more"),
    ([1, 2, 3, 1, 2, 3], "from 1 to 3, but the network has 3 outputs, .*number the classes from 0"),
    ([0, 1, -1, 2, 0, 1], "from -1 to 2, but the network has 3 outputs, .*labels from 0 to 2"),
    (np.array([0, 1, 255, 2, 0, 1], np.uint8), "from 0 to 255, but the network has 3 outputs"),
]


@pytest.mark.parametrize(("labels", "message"), BEYOND)
def test_labels_beyond_the_outputs_are_refused_before_training(labels, message):
    with said(ValueError, f"The labels go {message}"):
        trained(runs(labels), learner(3))


def test_so_they_are_at_the_other_doors_also_where_the_program_is_compiled_already():
    trainer = Trainer(learner(3), metalearn.Reverse(), tasks_per_step=2)
    wrong, right = runs([0, 1, 2, 3, 0, 1]), runs([0, 1, 2, 2, 0, 1])
    state, options = trainer.init(KEY), {"key": KEY, "progress": False}
    held_out = {"held_out": wrong, "eval_every": 1, "eval_tasks": 2}
    trainer.evaluate(state.eta, right, KEY, 2)
    for enter in (
        lambda: trainer.evaluate(state.eta, wrong, KEY, 2),
        lambda: trainer.task_gradient(state.eta, wrong, KEY),
        lambda: trainer.check_health(state, wrong),
        lambda: trainer.fit(wrong, 1, **options),
        lambda: trainer.fit(right, 1, **options, **held_out),
    ):
        with said(ValueError, "has 3 outputs, and `cross_entropy` takes labels from 0 to 2"):
            enter()
    trainer.evaluate(state.eta, right, KEY, 2)


def test_so_they_are_by_other_losses():
    wrong = runs([0, 1, 2, 3, 0, 1])
    algorithm = learner(3, weighted_cross_entropy)
    with said(ValueError, "has 3 outputs, and `weighted_cross_entropy` takes labels from 0"):
        Trainer(algorithm).evaluate(algorithm.init(KEY), wrong, KEY, 2)
    text = cases.TASKS["Text"]
    algorithm = LossWeights(cases.Tokenwise(cases.mlp("linen", 4)), TokenWeights())
    assert text.label_range() == (0, 3)
    with said(ValueError, "from 0 to 3, but the network has 2 outputs, and `LossWeights` takes"):
        Trainer(dataclasses.replace(algorithm, model=linear_on_tokens(2))).evaluate(
            algorithm.init(KEY), text, KEY, 1
        )


def linear_on_tokens(outputs):
    return Functions(
        lambda key: {"w": jnp.ones((9, outputs))}, lambda params, tokens: params["w"][tokens]
    )


def test_the_ways_of_few_shot_tasks_and_the_labels_of_a_test_set_are_looked_at():
    index = ClassIndex(np.ones((4, 3, 2), np.float32), np.full(4, 3))
    tasks = FewShot.create(index, ways=4, shots=1, queries=1)
    with said(ValueError, "from 0 to 3, but the network has 3 outputs, and `cross_entropy`"):
        trained(tasks, MAML(linear(3)))
    inputs = np.ones((3, 2), np.float32)
    tasks = HeldOut.create(inputs, [0, 1, 9], inputs, [0, 1, 2])
    with said(ValueError, "from 0 to 9, but the network has 3 outputs"):
        Trainer(learner(3)).evaluate(learner(3).init(KEY), tasks, KEY, 1)


def test_a_regression_and_outputs_to_spare_are_no_mistake():
    assert runs([0.5, 1.0, 7.5, 1.0]).label_range() is None
    with known((0, 2), {("cross_entropy", 9)}):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own(Tasks):
    """Tasks of one's own, of which nobody says what their labels are."""

    labels: jax.Array

    def sample(self, key):
        inputs = jnp.ones((self.labels.shape[0], 2))
        return Episode((inputs, self.labels), (inputs, self.labels))


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0, 3], "0 to 3"), pytest.param([-1, 2], "-1 to 2", marks=pytest.mark.slow)],
)
def test_labels_nobody_knows_of_are_not_blamed_on_the_learning_rate(labels, found):
    tasks = Own(jnp.asarray(labels))
    algorithm = MAML(linear(3))
    trainer = Trainer(algorithm, metalearn.Reverse(), tasks_per_step=2)
    report = trainer.check_health(trainer.init(KEY), tasks)
    message = f"not finite, of labels that .*from {found}, but the network has 3 outputs"
    assert re.search(message, str(report)) and "learning rate" not in str(report)
    with said(NonFiniteError, message):
        trained(tasks, algorithm)


@pytest.mark.parametrize("objective", [cross_entropy, weighted_cross_entropy])
def test_a_negative_label_has_no_loss_and_does_not_change_the_others(objective):
    logits = jnp.array([[0.5, -1.0, 2.0]] * 2)
    assert jnp.isnan(objective(logits, jnp.array([0, -1]))[0])
    loss, _ = objective(logits, jnp.array([0, 2]))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 2])).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.eye(3, dtype=np.int32)[[0, 1, 2, 0, 1]],
            r"one-hot: `labels.argmax\(-1\)`. A re",
        ),
        (np.zeros(5, np.float32), r"the labels float32\[2\]. A regression takes `squared_error`"),
        (np.zeros((5, 1), np.int32), r"the logits are \[2, 3\] and the labels int32\[2, 1\]"),
    ],
)
def test_labels_of_the_wrong_shape_or_type_are_refused(labels, message):
    with said(ValueError, message):
        trained(runs(labels), learner(3))


def test_what_is_known_of_labels_ends_with_the_call():
    with known((0, 9), set()):
        pass
    cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))


# The fuzz: every field of every public dataclass, and values of the wrong types.


class Nothing:
    """A value that is of no right type."""

    def __repr__(self):
        return "Nothing()"


NO_USERS = ("WithConstants", "AtOuterStep", "FetchedRuns")  # made by the trainer
INSTANCES = {
    "ES": metalearn.ES(),
    "PES": metalearn.PES(),
    "Faults": metalearn.Faults(),
    "Forward": metalearn.Forward(),
    "Implicit": metalearn.Implicit(),
    "InverseVariance": metalearn.InverseVariance(metalearn.ES(pairs=2)),
    "Layout": metalearn.Layout(metalearn.make_mesh()),
    "MixedFlow": metalearn.MixedFlow(),
    "Reverse": metalearn.Reverse(),
    "SAMA": metalearn.SAMA(),
    "Trainer": TRAINER,
    "Truncated": metalearn.Truncated(2),
    "Truncation": metalearn.Truncation(3),
    "DomainWeights": algorithms.DomainWeights(3),
    "ExampleWeights": algorithms.ExampleWeights(),
    "FDS": FDS(linear(3), RATE, 3, 2),
    "DataRater": algorithms.DataRater(linear(3), linear(1)),
    "DataWeights": DataWeights(linear(3), 5, 3, 2),
    "FactoredMoments": algorithms.FactoredMoments(),
    "HypergradientRule": algorithms.HypergradientRule(),
    "Hyperparameter": Hyperparameter(0.0, 1.0),
    "LearnedOptimizer": LearnedOptimizer(
        Supervised(linear(3)), algorithms.HypergradientRule(), inner_steps=3
    ),
    "LearningRates": LearningRates(linear(3)),
    "LossWeights": LossWeights(linear(3), TokenWeights()),
    "CAVIA": algorithms.CAVIA(linear(3)),
    "COMLN": algorithms.COMLN(linear(3), 3),
    "LearnedLoss": algorithms.LearnedLoss(linear(3)),
    "MetaNTK": algorithms.MetaNTK(linear(3)),
    "MirrorDescent": algorithms.MirrorDescent(),
    "MAML": MAML(linear(3)),
    "MAMLPlusPlus": algorithms.MAMLPlusPlus(linear(3)),
    "MetaCurvature": algorithms.MetaCurvature(linear(3)),
    "MetaTraining": algorithms.MetaTraining(MAML(linear(3))),
    "ProtoNet": algorithms.ProtoNet(linear(3), 3),
    "R2D2": algorithms.R2D2(linear(3), 3),
    "Reptile": algorithms.Reptile(linear(3)),
    "Momenta": algorithms.Momenta(),
    "ParameterScale": algorithms.ParameterScale(),
    "PerParameter": algorithms.PerParameter(),
    "PointwiseGRU": algorithms.PointwiseGRU(),
    "PointwiseMLP": algorithms.PointwiseMLP(),
    "Quadratic": algorithms.Quadratic(3),
    "ReciprocalRoot": algorithms.ReciprocalRoot(),
    "Schedule": algorithms.Schedule((0, 1), (0.5,)),
    "SecondMoments": algorithms.SecondMoments(),
    "StepFeatures": algorithms.StepFeatures(),
    "Streamed": Streamed(linear(3)),
    "Supervised": Supervised(linear(3)),
    "Together": algorithms.Together({"one": Streamed(linear(3))}),
    "TokenWeights": TokenWeights(),
    "TunedRule": algorithms.TunedRule(optax.sgd, RATE),
    "Corruption": datasets.Corruption(),
    **{name: cases.TASKS[name] for name in cases.TASKS if name not in NO_USERS},
    "NNX": NNX(NNXNet),
    "Architecture": models.Architecture(9, 4, 1, 2),
    "BlockedAttention": models.BlockedAttention(3),
    "Functions": linear(3),
    "Haiku": Haiku(forward, SHAPE),
    "Linen": Linen(LinenNet(), SHAPE),
    "Equinox": models.Equinox(lambda key: None),
    "LoRA": models.LoRA(linear(3), 1),
    "Precision": models.Precision(linear(3)),
    "Replay": metalearn.Replay(),
    "Pretrained": cases.MODELS["Pretrained"],
    "Trainable": cases.MODELS["Trainable"],
}
WITHOUT_FIELDS = {"Gradient", "ParameterValue"}
A_MARK = {"ExampleMean"}  # what an algorithm wraps its own loss in
A_RESULT = {"Learner"}  # of `Algorithm.adapt`, whose arguments are checked in test_adapt.py
WRONG = ["text", 0.5, None, {}, [Nothing()], Nothing(), Nothing, lambda: None]


def public():
    found = {}
    for package in (metalearn, algorithms, datasets, models):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) and dataclasses.is_dataclass(value):
                found[name] = value
    return found


def test_every_public_dataclass_is_in_the_fuzz():
    expected = set(public()) - WITHOUT_FIELDS - A_MARK - A_RESULT
    assert {n for n in INSTANCES if n in expected} == expected
    assert all(type(INSTANCES[name]) is public()[name] for name in expected)


def fields(name):
    """The fields that are no arrays: those are checked by `create`, above."""
    part = INSTANCES[name]
    static = [f for f in dataclasses.fields(part) if f.metadata.get("static")]
    chosen = static or ([] if name == "HeldOut" else dataclasses.fields(part))
    return [f.name for f in chosen if f.init]


def is_wrong(name, field, value):
    """Whether a value is not of the type that a field says: by hand, and not by what is tested."""
    said = {f.name: str(f.type) for f in dataclasses.fields(INSTANCES[name])}[field]
    if field == "features" and name in ("ExampleWeights", "TokenWeights") and value:
        return not isinstance(value, list)  # whose names are looked up, each refused by itself
    if said in ("Any", "object") or value is None and ("None" in said or said == "Model"):
        return False
    if isinstance(value, str):
        return not re.search(r"\bstr\b(?!,)", said)
    if isinstance(value, float):
        return not re.search(r"\bfloat\b(?!,)", said) or "tuple" in said.partition("|")[0]
    if isinstance(value, dict):
        return "Mapping" not in said
    if inspect.isfunction(value) or inspect.isclass(value):
        return not re.search("Callable|Objective|Function|Mode", said)
    return True


@pytest.mark.parametrize(
    ("count", "way_out"),
    [(6, "Give the targets that axis too: `targets[..., None]`"), (3, "take `cross_entropy`")],
)
def test_targets_of_another_shape_are_told_what_they_lack(count, way_out):
    with pytest.raises(ValueError, match=re.escape(way_out)):
        algorithms.squared_error(jnp.zeros((6, 1)), jnp.zeros(count))


FUZZ = [(name, field) for name in INSTANCES for field in fields(name)]


@pytest.mark.parametrize(("name", "field"), FUZZ, ids=[f"{n}-{f}" for n, f in FUZZ])
def test_a_field_of_the_wrong_type_is_refused_by_class_and_name(name, field):
    wrong = [value for value in WRONG if is_wrong(name, field, value)]
    assert wrong or field in ("dtype", "inputs", "params", "state", "compute")
    for value in wrong:
        with pytest.raises((TypeError, ValueError)) as caught:
            dataclasses.replace(INSTANCES[name], **{field: value})
        text = str(caught.value)
        assert re.search(rf"\b{name}\b", text) and field in text, (value, text)
        assert "\n" not in text


@pytest.mark.parametrize("name", [name for name in INSTANCES if name != "HeldOut"])
def test_the_types_of_all_fields_are_read(name):
    assert set(fields(name)) <= set(_hints(type(INSTANCES[name])))


def test_a_field_of_the_wrong_type_is_a_type_error_and_from_a_file_a_value_error():
    for error in (TypeError, ValueError):
        with said(error, r"^`Faults\(most='often'\)`: it is an integer, not a str\.$"):
            metalearn.Faults(most="often")
