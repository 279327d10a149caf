"""The adapter of Equinox does what its users do by hand: vmap, state, keys, inference mode."""

import re
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn._utils.trees import paths
from metalearn.models import Equinox, Functions, Linen, no_flag
from tests.cases import conv_net, mlp
from tests.helpers.equinox_networks import MLP, ConvNet
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY, OTHER = jax.random.key(0), jax.random.key(1)
IMAGES = np.random.default_rng(0).normal(size=(5, 4, 4, 1))
ROWS = np.random.default_rng(1).normal(size=(5, 3))


def by_hand(module, state, train, key):
    module = eqx.nn.inference_mode(module, value=not train)
    return jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(
        IMAGES, state, key=jax.random.split(key, 5)
    )


def build(key):
    return ConvNet((4, 4), 2, 3, dropout=0.5, key=key)


@pytest.mark.parametrize(
    "make",
    quick([build, eqx.nn.make_with_state(build)], lambda make: make is build),
    ids=["plain", "state"],
)
def test_equinox_is_what_its_user_does_by_hand(make):
    model = Equinox(make)
    params, state = model.init(KEY)
    module, theirs = eqx.nn.make_with_state(build)(KEY)
    for train in (True, False):
        expected, theirs = by_hand(module, theirs, train, OTHER)
        outputs, state = model.apply(params, state, IMAGES, train=train, key=OTHER)
        np.testing.assert_allclose(outputs, expected, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert outputs.shape == (5, 2)


def test_params_and_state_are_plain_dictionaries_by_attribute():
    params, state = conv_net("equinox").init(KEY)
    assert paths(params) == [
        *("convolution/bias", "convolution/weight", "head/bias", "head/weight"),
        *("norm/bias", "norm/weight"),
    ]
    assert list(state) == ["state"]
    assert sorted(state["state"]) == [
        "ConvNet.norm.batch_counter",
        "ConvNet.norm.batch_state_index",
    ]
    assert mlp("equinox").init(KEY)[1] == ()


def test_two_initialisations_have_one_structure_and_a_module_comes_back():
    model = Equinox(build)
    first, second = model.init(KEY), model.init(OTHER)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    module, state = model.module(*second)
    expected, _ = by_hand(*eqx.nn.make_with_state(build)(OTHER), True, KEY)
    np.testing.assert_allclose(by_hand(module, state, True, KEY)[0], expected, rtol=1e-12)
    alone, none = mlp("equinox").module(mlp("equinox").init(KEY)[0])
    assert isinstance(alone, MLP) and none is None


class Buffers(eqx.Module):
    """Integers, a NumPy array, a list, a static function and a flag of an argument."""

    order: jax.Array
    scale: np.ndarray
    layers: list
    call: object = eqx.field(static=True)

    def __init__(self, key):
        self.order = jnp.array([2, 0, 1])
        self.scale = np.ones(3)
        self.layers = [eqx.nn.Linear(3, 3, key=key), eqx.nn.LayerNorm(3)]
        self.call = lambda x: x + 1

    def __call__(self, x, enable=0, training=True):
        for layer in self.layers:
            x = layer(x[self.order] * self.scale)
        return self.call(x) + enable + 10 * training


def test_arrays_that_are_no_floats_are_state_and_numpy_floats_are_params():
    model = Equinox(Buffers)
    params, state = model.init(KEY)
    assert list(state) == ["arrays"] and state["arrays"]["order"].tolist() == [2, 0, 1]
    assert {"scale", "layers/0/weight", "layers/1/bias"} <= set(paths(params))
    run = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False))
    outputs, after = run(params, state, ROWS)
    expected = jax.vmap(lambda x: Buffers(KEY)(x, training=False))(ROWS)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    assert after["arrays"]["order"].tolist() == [2, 0, 1]
    assert "mode='training'" in repr(model)


def test_layers_of_equinox_itself_are_models():
    inputs = {"dropout": eqx.nn.Dropout(0.5), "norm": eqx.nn.LayerNorm(3)}
    for layer in inputs.values():
        model = Equinox(lambda key, layer=layer: layer)
        params, state = model.init(KEY)
        once, _ = model.apply(params, state, ROWS, train=True, key=KEY)
        still, _ = model.apply(params, state, ROWS, train=False)
        keys = jax.random.split(KEY, 5)
        np.testing.assert_allclose(once, jax.vmap(lambda x, k, f=layer: f(x, key=k))(ROWS, keys))
        np.testing.assert_allclose(still, jax.vmap(eqx.nn.inference_mode(layer))(ROWS))
    sequential = eqx.nn.Sequential
    model = Equinox(
        lambda key: sequential(
            [eqx.nn.BatchNorm(3, "batch", mode="batch"), eqx.nn.Linear(3, 2, key=key)]
        )
    )
    params, state = model.init(KEY)
    outputs, new = model.apply(params, state, ROWS, train=True, key=KEY)
    assert outputs.shape == (5, 2)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state, new)), strict=True))


