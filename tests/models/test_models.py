"""Adapters do what their library does; the networks are the same in all three."""

import functools
import re

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from metalearn._utils.trees import size
from metalearn.models import (
    NNX,
    Functions,
    Haiku,
    Linen,
    convolution,
    deterministic_flag,
    no_flag,
    train_flag,
)
from metalearn.models.convolution import convolve, flax_convolution, max_pool
from tests.cases import IMAGE, LIBRARIES, MODELS, Float64, conv_net
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY, OTHER_KEY = jax.random.key(0), jax.random.key(1)
IMAGES = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
ROW = jax.ShapeDtypeStruct((1, 6), jnp.float32)


def images(n=5, shape=IMAGE):
    return jax.random.uniform(jax.random.key(2), (n, *shape), jnp.float32)


def assert_close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-6, "atol": 1e-7, **tolerance})


def differ(a, b):
    return bool((ravel_pytree(a)[0] != ravel_pytree(b)[0]).any())


# Adapters against their libraries, on a network with state.


def test_linen_is_what_the_module_does():
    model = conv_net("linen")
    params, state = model.init(KEY)
    variables = model.module.init({"params": KEY, "dropout": KEY}, jnp.zeros((1, *IMAGE)))
    assert_close({"params": params, **state}, dict(variables))
    outputs, new = model.apply(params, state, images(), train=True)
    theirs, updated = model.module.apply(variables, images(), True, mutable=["batch_stats"])
    assert_close((outputs, new), (theirs, dict(updated)))
    assert differ(new, state)
    outputs, same = model.apply(params, new, images(), train=False)
    variables = {"params": params, **new}
    assert_close(outputs, model.module.apply(variables, images(), False))
    assert_close(same, new)


