"""The transformer: what it may see, what it holds, and how it may be differentiated."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree

from metalearn import MixedFlow, Reverse, Unroll
from metalearn._utils.trees import paths, size
from metalearn.models import (
    NNX,
    Architecture,
    BlockedAttention,
    Haiku,
    Linen,
    causal_attention,
    haiku_networks,
    linen_networks,
    nnx_networks,
    train_flag,
)
from metalearn.models.attention import rotate
from metalearn.models.transformer import SIZES
from tests.cases import LIBRARIES, Float64, to_float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
TINY = Architecture(vocabulary=7, width=8, layers=3, heads=2)
SHAPES = {
    "rms": TINY,
    "layer": dataclasses.replace(TINY, norm="layer", activation=jax.nn.silu),
    "tied": dataclasses.replace(TINY, tied=True, hidden=12),
    "narrow heads": dataclasses.replace(TINY, heads=3, head_dim=2),
    "gated": dataclasses.replace(
        TINY, heads=4, kv_heads=2, gated=True, biases=("query", "gate", "down")
    ),
    "learned positions": dataclasses.replace(TINY, positions="learned", context=6, epsilon=1e-5),
    "blocked": dataclasses.replace(TINY, attention=BlockedAttention(2)),
}
KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
TARGETS = jnp.roll(TOKENS, -1, axis=1)


def generic(architecture, key=KEY):
    """Parameters in float64, of which none is zero."""
    flat, unravel = ravel_pytree(to_float64(jax.jit(architecture.init)(key)))
    return unravel(flat + 0.1 * jax.random.normal(jax.random.key(2), flat.shape))


def cross_entropy(architecture, params, tokens=TOKENS, targets=TARGETS):
    logits = architecture.apply(params, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def gradient(architecture):
    return jax.grad(functools.partial(cross_entropy, architecture))


def assert_close(ours, theirs, tolerance=1e-12):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
    assert ours.dtype == np.float64
    assert jnp.linalg.norm(ours - theirs) <= tolerance * jnp.linalg.norm(theirs)


# What a position may see.


@pytest.mark.parametrize("name", quick(SHAPES, lambda name: name in ("gated", "rms")))
@pytest.mark.slow
def test_a_token_changes_its_own_logits_and_later_ones_alone(name):
    params = generic(SHAPES[name])
    apply = jax.jit(SHAPES[name].apply)
    before, after = (apply(params, tokens) for tokens in (TOKENS, TOKENS.at[:, 3].add(1) % 7))
    changed = (before != after).any((0, 2))
    assert changed.tolist() == [False, False, False, True, True]


def test_attention_is_a_softmax_over_the_past():
    q, k, v = jax.random.normal(KEY, (3, 1, 4, 1, 2))
    out = causal_attention(q, k, v)
    for t in range(4):
        scores = np.exp(k[0, : t + 1, 0] @ q[0, t, 0] / np.sqrt(2))
        expected = scores @ np.asarray(v[0, : t + 1, 0]) / scores.sum()
        np.testing.assert_allclose(out[0, t, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("block", quick([1, 2, 3, 5, 8], lambda block: block in (2, 8)))
def test_blocked_attention_is_the_same_to_second_order(block):
    q, k, v = jax.random.normal(KEY, (3, 2, 5, 2, 4))

    def both_orders(attention):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v)))

        first = jax.grad(loss, (0, 1, 2))
        return first(q, k, v), jax.jvp(first, (q, k, v), (k, v, q))[1]

    ours = jax.jit(both_orders, static_argnums=0)(BlockedAttention(block))
    assert_close(ours, jax.jit(both_orders, static_argnums=0)(causal_attention))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_attention_has_finite_derivatives_of_both_orders_in_float32(scale):
    q, k, v = scale * jax.random.normal(KEY, (3, 1, 4, 2, 2), jnp.float32)
    first = jax.grad(lambda q: causal_attention(q, k, v).sum())
    value, second = jax.jvp(first, (q,), (jnp.ones_like(q),))
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value).all() and jnp.isfinite(second).all()


def test_a_product_of_rotated_vectors_depends_on_their_distance_alone():
    q, k = (jnp.tile(x, (1, 9, 1, 1)) for x in jax.random.normal(KEY, (2, 1, 1, 1, 6)))
    products = np.einsum("td,sd->ts", rotate(q)[0, :, 0], rotate(k)[0, :, 0])
    for shift in range(-8, 9):
        along = np.diagonal(products, shift)
        np.testing.assert_allclose(along, along[0], rtol=1e-12)
    assert abs(products[0, 0] - products[0, 1]) > 1e-3
    np.testing.assert_array_equal(rotate(q)[:, 0], q[:, 0])


# One function, three libraries.


def language_model(library, architecture):
    inputs = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    if library == "linen":
        return Linen(linen_networks.Transformer(architecture), inputs, train_flag)
    if library == "nnx":
        return NNX(lambda rngs: nnx_networks.Transformer(architecture, rngs=rngs), train_flag)
    return Haiku(
        lambda x, train: haiku_networks.Transformer(architecture)(x, train), inputs, train_flag
    )


@pytest.mark.parametrize("name", quick(["layer", "tied"], lambda name: name == "layer"))
@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library != "haiku"))
def test_every_library_declares_the_same_parameters_and_computes_the_same(library, name):
    architecture, expected = SHAPES[name], generic(SHAPES[name])
    model = Float64(language_model(library, architecture))
    params, state = jax.jit(model.init)(KEY)
    assert [path.split("/")[-1] for path in paths(params)] == sorted(architecture.declare())
    assert size(params) == size(expected) == architecture.parameters
    params = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(expected))
    logits, _ = model.apply(params, state, TOKENS, train=True)
    assert_close(logits, architecture.apply(expected, TOKENS))


def test_a_new_model_is_near_the_uniform_distribution():
    wide = Architecture(vocabulary=64, width=128, layers=4, heads=4, hidden=64)
    params = jax.jit(wide.init)(KEY)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    tokens = jax.random.randint(KEY, (8, 16), 0, 64)
    targets = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    # Logits of unit variance cost half a nat more than uniform ones.
    loss = jax.jit(functools.partial(cross_entropy, wide))(params, tokens, targets)
    assert abs(loss - np.log(64)) < 0.8


# The published sizes.


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_what_its_name_says_but_for_the_relative_positions(name):
    architecture = SIZES[name]
    shapes = jax.eval_shape(architecture.init, KEY)
    assert size(shapes) == architecture.parameters
    positions = (
        architecture.layers * architecture.width * architecture.heads * (architecture.head_size)
    )
    published = 1e6 * float(name.removesuffix("M"))
    assert abs(architecture.parameters + positions - published) < 0.008 * published
    assert 0.92 * published < architecture.parameters < 0.96 * published


# Derivatives, and what is held for them.


REMATS = [("block", "rms"), ("block", "layer"), ("block", "blocked"), ("dots", "tied")]


# A Hessian product is compared with "block" below.
@pytest.mark.parametrize(("remat", "name"), quick(REMATS, lambda remat, _: remat == "dots"))
def test_remat_changes_no_gradient(remat, name):
    params = generic(SHAPES[name])
    remade = dataclasses.replace(SHAPES[name], remat=remat)
    assert_close(jax.jit(gradient(remade))(params), jax.jit(gradient(SHAPES[name]))(params))


@functools.cache
def hessian_product_backward():
    """A gradient of <gradient, u>: (params, u, the product)."""
    params, tangent = generic(TINY), generic(TINY, jax.random.key(5))

    def along(params):
        pairs = jax.tree.map(lambda g, u: jnp.sum(g * u), gradient(TINY)(params), tangent)
        return sum(jax.tree.leaves(pairs))

    return params, tangent, jax.jit(jax.grad(along))(params)


@pytest.mark.parametrize("remat", quick(["none", "block", "dots"], lambda r: r == "block"))
@pytest.mark.slow
def test_a_hessian_product_is_the_same_forward_and_backward(remat):
    params, tangent, expected = hessian_product_backward()
    grad = gradient(dataclasses.replace(TINY, remat=remat))
    forward = jax.jit(lambda params: jax.jvp(grad, (params,), (tangent,))[1])
    assert_close(forward(params), expected)


def equations(jaxpr):
    """Yield all equations of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_a_deeper_model_is_not_a_longer_program():
    counts, lengths = [], []
    for layers in (2, 24):
        deep = dataclasses.replace(TINY, layers=layers)
        params = jax.eval_shape(deep.init, KEY)
        found = list(equations(jax.make_jaxpr(deep.apply)(params, TOKENS).jaxpr))
        counts.append(len(found))
        lengths.append([e.params["length"] for e in found if e.primitive.name == "scan"])
    assert counts[0] == counts[1]
    assert lengths == [[2], [24]]


