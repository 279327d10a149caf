"""An adapter finds the flag of training mode by its name, says which, and refuses to guess."""

import logging

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metalearn.models import NNX, Functions, Haiku, Linen, no_flag

KEY = jax.random.key(0)
ROW = jax.ShapeDtypeStruct((1, 3), jnp.float32)
X = jax.random.normal(jax.random.key(2), (4, 3))
IN_TRAINING = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


def linen(arguments):
    """A module whose call has these arguments; its outputs are 1 in the mode of training."""
    scope = {"nn": nn}
    value = " + ".join(f"({a} is {IN_TRAINING[a]})" for a in arguments) or "0"
    exec(
        "class Net(nn.Module):\n"
        f"    def __call__(self, x, {', '.join(f'{a}=None' for a in arguments)}):\n"
        f"        return 0 * x + {value}\n",
        scope,
    )
    return scope["Net"]()


def nnx_net(arguments):
    module = linen(arguments)

    class Net(nnx.Module):
        def __init__(self, rngs):
            del rngs

        __call__ = type(module).__dict__["__call__"].__wrapped__

    return Net


def haiku_net(arguments):
    scope = {}
    value = " + ".join(f"({a} is {IN_TRAINING[a]})" for a in arguments) or "0"
    exec(f"def net(x, {', '.join(arguments)}):\n    return 0 * x + {value}\n", scope)
    return scope["net"]


def adapted(library, arguments, **options):
    if library == "linen":
        return Linen(linen(arguments), ROW, **options)
    if library == "nnx":
        return NNX(nnx_net(arguments), **options)
    return Haiku(haiku_net(arguments), ROW, **options)


def in_both_modes(model):
    params, state = model.init(KEY)
    return [
        float(model.apply(params, state, X, train=train, key=KEY)[0].max())
        for train in (True, False)
    ]


@pytest.mark.parametrize("library", ["linen", "nnx", "haiku"])
@pytest.mark.parametrize("word", IN_TRAINING)
def test_the_argument_with_a_usual_name_is_set_and_the_repr_says_which(library, word):
    model = adapted(library, [word])
    assert in_both_modes(model) == [1, 0]
    assert f"mode='{word}'" in repr(model) and "0x" not in repr(model)


@pytest.mark.parametrize("library", ["linen", "nnx", "haiku"])
def test_two_usual_names_are_refused_unless_one_is_named(library):
    both = ["training", "deterministic"]
    with pytest.raises(
        ValueError,
        match=r"'training' and 'deterministic' would both set its mode of training. Say which: "
        r"`\w+\(..., mode='training'\)`; or set both: "
        r"`mode=lambda train: \{'training': train, 'deterministic': not train\}`",
    ):
        adapted(library, both)
    if library != "haiku":
        assert in_both_modes(adapted(library, both, mode="training")) == [1, 0]
    told = adapted(library, both, mode=lambda train: {both[0]: train, both[1]: not train})
    assert in_both_modes(told) == [2, 0]


def test_a_build_function_of_two_names_is_refused_where_it_is_first_built():
    model = NNX(lambda rngs: nnx_net(["train", "inference"])(rngs))
    with pytest.raises(
        ValueError, match=r"^`NNX\(build=Net\)`: 'train' and 'inference' would both"
    ):
        model.apply({}, {}, X, train=True)


def test_an_argument_and_a_field_of_two_names_are_refused_and_either_can_be_named():
    class Net(nn.Module):
        deterministic: bool = False

        def __call__(self, x, train=True):
            return 0 * x + train + 10 * (not self.deterministic)

    with pytest.raises(ValueError, match=r"'train' and 'deterministic' would both"):
        Linen(Net(), ROW)
    assert in_both_modes(Linen(Net(), ROW, "train")) == [11, 10]
    assert in_both_modes(Linen(Net(), ROW, "deterministic")) == [11, 1]


@pytest.mark.parametrize("library", ["linen", "nnx", "haiku"])
def test_a_mode_that_the_network_does_not_have_is_refused(library):
    message = r"\(mode='train'\)`: `\w+` has no argument of that name. It has 'training'."
    with pytest.raises(ValueError, match=message):
        adapted(library, ["training"], mode="train")
    with pytest.raises(
        ValueError, match=r"the values of 'phase' in training and in evaluation are not known."
    ):
        adapted(library, ["training"], mode="phase")


def test_a_network_with_any_arguments_takes_the_name_that_is_said():
    def forward(x, **flags):
        return 0 * x + flags.get("training", 5)

    assert in_both_modes(Haiku(forward, ROW, "training")) == [1, 0]
    assert in_both_modes(Haiku(forward, ROW)) == [5, 5]


def test_a_layer_is_still_checked_where_the_flag_was_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            return nn.Dropout(0.5, deterministic=False)(x)

    model = Linen(Net(), ROW, "training")
    with pytest.raises(
        ValueError, match="its Dropout at Dropout_0 has deterministic=False, its training mode"
    ):
        model.apply({}, {}, X, train=False, key=KEY)


def test_the_flag_that_was_found_is_logged_for_debugging(caplog):
    with caplog.at_level(logging.DEBUG, "metalearn.models"):
        Linen(linen(["is_training"]), ROW)
    assert "Linen(module=Net): its mode of training is set by is_training" in caplog.text


def test_a_mode_that_is_a_function_shows_its_name():
    assert "mode=no_flag" in repr(Linen(linen(["train"]), ROW, no_flag))
    assert "mode=None" in repr(Linen(linen([]), ROW))


# Whole networks of users, with other names, in both modes.


def test_an_nnx_module_is_evaluated_with_its_running_statistics_and_no_dropout():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    model = NNX(Net)
    params, state = model.init(KEY)
    outputs, state = model.apply(params, state, X, train=True, key=KEY)
    assert (outputs == 0).any()
    evaluated, same = model.apply(params, state, X, train=False, key=KEY)
    mean, var = state["norm"]["mean"], state["norm"]["var"]
    np.testing.assert_allclose(
        evaluated, (X - mean[None]) / jnp.sqrt(var + 1e-5)[None], rtol=1e-5, atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, same["norm"], state["norm"])


class Instance(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 3, rngs=rngs)


WRONG = {
    "an NNX instance to Haiku": (
        lambda: Haiku(Instance(nnx.Rngs(0)), ROW),
        r"not an NNX module, `Instance`. Write `NNX\(lambda rngs: Net\(..., rngs=rngs\)\)`",
    ),
    "a transformed function to NNX": (
        lambda: NNX(hk.transform(lambda x: x)),
        r"not a Haiku network, `Transformed`. Write `Haiku\(forward, inputs\)`, from the function",
    ),
    "a transformed function to Linen": (
        lambda: Linen(hk.transform_with_state(lambda x: x), ROW),
        r"not a Haiku network, `TransformedWithState`. Write `Haiku\(",
    ),
    "an NNX instance as a function": (
        lambda: Functions(Instance(nnx.Rngs(0)), lambda params, x: x),
        r"not an NNX module, `Instance`. Write `NNX\(lambda rngs",
    ),
    "a transformed function as a function": (
        lambda: Functions(lambda key: {}, hk.transform(lambda x: x)),
        r"not a Haiku network, `Transformed`. Write `Haiku\(",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_network_of_another_library_is_sent_to_its_adapter(name):
    make, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        make()