def test_nnx_is_what_the_module_does():
    model = conv_net("nnx")
    params, state = model.init(KEY)
    module = model.build(nnx.Rngs(KEY))
    assert_close(params, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    outputs, new = model.apply(params, state, images(), train=True)
    assert_close(outputs, module(images(), train=True))
    assert_close(new, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    assert differ(new, state)
    outputs, same = model.apply(params, new, images(), train=False)
    assert_close(outputs, module(images(), train=False))
    assert_close(same, new)


def test_haiku_is_what_the_transformed_function_does():
    model = conv_net("haiku")
    transformed = hk.transform_with_state(model.forward)
    params, state = model.init(KEY)
    assert_close(
        (params, state), transformed.init(KEY, jnp.zeros((1, *IMAGE), jnp.float32), train=True)
    )
    outputs, new = model.apply(params, state, images(), train=True)
    assert_close((outputs, new), transformed.apply(params, state, None, images(), train=True))
    assert differ(new, state)
    ours = model.apply(params, new, images(), train=False)
    assert_close(ours, transformed.apply(params, new, None, images(), train=False))
    assert_close(ours[1], new)


def test_functions_are_called_and_a_state_passes_through():
    model = Functions(lambda key: jax.random.normal(key, (2,)), lambda w, x: x * w)
    assert_close(model.init(KEY), (jax.random.normal(KEY, (2,)), ()))
    outputs, state = model.apply(jnp.ones(2), {"a": 1}, jnp.arange(2.0), train=True)
    assert outputs.tolist() == [0, 1] and state == {"a": 1}


def test_a_forward_pass_changes_nothing_it_was_given():
    for library in LIBRARIES:
        model = conv_net(library)
        params, state = model.init(KEY)
        before = jax.tree.map(np.array, (params, state))
        model.apply(params, state, images(), train=True)
        assert_close((params, state), before, rtol=0, atol=0)


# Dropout: its key, and its flag.


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(6)(x))


class NNXDropout(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic):
        return self.dropout(self.dense(x), deterministic=deterministic)


def haiku_dropout(x, deterministic):
    x = hk.Linear(6)(x)
    return x if deterministic else hk.dropout(hk.next_rng_key(), 0.5, x)


DROPOUT = {
    "linen": Linen(LinenDropout(), ROW, deterministic_flag),
    "nnx": NNX(NNXDropout, deterministic_flag),
    "haiku": Haiku(haiku_dropout, ROW, deterministic_flag),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_dropout_follows_the_key_and_the_flag(library):
    model = DROPOUT[library]
    params, state = model.init(KEY)
    x = jnp.ones((4, 6), jnp.float32)

    def outputs(train, key):
        return model.apply(params, state, x, train=train, key=key)[0]

    once, again, other = (outputs(True, key) for key in (KEY, KEY, OTHER_KEY))
    assert (once == again).all() and differ(once, other)
    assert 0 < (once == 0).mean() < 1
    still, too = outputs(False, KEY), outputs(False, OTHER_KEY)
    assert (still == too).all() and (still != 0).all()
    np.testing.assert_allclose(once[once != 0], 2 * still[once != 0], rtol=1e-6)


def test_flags_are_what_they_are_called():
    flags = [[dict(mode(train)) for train in (True, False)] for mode in (train_flag, no_flag)]
    assert flags == [[{"train": True}, {"train": False}], [{}, {}]]
    assert dict(deterministic_flag(True)) == {"deterministic": False}


# The networks.


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("pool", [False, True])
def test_the_omniglot_network_has_the_parameters_of_the_paper(library, pool):
    model = conv_net(library, (28, 28, 1), outputs=5, filters=64, blocks=4, pool=pool)
    params, _ = jax.eval_shape(model.init, KEY)
    assert size(params) == 112_261


@pytest.mark.parametrize("pool", quick([False, True], lambda pool: pool))
def test_the_networks_of_all_libraries_compute_the_same(pool):
    options = {"image": (8, 6, 2), "outputs": 3, "filters": 4, "blocks": 1, "pool": pool}
    x, outputs = images(4, (8, 6, 2)), {}

    def generic(leaf):  # by shape: kernels differ in it, biases are alike
        return jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape)

    for library in LIBRARIES:
        model = Float64(conv_net(library, **options))
        params, state = jax.jit(model.init)(KEY)
        params = jax.tree.map(generic, params)
        outputs[library], _ = jax.jit(functools.partial(model.apply, train=True))(params, state, x)
    assert_close(outputs["nnx"], outputs["linen"], rtol=1e-5)
    assert_close(outputs["haiku"], outputs["linen"], rtol=1e-5)
    assert outputs["linen"].shape == (4, 3) and differ(*outputs["linen"][:2])


@pytest.mark.parametrize("name", [f"{library}-MLP" for library in LIBRARIES])
def test_an_mlp_is_two_matrices_with_a_tanh_between(name):
    params, state = MODELS[name].init(KEY)
    x = jnp.linspace(-1, 1, 5, dtype=jnp.float32)[:, None]
    kernels = {x.shape: x for x in jax.tree.leaves(params) if x.ndim == 2}
    outputs, _ = MODELS[name].apply(params, state, x, train=True)
    assert_close(outputs, jnp.tanh(x @ kernels[1, 3]) @ kernels[3, 1])


# Convolutions and pooling against lax.

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (0, 1))], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)], ids=str)
def test_a_convolution_by_patches_is_that_of_lax_in_value_and_gradient(strides, padding):
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (2, 7, 6, 3))
    kernel = jax.random.normal(keys[1], (3, 2, 3, 4))

    def by(method):
        out, pull = jax.vjp(lambda x, k: convolve(x, k, strides, padding, method), x, kernel)
        return out, *pull(jax.random.normal(keys[2], out.shape))

    ours, lax = jax.jit(by, static_argnums=0)("patches"), jax.jit(by, static_argnums=0)("lax")
    direct = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)
    assert_close(ours, lax, rtol=1e-11, atol=1e-12)
    assert_close(ours[0], direct, rtol=1e-11, atol=1e-12)


def by_reverse(grad, kernel, x, along):
    return jax.grad(lambda k, x: jnp.vdot(grad(k, x), along), (0, 1))(kernel, x)


def by_forward(grad, kernel, x, along):
    return jax.jvp(lambda k: grad(k, x), (kernel,), (along,))


@pytest.mark.parametrize("over_reverse", [by_reverse, by_forward])
def test_second_derivatives_of_patches_with_a_kernel_per_task_are_those_of_lax(over_reverse):
    keys = jax.random.split(KEY, 3)
    kernels, along = (jax.random.normal(key, (2, 3, 3, 2, 5)) for key in keys[:2])
    x = jax.random.normal(keys[2], (2, 3, 6, 5, 2))

    def by(method):
        def loss(kernel, x):
            return (convolve(x, kernel, (2, 2), "SAME", method) ** 3).sum()

        return jax.jit(jax.vmap(functools.partial(over_reverse, jax.grad(loss))))(kernels, x, along)

    assert_close(by("patches"), by("lax"), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "product"),
    [((3, 2, 3, 4), "4,18"), ((3, 1, 1, 4), "3,4")],  # [h, w, c, features], [rows, columns]
    ids=str,
)
def test_the_gradient_for_a_kernel_is_a_product_with_the_longer_axis_last(kernel, product):
    x = jnp.ones((2, 7, 6, kernel[2]))
    gradient = jax.grad(lambda kernel: (convolve(x, kernel) ** 2).sum())
    program = jax.jit(gradient).lower(jnp.ones(kernel)).compile().as_text()
    products = re.findall(r"\[([0-9,]+)\]\S* dot\(", program)
    assert product in products
    assert ",".join(reversed(product.split(","))) not in products