def test_a_module_that_takes_a_batch_is_called_as_it_is():
    class Batched(eqx.Module):
        def __call__(self, x, key):
            return x - x.mean(0, keepdims=True) + jax.random.normal(key, (1, 1))

    outputs, _ = Equinox(lambda key: Batched(), axis=None).apply({}, (), ROWS, train=True, key=KEY)
    expected = ROWS - ROWS.mean(0, keepdims=True) + jax.random.normal(KEY, (1, 1))
    np.testing.assert_allclose(outputs, expected)


def test_a_mode_that_is_a_function_sets_arguments_and_the_attributes_are_set_too():
    class Net(eqx.Module):
        inference: bool = False

        def __call__(self, x, phase="none"):
            return x + 10 * self.inference + {"none": 0, "fit": 1, "test": 2}[phase]

    model = Equinox(lambda key: Net(), mode=lambda train: {"phase": "fit" if train else "test"})
    outputs = [model.apply({}, (), jnp.zeros((1,)), train=t)[0].item() for t in (True, False)]
    assert outputs == [1, 12]
    plain = Equinox(lambda key: Net(), mode=no_flag)
    assert plain.apply({}, (), jnp.zeros((1,)), train=False)[0].item() == 10


class Counter(eqx.Module):
    """Its state is of one example, not of the batch."""

    index: eqx.nn.StateIndex

    def __init__(self, key):
        self.index = eqx.nn.StateIndex(jnp.zeros(3))

    def __call__(self, x, state):
        return x, state.set(self.index, state.get(self.index) + x)


REFUSED = {
    "an instance": (
        lambda: Equinox(MLP(3, key=KEY)),
        TypeError,
        "`Equinox(build=)` takes a function that builds the module from a key, or its class: every "
        "task has parameters of its own; not an Equinox module, `MLP`. Write "
        "`Equinox(lambda key: Net(..., key=key))`, from what builds it.",
    ),
    "a class with sizes": (
        lambda: Equinox(MLP),
        TypeError,
        "is called with one argument, a random key, which `MLP` does not take (missing a required "
        "argument: 'width'). Write `Equinox(lambda key: MLP(..., key=key))`.",
    ),
    "an instance to another adapter": (
        lambda: Linen(MLP(3, key=KEY), jax.ShapeDtypeStruct((1, 3), float)),
        TypeError,
        "not an Equinox module, `MLP`. Write `Equinox(lambda key: Net(..., key=key))`",
    ),
    "a state of one example": (
        lambda: Equinox(Counter).apply(*Equinox(Counter).init(KEY), ROWS, train=True),
        ValueError,
        "The state after a call differs from example to example, but a model has one state for a "
        "batch. Take the mean over the batch in the layer, `jax.lax.pmean(value, 'batch')`; or let "
        "the module take a batch: `Equinox(..., axis=None)`.",
    ),
    "another axis": (
        lambda: Equinox(build, axis="rows").apply(
            *Equinox(build).init(KEY), IMAGES, train=True, key=KEY
        ),
        NameError,
        "A layer of the module reduces over an axis of another name than the adapter's, 'rows'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_with_the_way_out(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_transformed_functions_of_equinox_are_plain_functions():
    apply = eqx.filter_jit(lambda params, x: params * x)
    model = Functions(lambda key: jnp.ones(()), apply)
    assert model.apply(jnp.full((), 2.0), (), ROWS, train=True)[0].shape == ROWS.shape


@pytest.mark.slow
def test_models_import_without_equinox_and_the_adapter_says_what_to_install():
    program = """
        import sys
        sys.modules["equinox"] = None
        from metalearn.models import Equinox
        try:
            Equinox(lambda key: None)
        except ImportError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert result.stdout == (
        "`metalearn.models.Equinox` adapts modules of Equinox, which is not installed. "
        "`pip install 'metalearn-jax[equinox]'`.\n"
    )