@functools.cache
def temporaries(layers, remat):
    """Bytes of temporaries of a compiled gradient."""
    deep = Architecture(7, 16, layers, heads=2, remat=remat)
    params = jax.eval_shape(deep.init, KEY)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    grad = jax.grad(lambda params, x: cross_entropy(deep, params, x, x))
    return jax.jit(grad).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_with_block_remat_memory_hardly_grows_with_depth():
    growth = {remat: temporaries(12, remat) - temporaries(4, remat) for remat in ("none", "block")}
    assert growth["block"] < growth["none"] / 8


def test_dots_keeps_products_with_weights_and_not_the_scores():
    plain, dots, block = (temporaries(12, remat) for remat in ("none", "dots", "block"))
    assert 1.5 * block < dots < plain / 1.5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_bfloat16_computes_in_half_precision_and_returns_float32(remat):
    half = dataclasses.replace(TINY, dtype=jnp.bfloat16, remat=remat)
    params = half.init(KEY)
    program = str(jax.make_jaxpr(half.apply)(params, TOKENS))
    assert re.search(r"bf16\[.*\] = dot_general", program)
    assert not re.search(r"f64", program)
    logits, exact = half.apply(params, TOKENS), TINY.apply(params, TOKENS)
    assert logits.dtype == exact.dtype == jnp.float32
    assert 1e-4 < jnp.abs(logits - exact).max() / jnp.abs(exact).max() < 0.1
    grads = jax.jit(gradient(half))(params)
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in grads.values())


