"""LeNet and the residual networks: the same in three libraries, and twice differentiable."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn._utils.trees import paths, size
from metalearn.models import (
    NNX,
    Haiku,
    Linen,
    Precision,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)
from metalearn.models.convolution import batch_statistics, convolve, normalized
from metalearn.models.layouts import wide_blocks
from tests.cases import LIBRARIES, Float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
SMALL = (6, 5, 2)


def network(library, name, image, outputs=10, **options):
    inputs = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    if library == "linen":
        return Linen(getattr(linen_networks, name)(outputs, **options), inputs, train_flag)
    if library == "nnx":
        build = getattr(nnx_networks, name)
        return NNX(lambda rngs: build(image, outputs, **options, rngs=rngs), train_flag)
    build = getattr(haiku_networks, name)
    return Haiku(lambda x, train: build(outputs, **options)(x, train), inputs, train_flag)


def test_batch_statistics_of_bfloat16_are_not_lost_in_rounding():
    x = (3 + 0.3 * jax.random.normal(KEY, (2000, 4))).astype(jnp.bfloat16)
    mean, variance = batch_statistics(x)
    rows = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-3)
    outputs = normalized(x, mean, variance, *jnp.ones((2, 4), jnp.bfloat16))
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(outputs, np.float64).std(0), 1, rtol=0.01)


@pytest.mark.parametrize("method", ["patches", "lax"])
def test_images_and_a_kernel_of_two_types_are_convolved_in_the_wider_one(method):
    image, kernel = jnp.ones((1, 4, 4, 2), jnp.float32), jnp.ones((3, 3, 2, 5), jnp.bfloat16)
    for a, b in ((image, kernel), (image.astype(jnp.bfloat16), kernel.astype(jnp.float32))):
        outputs = convolve(a, b, method=method)
        assert outputs.dtype == jnp.float32 and outputs[0, 1, 1, 0] == 18


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compute": jnp.bfloat16}, {"params": jnp.bfloat16}], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_network_in_bfloat16_goes_on_with_its_statistics(library, options):
    model = Precision(
        network(library, "ConvNet", (8, 8, 1), blocks=2, convolution="lax"), **options
    )
    params, state = model.init(KEY)
    x = images(4, (8, 8, 1)).astype(jnp.float32)
    _, after = model.apply(params, state, x, train=True, key=KEY)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    outputs, _ = model.apply(params, after, x, train=False)
    assert jnp.isfinite(outputs).all()


def images(n, shape):
    return jax.random.normal(jax.random.key(2), (n, *shape), jnp.float32)


def generic(params):
    """Fill by shape: the same in all libraries, as kernels differ in shape and biases are alike."""
    return jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params
    )


# With w = 1, a 3x3 convolution of a to b features has 9ab parameters, a normalisation 2a:
#   stem             9*3*16                                            =     432
#   group 1, twice   (32 + 9*16*16) * 2                    =  4,672, * 2 =   9,344
#   group 2, first   32 + 9*16*32 + 64 + 9*32*32 + 16*32   = 14,432
#            second  (64 + 9*32*32) * 2                    = 18,560      =  32,992
#   group 3, first   64 + 9*32*64 + 128 + 9*64*64 + 32*64  = 57,536
#            second  (128 + 9*64*64) * 2                   = 73,984      = 131,520
#   norm and head    128 + 64*10 + 10                                  =     778
WRN_16_1 = 432 + 9_344 + 32_992 + 131_520 + 778
# LeNet: 25*6 + 6, 25*6*16 + 16, 5*5*16*120 + 120, 120*84 + 84, 84*10 + 10.
LENET = 156 + 2_416 + 48_120 + 10_164 + 850
# ResNet-12: a block of a to b features has 9ab + 2 * 9bb + ab weights, four normalisations of 2b.
#   3 to 64       10*3*64 + 18*64*64 + 8*64          =     76,160
#   64 to 160     10*64*160 + 18*160*160 + 8*160     =    564,480
#   160 to 320    10*160*320 + 18*320*320 + 8*320    =  2,357,760
#   320 to 640    10*320*640 + 18*640*640 + 8*640    =  9,425,920
#   head          640*10 + 10
RESNET_12 = 76_160 + 564_480 + 2_357_760 + 9_425_920 + 6_410
TINY = {"filters": (2, 3)}  # two blocks


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("name", "image", "parameters"),
    [
        ("WideResNet", (32, 32, 3), WRN_16_1),
        ("LeNet", (28, 28, 1), LENET),
        ("ResNet12", (32, 32, 3), RESNET_12),
    ],
)
def test_a_network_has_the_parameters_counted_by_hand(library, name, image, parameters):
    model = network(library, name, image)
    params, state = jax.eval_shape(model.init, KEY)
    assert size(params) == parameters
    x = jax.ShapeDtypeStruct((7, *image), jnp.float32)
    outputs, new = jax.eval_shape(functools.partial(model.apply, train=True), params, state, x)
    assert outputs.shape == (7, 10) and outputs.dtype == jnp.float32
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_those_counts_are_the_published_ones():
    assert (WRN_16_1, LENET) == (175_066, 61_706)


@pytest.mark.parametrize(
    ("name", "image", "options", "train"),
    quick(
        [
            ("WideResNet", SMALL, {"depth": 10, "width": 2}, True),
            ("WideResNet", SMALL, {"depth": 10}, False),
            ("LeNet", (13, 12, 2), {}, True),
            ("ResNet12", (6, 5, 2), TINY, True),
            ("ResNet12", (6, 5, 2), TINY, False),
        ],
        lambda name, image, options, train: name == "LeNet",
    ),
)
def test_the_networks_of_all_libraries_compute_the_same(name, image, options, train):
    outputs = {}
    for library in LIBRARIES:
        model = Float64(network(library, name, image, 3, **options))
        params, state = jax.jit(model.init)(KEY)
        apply = jax.jit(functools.partial(model.apply, train=train))
        outputs[library], _ = apply(generic(params), state, images(4, image))
    assert outputs["linen"].shape == (4, 3) and jnp.isfinite(outputs["linen"]).all()
    assert (jnp.ptp(outputs["linen"], axis=0) > 1e-3).all()
    for library in ("nnx", "haiku"):
        np.testing.assert_allclose(outputs[library], outputs["linen"], rtol=1e-7)


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "nnx"))
@pytest.mark.slow
def test_batch_statistics_change_in_training_and_are_used_out_of_it(library):
    model = network(library, "WideResNet", SMALL, depth=10, momentum=0.5)
    params, state = jax.jit(model.init)(KEY)
    train, evaluate = (jax.jit(functools.partial(model.apply, train=t)) for t in (True, False))
    x = 3 + images(4, SMALL)
    _, new = train(params, state, x)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new, state)
    assert len(jax.tree.leaves(moved)) == 2 * 7 and all(jax.tree.leaves(moved))
    before, same = evaluate(params, state, x)
    after, kept = evaluate(params, new, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (same, kept), (state, new)))
    assert (before != after).any()


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "nnx"))
def test_initial_kernels_are_those_of_he(library):
    model = network(library, "WideResNet", SMALL, depth=10)
    params, _ = jax.jit(model.init)(KEY)
    (kernel,) = (leaf for leaf in jax.tree.leaves(params) if leaf.shape == (3, 3, 64, 64))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "method"), [("linen", "patches"), ("nnx", "lax"), ("haiku", "lax")]
)
def test_forward_over_reverse_agrees_with_reverse_over_reverse(library, method):
    model = network(library, "WideResNet", SMALL, 3, depth=10, convolution=method)
    params, state = jax.jit(model.init)(KEY)
    flat, unravel = ravel_pytree(params)
    direction, x = jax.random.normal(KEY, flat.shape, flat.dtype), images(4, SMALL)

    def loss(flat):
        outputs, _ = model.apply(unravel(flat), state, x, train=True)
        return -jax.nn.log_softmax(outputs)[:, 1].mean()

    def forward(flat):
        return jax.jvp(jax.grad(loss), (flat,), (direction,))[1]

    def reverse(flat):
        return jax.grad(lambda flat: jax.grad(loss)(flat) @ direction)(flat)

    ours, theirs = jax.jit(forward)(flat), jax.jit(reverse)(flat)
    assert ours.dtype == jnp.float32 and jnp.isfinite(ours).all()
    assert jnp.linalg.norm(ours) > 1e-3
    assert jnp.linalg.norm(ours - theirs) < 1e-4 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["WideResNet", "LeNet"])
def test_the_convolution_method_reaches_every_convolution(library, name):
    def convolutions(method):
        model = network(library, name, (12, 12, 1), convolution=method)
        params, state = jax.eval_shape(model.init, KEY)
        apply = functools.partial(model.apply, train=True)
        x = jnp.zeros((2, 12, 12, 1), jnp.float32)
        return str(jax.make_jaxpr(apply)(params, state, x)).count("conv_general_dilated[")

    assert convolutions("patches") == 0
    assert convolutions("lax") == {"LeNet": 2, "WideResNet": 1 + 12 + 2}[name]


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")  # JAX may append a note


@pytest.mark.parametrize(
    ("depth", "near"), [(15, "10 or 16"), (17, "16 or 22"), (4, "10"), (-3, "10")]
)
def test_a_depth_that_is_not_6n_plus_4_is_refused_with_the_nearest(depth, near):
    message = (
        f"`WideResNet` got depth={depth}, but its depth is 6n + 4: three groups of n blocks of two "
        f"convolutions, and four layers more. Pass depth={near}."
    )
    with refused(message):
        wide_blocks(depth, 1)


def test_a_depth_that_no_memory_holds_is_refused():
    with refused("`WideResNet(depth=600000004)`: it is 60"):
        wide_blocks(6 * 10**8 + 4, 1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_refuses_a_wrong_depth(library):
    with pytest.raises(ValueError, match=r"^`WideResNet` got depth=12, .*depth=10 or 16\."):
        network(library, "WideResNet", SMALL, depth=12).init(KEY)


def test_a_width_below_one_is_refused():
    message = (
        "`WideResNet` got width=0, but it multiplies 16, 32 and 64 features. Pass a positive "
        "integer, such as width=1."
    )
    with refused(message):
        wide_blocks(16, 0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_lenet_refuses_an_image_that_its_pools_would_use_up(library):
    message = (
        "`LeNet` got images of 8 x 28, of which its convolutions and pools leave nothing. Pad or "
        "enlarge them to 12 x 12 at least, or take a `ConvNet`."
    )
    with refused(message):
        network(library, "LeNet", (8, 28, 1)).init(KEY)


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "nnx"))
@pytest.mark.parametrize(
    ("name", "image", "embedding", "options"),
    [
        ("MLP", (4, 1, 1), (7, 5), {"hidden": (5,)}),
        ("ConvNet", (8, 8, 1), (7, 6), {"filters": 6, "blocks": 3}),
        ("ConvNet", (9, 8, 1), (7, 2 * 2 * 6), {"filters": 6, "blocks": 2, "pool": True}),
        ("LeNet", (12, 12, 1), (7, 84), {}),
        ("WideResNet", (4, 4, 1), (7, 64), {"depth": 10}),
        ("ResNet12", (4, 4, 1), (7, 3), TINY),
    ],
)
def test_without_outputs_a_network_ends_in_an_embedding(library, name, image, embedding, options):
    if (library, name) == ("nnx", "MLP"):  # it is told how many numbers an input has
        image, shape = 4, (4, 1, 1)
        build = functools.partial(nnx_networks.MLP, image, None, **options)
        model = NNX(lambda rngs: build(rngs=rngs), train_flag)
    else:
        model, shape = network(library, name, image, None, **options), image
    params, state = jax.eval_shape(model.init, KEY)
    x = jax.ShapeDtypeStruct((7, *shape), jnp.float32)
    outputs, _ = jax.eval_shape(functools.partial(model.apply, train=True), params, state, x)
    assert outputs.shape == embedding
    assert not any("head" in path for path in paths(params))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("name", "options", "pools"),
    [("ConvNet", {"blocks": 4, "pool": True}, 4), ("ResNet12", {"filters": (2, 2, 2, 2)}, 4)],
)
def test_a_network_too_deep_for_the_image_is_refused(library, name, options, pools):
    message = (
        f"`{name}` got images of 8 x 28, of which {pools} poolings leave nothing: it is too deep "
        "for them. Take 3 blocks at most, or images of 16 x 16 at least."
    )
    with refused(message):
        network(library, name, (8, 28, 1), **options).init(KEY)
