"""What a compiled program costs: FLOPs that can be counted by hand, and XLA's own memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import MixedFlow, Reverse, Unroll
from metalearn._utils.compiling import quick_compilation
from metalearn.cost import cost, hlo, jaxpr
from metalearn.cost.convolution import Window
from metalearn.models.transformer import Architecture
from metalearn.planning.step_cost import short_repr

LAYERS, BATCH, WIDTH = 7, 32, 64
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
INPUTS = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
ONE = 2 * BATCH * WIDTH * WIDTH  # FLOPs of a layer
IMAGES = jax.ShapeDtypeStruct((4, 9, 9, 8), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)


def layer(x, w):
    return jnp.tanh(x @ w), None


def chain(weights, x, layer=layer):
    return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)


def convolved(kernel, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)
    return jnp.sum(y**2)


def counts(function, *args):
    """Return (FLOPs of the compiled program, FLOPs of the jaxpr)."""
    traced = jax.jit(function).trace(*args)
    return hlo.flops(traced.lower().compile().as_text()), jaxpr.flops(traced.jaxpr)


def test_a_scan_counts_its_body_as_often_as_it_runs():
    assert counts(chain, WEIGHTS, INPUTS) == (LAYERS * ONE, LAYERS * ONE)


def test_a_scan_in_a_scan_counts_the_product_of_their_lengths():
    def twice(weights, x):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, weights)[0], None), x, length=5)

    assert counts(twice, WEIGHTS, INPUTS) == (5 * LAYERS * ONE,) * 2


def test_a_gradient_costs_three_forward_passes_and_four_with_rematerialisation():
    gradient = jax.grad(chain, (0, 1))
    assert counts(gradient, WEIGHTS, INPUTS) == (3 * LAYERS * ONE,) * 2
    again = jax.grad(functools.partial(chain, layer=jax.checkpoint(layer)), (0, 1))
    assert counts(again, WEIGHTS, INPUTS) == (4 * LAYERS * ONE,) * 2


def test_a_batched_product_counts_every_batch():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(6, 8, 24), (6, 24, 40)])
    assert counts(lambda a, b: a @ b, a, b) == (2 * 6 * 8 * 24 * 40,) * 2


def test_a_convolution_and_its_gradients_cost_the_same_without_padding():
    # Each axis: 5 outputs of 3 positions, less one on either edge.
    expected = 2 * 4 * 16 * 8 * (5 * 3 - 2) ** 2
    assert counts(convolved, KERNEL, IMAGES) == (expected, expected)
    assert counts(jax.grad(convolved, (0, 1)), KERNEL, IMAGES) == (3 * expected, 3 * expected)


def test_convolutions_with_a_kernel_per_task_cost_as_many_single_ones():
    stacked = [jax.ShapeDtypeStruct((6, *x.shape), x.dtype) for x in (KERNEL, IMAGES)]
    gradient = jax.grad(convolved, (0, 1))
    one = counts(gradient, KERNEL, IMAGES)[0]
    assert counts(jax.vmap(gradient), *stacked) == (6 * one, 6 * one)


@pytest.mark.parametrize(
    "window", [Window(5, 3, 3), Window(7, 3, 4, 2, 1), Window(4, 3, 9, 1, 2, 2)]
)
def test_pairs_are_the_products_that_an_explicit_convolution_takes(window):
    def convolve(x, kernel):
        high = (window.outputs - 1) * window.stride + window.kernel - window.low
        high -= (window.inputs - 1) * window.input_dilation + 1
        return jax.lax.conv_general_dilated(
            *(x[None, None], kernel[None, None], (window.stride,), [(window.low, high)]),
            lhs_dilation=(window.input_dilation,),
        )[0, 0]

    ones = convolve(np.ones(window.inputs, np.float32), np.ones(window.kernel, np.float32))
    assert ones.shape == (window.outputs,)
    assert window.pairs() == int(ones.sum())


def test_a_conditional_counts_its_dearest_branch():
    def branched(flag, w, x):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: jnp.tanh(x @ w))

    weight = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    assert counts(branched, jnp.array(True), weight, INPUTS) == (2 * ONE, 2 * ONE)


def test_a_loop_of_unknown_length_is_counted_once_with_a_warning():
    def until(weights, x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ weights[0], x)

    message = "a step, and they are counted once. A `lax.scan`"
    traced = jax.jit(until).trace(WEIGHTS, INPUTS)
    with pytest.warns(
        UserWarning, match=f"^A loop whose number of steps .* {ONE:,} FLOPs {message}"
    ):
        assert cost(jax.jit(until), WEIGHTS, INPUTS).flops == ONE
    with pytest.warns(UserWarning, match=message):
        assert jaxpr.flops(traced.jaxpr) == ONE


def test_dead_code_of_a_jaxpr_costs_nothing():
    def half_used(weights, x):
        carried, _products = jax.lax.scan(lambda x, w: (x, x @ w), x, weights)
        return carried

    assert jaxpr.flops(jax.make_jaxpr(half_used)(WEIGHTS, INPUTS)) == 0


CUBLAS = """
ENTRY %main.5 (a: f32[16,64], b: f32[64,8]) -> f32[16,8] {
  %a = f32[16,64]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %gemm.1 = (f32[16,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="TARGET"CONFIG
  ROOT %get-tuple-element = f32[16,8]{1,0} get-tuple-element(%gemm.1), index=0
}
"""
GEMM = (
    ', backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)


def test_a_product_by_cublas_is_read_off_its_configuration():
    text = CUBLAS.replace("TARGET", "__cublas$gemm").replace("CONFIG", GEMM)
    assert hlo.flops(text) == 2 * 16 * 64 * 8


def test_a_call_that_multiplies_and_cannot_be_read_is_refused_and_another_costs_nothing():
    with pytest.raises(hlo.UnreadableError, match="^The FLOPs of a call of 'my_matmul' cannot be "):
        hlo.flops(CUBLAS.replace("TARGET", "my_matmul").replace("CONFIG", ""))
    assert hlo.flops(CUBLAS.replace("TARGET", "TopK").replace("CONFIG", "")) == 0


def test_a_program_that_cannot_be_read_is_counted_on_its_jaxpr(monkeypatch):
    def solved(a, b):
        return jnp.linalg.cholesky(a) @ b

    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    found = cost(jax.jit(solved), square, square)
    assert found.counted_on == "program"
    monkeypatch.setattr(hlo, "_MULTIPLIES", hlo.re.compile("lapack"))
    assert cost(jax.jit(solved), square, square) == found._replace(counted_on="jaxpr")


def test_memory_is_what_xla_lays_out_for_the_program_that_runs():
    assert quick_compilation()  # the program is compiled in less time than the one that runs
    gradient = jax.jit(jax.grad(chain))
    real = gradient.lower(WEIGHTS, INPUTS).compile({"xla_backend_optimization_level": 3})
    expected = real.memory_analysis()
    found = cost(gradient, WEIGHTS, INPUTS)
    assert found.temporaries == expected.temp_size_in_bytes > BATCH * WIDTH * 4 * LAYERS
    assert found.arguments == 4 * (LAYERS * WIDTH * WIDTH + BATCH * WIDTH)
    assert found.output == 4 * LAYERS * WIDTH * WIDTH
    assert found.peak == found.arguments + found.temporaries + found.output


def test_a_donated_argument_is_counted_once():
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    size = 4 * BATCH * WIDTH
    assert cost(double, INPUTS).aliased == size
    assert cost(double, INPUTS).peak == cost(double, INPUTS).temporaries + size


@pytest.mark.parametrize("engine", [Reverse(), Reverse(remat="step"), MixedFlow()], ids=short_repr)
def test_program_and_jaxpr_agree_on_a_meta_gradient(engine):
    def step(eta, theta, x, grad):
        grads = grad(lambda theta: jnp.mean((jnp.tanh(x @ theta[0]) @ theta[1]) ** 2))(theta)
        return jax.tree.map(lambda p, g, rate: p - rate * g, theta, grads, eta)

    def meta_gradient(eta, theta, batches):
        unroll = Unroll(lambda eta: theta, step, lambda eta, theta: (jnp.sum(theta[0] ** 2), {}))
        return engine.value_and_grad(unroll, eta, batches)[1]

    theta = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(16, 32), (32, 8)]]
    batches = jax.ShapeDtypeStruct((5, 24, 16), jnp.float32)
    on_program, on_jaxpr = counts(meta_gradient, theta, theta, batches)
    forward = 5 * 2 * 24 * (16 * 32 + 32 * 8)
    assert 3 * forward < on_program <= on_jaxpr <= 1.1 * on_program


@pytest.mark.slow
def test_program_and_jaxpr_agree_on_a_transformer():
    made = Architecture(vocabulary=32, width=16, layers=3, heads=2, remat="block")
    tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)

    def loss(params, tokens):
        return jnp.mean(made.apply(params, tokens) ** 2)

    params = jax.eval_shape(made.init, jax.random.key(0))
    forward = counts(loss, params, tokens)
    assert forward[0] == forward[1] > 2 * 24 * 3 * 12 * 16**2
    gradient = counts(jax.grad(loss), params, tokens)
    assert 3 * forward[0] < gradient[0] <= gradient[1] <= 1.1 * gradient[0]