def primitives(function, *args):
    return str(jax.make_jaxpr(function)(*args))


def test_a_large_image_goes_to_lax_and_a_small_one_to_a_matrix_product(monkeypatch):
    monkeypatch.setattr(convolution, "MOST_PATCHES", 8 * 8)
    kernel = jnp.ones((3, 3, 1, 2))
    small, large = jnp.ones((1, 8, 8, 1)), jnp.ones((1, 8, 9, 1))
    assert "conv_general_dilated" not in primitives(convolve, small, kernel)
    assert "conv_general_dilated" in primitives(convolve, large, kernel)


def test_an_unknown_method_is_refused_with_those_there_are():
    message = "No convolution method is called 'fft'. There are: auto, lax, patches."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convolve(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), method="fft")


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"strides": 2}, True),
        ({"strides": 2, "padding": "VALID"}, True),
        ({"feature_group_count": 2}, False),
        ({"kernel_dilation": 2}, False),
        ({"input_dilation": 2, "padding": 1}, False),
    ],
    ids=str,
)
def test_the_stand_in_of_flax_layers_is_lax_wherever_patches_cannot_go(options, plain):
    x = jax.random.normal(KEY, (2, 5, 6, 4))
    ours = nn.Conv(6, (3, 3), conv_general_dilated=flax_convolution("patches"), **options)
    params = ours.init(KEY, x)
    assert_close(ours.apply(params, x), nn.Conv(6, (3, 3), **options).apply(params, x), rtol=1e-5)
    assert ("conv_general_dilated" not in primitives(ours.apply, params, x)) == plain


def test_the_stand_in_takes_one_spatial_dimension_too():
    x = jax.random.normal(KEY, (2, 5, 4))
    ours = nn.Conv(6, (3,), conv_general_dilated=flax_convolution("patches"))
    params = ours.init(KEY, x)
    assert_close(ours.apply(params, x), nn.Conv(6, (3,)).apply(params, x), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)], ids=str)
def test_max_pool_is_reduce_window_in_value_and_gradient(shape):
    x = jax.random.normal(KEY, (2, *shape, 3))
    window = (1, 2, 2, 1)

    def theirs(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

    assert_close(max_pool(x), theirs(x), rtol=0)
    weights = jax.random.normal(OTHER_KEY, max_pool(x).shape)
    slopes = [jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (max_pool, theirs)]
    assert_close(*slopes, rtol=1e-12)
    tied = jnp.ones((1, 4, 4, 1)).at[0, 0, 1].set(2).at[0, 1, 0].set(2)
    assert_close(*(jax.grad(lambda x, f=f: f(x).sum())(tied) for f in (max_pool, theirs)))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert jnp.isnan(max_pool(x.at[:, row, column].set(jnp.nan))[:, 0, 0]).all()


def test_the_gradient_of_max_pool_is_finite_where_its_input_is_computed_twice():
    """Fused into the backward pass, and rounded in another way than in the forward pass."""
    x, scales = jax.random.uniform(KEY, (25, 16, 16, 4), jnp.float32), jnp.float32([0.5, -0.9])

    def norm(x):
        mean = x.mean((0, 1, 2))
        variance = jnp.maximum((x * x).mean((0, 1, 2)) - mean * mean, 0)
        return (x - mean[None, None, None]) * jax.lax.rsqrt(variance + 1e-5)[None, None, None]

    def outputs(x, scales):
        y = norm(x) * scales[0] + norm(x * x) * scales[1]
        return (jnp.tanh(max_pool(jnp.where(y > 0, y, 0.1 * y))) ** 2).sum()

    grads = jax.jit(jax.grad(outputs, (0, 1)))(x, scales)
    assert all(jnp.isfinite(leaf).all() for leaf in grads)
