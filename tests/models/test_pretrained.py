"""Parameters from elsewhere find their places by name, or the report says what does not match."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn.algorithms import MAML
from metalearn.models import Functions, match, with_params
from tests.cases import conv_net

KEY = jax.random.key(0)
TREE = {"body": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "head": jnp.zeros(3)}
VALUES = {
    "body": {"kernel": np.arange(6).reshape(2, 3), "bias": np.ones(3)},
    "head": np.full(3, 2.0),
}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "params",
    [
        VALUES,
        {"body/kernel": VALUES["body"]["kernel"], "body/bias": np.ones(3), "head": np.full(3, 2)},
        {"body.kernel": VALUES["body"]["kernel"], "body.bias": np.ones(3), "head": np.full(3, 2)},
    ],
    ids=["nested", "slashes", "dots"],
)
def test_values_find_their_places_by_name_in_the_dtype_of_the_place(params):
    result = with_params(TREE, params)
    equal(result, jax.tree.map(jnp.asarray, VALUES))
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype("float32")}


def test_parameters_go_into_the_eta_of_maml_under_their_own_names():
    algorithm = MAML(Functions(lambda key: TREE, lambda p, x: x), learned_rates=0.1)
    eta = algorithm.init(KEY)
    result = with_params(eta, VALUES)
    equal(result.params, jax.tree.map(jnp.asarray, VALUES))
    equal(result.rates, eta.rates)


MISMATCHES = {
    "a name that is not there": (
        {**VALUES, "heed": np.ones(3)},
        "`with_params`: the names do not match. 3 of 3 parameters were given. Given, with no "
        "place: heed.",
    ),
    "a misspelt name": (
        {"body": VALUES["body"], "heed": np.ones(3)},
        "2 of 3 parameters were given. Not given: head. Given, with no place: heed (is it head?).",
    ),
    "another shape": (
        {**VALUES, "head": np.ones(4)},
        "3 of 3 parameters were given. Of another shape: head is [3], given [4]. Leave those of "
        "another shape, such as a head of other classes, out of what you give, with "
        "`partial=True`: they stay as the target has them.",
    ),
    "a missing one": (
        {"body": VALUES["body"]},
        "2 of 3 parameters were given. Not given: head. To leave those as they are: "
        "`partial=True`.",
    ),
    "none at all": ({"encoder": np.ones(3)}, "0 of 3 parameters were given. Not given: body/bias"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_names_that_do_not_match_are_refused_with_the_report(name):
    params, message = MISMATCHES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        with_params(TREE, params)
    with pytest.raises(ValueError, match=re.escape(message)):
        with_params(Functions(lambda key: TREE, lambda p, x: x), params)


def test_a_part_of_the_parameters_is_enough_where_that_is_said(caplog):
    with caplog.at_level(logging.INFO, "metalearn.models"):
        result = with_params(TREE, {"body": VALUES["body"]}, partial=True)
    equal(result["head"], TREE["head"])
    equal(result["body"]["bias"], jnp.ones(3))
    assert "2 of 3 parameters were given. Not given: head." in caplog.text
    assert match(TREE, {"head": np.ones(3)}).matched == {"head": "head"}


def test_a_part_of_a_tree_whose_names_fit_is_no_whole():
    tree = {"body": {"a": jnp.zeros(2), "b": jnp.zeros(3)}, "head": jnp.zeros(1)}
    part = {"a": np.ones(2), "b": np.ones(3)}
    message = "2 of 3 parameters were given. Not given: head. To leave those as they are:"
    with pytest.raises(ValueError, match=re.escape(message)):
        with_params(tree, part)
    with pytest.raises(ValueError, match=re.escape(message)):
        with_params(Functions(lambda key: tree, lambda p, x: x), part)
    equal(with_params(tree, part, partial=True), {"body": part, "head": jnp.zeros(1)})


def test_whole_names_come_before_those_of_a_part():
    tree = {"Dense": {"k": jnp.zeros(2)}, "Block": {"Dense": {"k": jnp.zeros(2)}}}
    found = with_params(tree, {"Dense": {"k": np.ones(2)}}, partial=True)
    equal(found, {"Dense": {"k": jnp.ones(2)}, "Block": {"Dense": {"k": jnp.zeros(2)}}})
    eta = MAML(Functions(lambda key: [jnp.zeros(2)], lambda p, x: x), learned_rates=0.1).init(KEY)
    with pytest.raises(ValueError, match="fit under 'params/' and 'rates/' of the target alike"):
        with_params(eta, [np.ones(2)])
    found = with_params(eta, {"params": [np.ones(2)]})  # the rates stay
    equal((found.params, found.rates), ([jnp.ones(2)], eta.rates))


def test_names_that_fit_two_parts_are_refused():
    tree = {"first": {"a": jnp.zeros(2)}, "second": {"a": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="names fit under 'first/' and 'second/' of the target"):
        with_params(tree, {"a": np.ones(2)}, partial=True)


def test_a_report_may_be_of_a_model():
    model = Functions(lambda key: TREE, lambda p, x: x)
    assert str(match(model, VALUES)) == "3 of 3 parameters were given."


def test_a_long_report_counts_what_it_leaves_out():
    tree = {f"layer{i}": jnp.ones(1) for i in range(20)}
    assert str(match(tree, {})).endswith("layer15, and 12 more.")


@pytest.mark.slow
def test_a_model_begins_with_given_parameters_and_a_given_state():
    model = conv_net("linen")
    params, state = model.init(jax.random.key(5))
    moved = jax.tree.map(lambda x: x + 1, state)
    pretrained = with_params(model, params, state=moved)
    equal(pretrained.init(KEY), (params, moved))
    with pytest.raises(ValueError, match=r"^`with_params\(state=\)`: the model's state is"):
        with_params(model, params, state={})
    assert "6 arrays" in repr(pretrained)