# Errors.

WRONG = {
    "heads": (
        {"width": 10, "heads": 3},
        "A width of 10 does not divide into 3 heads. Choose a multiple, or say how wide a head "
        "is with `head_dim`.",
    ),
    "odd": (
        {"head_dim": 3},
        "Rotary positions turn pairs of features, but a head has 3 of them. Choose another "
        "number of heads, or an even `head_dim`.",
    ),
    "norm": ({"norm": "batch"}, "No norm is called 'batch'. There are: layer, rms."),
    "remat": ({"remat": "blocks"}, "No remat is called 'blocks'. Did you mean 'block'?"),
    "layers": ({"layers": 0}, "`Architecture(layers=0)` must be at least 1."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_shape_that_cannot_be_is_refused(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataclasses.replace(TINY, **change)


def test_a_block_of_no_queries_is_refused():
    with pytest.raises(ValueError, match=r"`BlockedAttention\(block=0\)` must be at least 1\."):
        BlockedAttention(0)


@pytest.mark.parametrize("tokens", [jnp.zeros((2, 5)), jnp.zeros(5, int), jnp.zeros((2, 5), bool)])
def test_what_is_no_batch_of_token_sequences_is_refused(tokens):
    message = f"reads tokens as integers [batch, S], but got {tokens.dtype}{list(tokens.shape)}."
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.apply(TINY.init(KEY), tokens)


# Attention with a derivative rule of its own, as fused kernels have, under the engines.


def fused(forward=lambda x: x, backward=lambda x: x):
    """An attention with its own rule; `forward` and `backward` stand for its kernels."""

    def pull(residuals, cotangent):
        return tuple(map(backward, jax.vjp(causal_attention, *residuals)[1](cotangent)))

    attention = jax.custom_vjp(lambda q, k, v: forward(causal_attention(q, k, v)))
    attention.defvjp(lambda q, k, v: (forward(causal_attention(q, k, v)), (q, k, v)), pull)
    return attention


def called_back(x):
    """A kernel without any derivative: JAX cannot see into it."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.asarray, shape, x, vmap_method="sequential")


@jax.custom_vjp
def ruled(x):
    """A kernel with a VJP of its own, and so without a JVP."""
    return x


ruled.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))


def lower(engine, attention, remat):
    """Lower a meta-gradient; what cannot be differentiated is found by then."""
    return jax.jit(functools.partial(meta_gradient, engine, attention, remat)).lower(jnp.zeros(()))


def meta_gradient(engine, attention, remat, log_rate):
    architecture = dataclasses.replace(TINY, layers=2, attention=attention, remat=remat)
    loss = functools.partial(cross_entropy, architecture)
    params = generic(architecture)

    def step(log_rate, params, _, grad):
        return jax.tree.map(lambda p, g: p - jnp.exp(log_rate) * g, params, grad(loss)(params))

    def start(log_rate):  # of eta, so that its step needs a Hessian product
        return jax.tree.map(lambda p: jnp.exp(log_rate) * p, params)

    unroll = Unroll(start, step, lambda _, params: (loss(params), {}))
    return engine.value_and_grad(unroll, log_rate, jnp.arange(1))[1]


@functools.cache
def reverse_of_plain_attention():
    meta = functools.partial(meta_gradient, Reverse(), causal_attention, "none")
    return jax.jit(meta)(jnp.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_mixed_flow_pushes_through_a_rule_whose_parts_have_a_jvp(remat):
    ours = jax.jit(functools.partial(meta_gradient, MixedFlow(), fused(), remat))
    assert_close(ours(jnp.zeros(())), reverse_of_plain_attention())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_mixed_flow_is_exact_where_a_rule_has_no_jvp(part):
    """A `custom_vjp` within a rule: its inner gradients are taken by reverse over reverse."""
    engine, attention = MixedFlow(), fused(**{part: ruled})
    ours = jax.jit(functools.partial(meta_gradient, engine, attention, "block"))(jnp.zeros(()))
    assert_close(ours, reverse_of_plain_attention())


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_mixed_flow_refuses_a_kernel_without_a_derivative_by_name(part, remat):
    message = (
        r"by reverse over reverse, since functions .* \(`<lambda>` \(test_transformer.py:\d+\): "
        ".*Pure callbacks do not support JVP.* No engine can differentiate it.*written in JAX"
    )
    with pytest.raises(TypeError, match=message):
        lower(MixedFlow(), fused(**{part: called_back}), remat)


@pytest.mark.slow
def test_reverse_takes_a_rule_within_a_rule_but_no_callback_either():
    lower(Reverse(), fused(backward=ruled), "block")
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        lower(Reverse(), fused(backward=called_back), "block")
