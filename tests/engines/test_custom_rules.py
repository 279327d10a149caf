"""Derivative rules that an inner loss brings: `MixedFlow` is exact for all, lean for true ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from metalearn import (
    ES,
    Algorithm,
    ExampleMean,
    Forward,
    InverseVariance,
    MixedFlow,
    Reverse,
    Trainer,
    Unroll,
)
from metalearn.datasets import Sinusoid
from metalearn.diagnostics.health import HealthWarning
from metalearn.engines.custom_rules import Plan, plan
from metalearn.engines.mixed_flow.forward_over_reverse import Call, hoist
from metalearn.engines.rule_probe import Verdict
from metalearn.experiments import build
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
START, TARGET, ETA = np.array([0.43, 0.3, 0.2]), np.array([1.0, 2.0, 3.0]), np.array(0.7)


# Rules that are no derivatives.


def with_vjp(function, forward, backward):
    """A function of a name, whose rule keeps its arguments."""
    ruled = jax.custom_vjp(function)
    ruled.defvjp(lambda *x: (forward(*x), x), backward)
    return ruled


def with_jvp(function, rule, **options):
    ruled = jax.custom_jvp(function, **options)
    ruled.defjvp(rule)
    return ruled


def clip_to_norm_one(x, z):
    return (z * jnp.minimum(1, 1 / (jnp.linalg.norm(z) + 1e-3)),)


def rounded(x):
    return jnp.round(x)


ste = with_vjp(rounded, rounded, lambda x, z: (z,))
tanh_backward = with_vjp(lambda x: x, lambda x: x, lambda x, z: (jnp.tanh(z),))
ste_jvp = with_jvp(rounded, lambda p, t: (jnp.round(p[0]), t[0]))
spike = with_vjp(
    lambda x: (x > 0).astype(x.dtype),
    lambda x: (x > 0).astype(x.dtype),
    lambda x, z: (z / (1 + 5 * abs(x[0])) ** 2,),
)
hard_tanh_window = with_vjp(
    lambda x: jnp.sign(x), lambda x: jnp.sign(x), lambda x, z: (z * (abs(x[0]) <= 1),)
)
norm_clipped = with_vjp(lambda x: x, lambda x: x, clip_to_norm_one)
clipped_at_thousands = with_vjp(lambda x: x, lambda x: x, lambda x, z: (jnp.clip(z, -1e5, 1e5),))
reversed_by_data = with_vjp(lambda x, lam: x, lambda x, lam: x, lambda x, z: (-x[1] * z, None))
reversed_by_argument = with_jvp(
    lambda lam, x: x, lambda lam, p, t: (p[0], -lam * t[0]), nondiff_argnums=(0,)
)
cut_product = with_vjp(
    lambda x, y: x * y,
    lambda x, y: x * y,
    lambda x, z: (z * x[1], z * jax.lax.stop_gradient(x[0])),
)


def squares(f):
    """An inner loss of p [3] and eta (), with a function in it."""
    return lambda p, e: jnp.sum((f(p[:2] * 3 * e)[0] * p[1] - p[2]) ** 2)


def scanned(f):
    def body(carry, _):
        return f(1.1 * carry), None

    return lambda x: jax.lax.scan(body, x, None, length=2)[0]


def closed_over(p, e):
    """The rule itself closes over eta."""

    @jax.custom_vjp
    def turned(x):
        return x

    turned.defvjp(lambda x: (x, None), lambda _, z: (-e * z,))
    return jnp.sum((turned(p[0] * e) * p[1] - p[2]) ** 2)


FALSE = {
    "ste": squares(ste),
    "tanh backward": squares(tanh_backward),
    "ste as a jvp": squares(ste_jvp),
    "spike": squares(spike),
    "window": squares(hard_tanh_window),
    "norm clip": squares(lambda x: norm_clipped(50 * x)),
    "reversed by data": lambda p, e: squares(lambda x: reversed_by_data(x, e))(p, e),
    "reversed by an argument": lambda p, e: squares(lambda x: reversed_by_argument(e, x))(p, e),
    "reversed by a number": squares(functools.partial(reversed_by_argument, 0.3)),
    "value right, rule cut": squares(lambda x: cut_product(x, x[::-1] + x)),
    "custom_gradient": squares(jax.custom_gradient(lambda x: (x, lambda z: (jnp.sign(z),)))),
    "optax.scale_gradient": squares(lambda x: optax.scale_gradient(x, 0.5)),
    "scan": squares(scanned(ste)),
    "vmap": squares(jax.vmap(ste)),
    "jit in jit": squares(jax.jit(lambda x: jax.jit(tanh_backward)(x) + x)),
    "checkpoint": squares(jax.checkpoint(lambda x: jnp.sin(ste(x)))),
    "cond": squares(lambda x: jax.lax.cond(x[0] > 0, ste, jnp.sin, x)),
    "of eta alone": lambda p, e: jnp.sum((ste(3 * e[None])[0] * p[0] * p[1] - p[2]) ** 2),
    "closed over": closed_over,
}


def unroll_of(loss):
    def step(eta, p, batch, grad):
        return p - 0.1 * grad(lambda p: loss(p, eta))(p)

    return Unroll(lambda eta: START, step, lambda eta, p: (((p - TARGET) ** 2).sum(), {}))


@functools.cache
def by_hand(loss):
    """The meta-gradient of three steps, by a Python loop that knows of no engine."""

    @jax.jit
    @jax.grad
    def outer(eta):
        p = START
        for _ in range(3):
            p = p - 0.1 * jax.grad(loss)(p, eta)
        return ((p - TARGET) ** 2).sum()

    return float(outer(ETA))


def solve(engine, unroll, eta=ETA, batches=None):
    batches = jnp.arange(3) if batches is None else batches
    run = jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches)[1])
    return jax.tree.map(np.asarray, run(eta))


SAMPLES = {
    "ste": (lambda p, e: jnp.sum((ste(3 * p[0] * e) * p[1] - p[2]) ** 2), 0.040216),
    "tanh": (lambda p, e: jnp.sum((tanh_backward(p[0] * e) * p[1] - p[2]) ** 2), -0.384832),
}
ENGINES = {
    "Reverse": Reverse(),
    "Forward": Forward(),
    "MixedFlow": MixedFlow(),
    "none": MixedFlow("none"),
    "segments": MixedFlow("segments"),
    "nested": MixedFlow("nested", peel=False),
    "host": MixedFlow(store="host"),
}


# One sample by every engine, the other by mixed flow, which has to tell such rules apart.
PAIRS = quick(
    [(sample, engine) for sample in SAMPLES for engine in ENGINES],
    lambda sample, engine: sample == "tanh" or engine == "MixedFlow",
)


@pytest.mark.parametrize(("sample", "engine"), PAIRS)
def test_every_exact_engine_has_the_derivative_of_the_loop(sample, engine):
    loss, right = SAMPLES[sample]
    assert abs(by_hand(loss) - right) < 1e-6
    np.testing.assert_allclose(solve(ENGINES[engine], unroll_of(loss)), by_hand(loss), rtol=1e-12)


# A JVP, a clip, one whose data decide, one within a loop, and one that closes over eta.
QUICK = ("ste as a jvp", "norm clip", "reversed by data", "scan", "closed over")


@pytest.mark.parametrize("name", quick(FALSE, lambda name: name in QUICK))
def test_mixed_flow_is_exact_whatever_the_rule(name):
    expected = by_hand(FALSE[name])
    assert abs(expected) > 1e-4
    np.testing.assert_allclose(solve(MixedFlow(), unroll_of(FALSE[name])), expected, rtol=1e-10)


def test_a_clip_beyond_the_usual_sizes_is_found():
    (rule,) = planned(lambda x: clipped_at_thousands(x).sum(), jnp.ones(3)).rules
    assert rule.trial.verdict is Verdict.NO_DERIVATIVE
    assert "cotangents of about 1e+06" in str(rule)


def test_an_asymmetric_rule_does_harm_where_it_is_commuted():
    """What all this is for: that the samples are wrong if their rules are believed."""
    wrong = Plan(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metalearn.engines.custom_rules.plan", lambda *_: wrong)
        values = [float(solve(MixedFlow(), unroll_of(loss))) for loss, _ in SAMPLES.values()]
    np.testing.assert_allclose(values, [-0.035835, -0.383766], atol=1e-6)


def example_loss(theta, example, eta):
    x, y, count = example
    hidden = norm_clipped(100 * ste(3 * x * theta["w"]) * eta + x)
    value = (hidden.sum() + theta["b"] - y) ** 2 * (1 + count)
    return value, {"hidden": hidden, "count": count}


def over_examples(eta, theta, batch, grad):
    grads, aux = grad(ExampleMean(example_loss), has_aux=True)(theta, batch, eta)
    moved = jax.tree.map(lambda p, g: p - 0.01 * eta * g, theta, grads)
    return {**moved, "b": moved["b"] + 0.01 * jnp.sin(aux["hidden"]).sum() * aux["count"].sum()}


@pytest.mark.parametrize(
    "engine",
    [MixedFlow(micro_batches=2), MixedFlow(store="host", micro_batches=3)],
    ids=repr,
)
def test_parts_of_a_batch_see_the_cotangents_of_the_whole(engine):
    """A clip acts on an example's share of the mean, which is one of 6 whatever the parts."""
    start = {"w": jnp.array([0.3, -0.2]), "b": jnp.array(0.1)}
    x = jax.random.normal(jax.random.key(0), (3, 6, 2))
    batches = x, x.sum(-1), jnp.arange(18).reshape(3, 6)
    unroll = Unroll(
        lambda eta: jax.tree.map(lambda p: p * eta, start),
        over_examples,
        lambda eta, theta: ((theta["w"] ** 2).sum() + theta["b"], {}),
    )
    ours, theirs = solve(engine, unroll, ETA, batches), solve(Reverse(), unroll, ETA, batches)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# Rules that are derivatives keep the memory.


def softplus_rule(primals, tangents):
    return softplus(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]


softplus = with_jvp(lambda x: jnp.logaddexp(x, 0.0), softplus_rule)
softplus_vjp = with_vjp(
    lambda x: jnp.logaddexp(x, 0.0),
    lambda x: jnp.logaddexp(x, 0.0),
    lambda x, z: (z * jax.nn.sigmoid(x[0]),),
)
relu = with_jvp(lambda x: jnp.maximum(x, 0), lambda p, t: (relu(p[0]), t[0] * (p[0] > 0)))
relu_vjp = with_vjp(
    lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(x, 0), lambda x, z: (z * (x[0] > 0),)
)
softmax = with_jvp(
    lambda x: jax.nn.softmax(x),
    lambda p, t: (softmax(p[0]), softmax(p[0]) * (t[0] - (softmax(p[0]) * t[0]).sum())),
)
logsumexp = with_vjp(
    lambda x: jax.nn.logsumexp(x),
    lambda x: jax.nn.logsumexp(x),
    lambda x, z: (z * jax.nn.softmax(x[0]),),
)
cross_entropy = with_vjp(  # labels get no cotangent, as many write it
    lambda x, y: -(y * jax.nn.log_softmax(x)).sum(),
    lambda x, y: -(y * jax.nn.log_softmax(x)).sum(),
    lambda x, z: (z * (jax.nn.softmax(x[0]) * x[1].sum() - x[1]), None),
)
LABELS = np.array([0.0, 1.0, 0.0])


def optax_losses(x):
    classes = jnp.array([0, 1, 1])
    rows = jnp.stack([x, x**2, -x])
    return (
        optax.safe_softmax_cross_entropy(x, LABELS)
        + optax.softmax_cross_entropy_with_integer_labels(rows, classes).sum()
        + optax.softmax_cross_entropy(x, LABELS)
        + optax.sigmoid_binary_cross_entropy(x, LABELS).sum()
        + optax.huber_loss(x, LABELS).sum()
        + optax.log_cosh(x, LABELS).sum()
        + optax.sigmoid_focal_loss(x, LABELS).sum()
        + optax.kl_divergence(jax.nn.log_softmax(x), LABELS)
    )


def of_jax(x):
    y = jax.nn.relu(x) + jax.nn.relu6(x) + jax.nn.silu(x) + jax.nn.softplus(x) + jax.nn.gelu(x)
    y = y + jax.nn.softmax(x) + jax.nn.logsumexp(x) + jnp.logaddexp(x, 1.0) + jax.nn.elu(x)
    y = y + jax.scipy.special.xlogy(x**2, x**2 + 1) + jnp.linalg.det(jnp.outer(x, x) + jnp.eye(3))
    return (y + jnp.linalg.solve(jnp.outer(x, x) + jnp.eye(3), x)).sum()


def attention_forward(q, k, v):
    weights = jax.nn.softmax(q @ k.T / 2)
    return weights @ v, (q, k, v, weights)


def attention_backward(residuals, z):
    q, k, v, weights = residuals
    slopes = z @ v.T
    scores = weights * (slopes - (slopes * weights).sum(-1, keepdims=True)) / 2
    return scores @ k, scores.T @ q, weights.T @ z


attention = jax.custom_vjp(lambda q, k, v: attention_forward(q, k, v)[0])
attention.defvjp(attention_forward, attention_backward)

TRUE = {
    "softplus": lambda x: softplus(x).sum(),
    "softplus vjp": lambda x: softplus_vjp(x).sum(),
    "relu": lambda x: relu(x).sum(),
    "softmax": lambda x: softmax(x)[0],
    "logsumexp": lambda x: logsumexp(x),
    "cross-entropy": lambda x: cross_entropy(x, jnp.asarray(LABELS, x.dtype)),
    "attention": lambda x: attention(x[None], jnp.stack([x, x**2]), jnp.stack([-x, x])).sum(),
    "vmapped, scanned, in a cond": lambda x: jax.lax.cond(
        x[0] > 0, scanned(jax.vmap(softplus)), jax.jit(jax.checkpoint(softplus_vjp)), x
    ).sum(),
    "jax": of_jax,
    "optax": optax_losses,
    "simplex": lambda x: optax.projections.projection_simplex(x.astype(float))[0],
    "a gradient of a rule": lambda x: (jax.grad(lambda x: ste(x).sum())(x) * x).sum(),
    "stop_gradient": lambda x: (jax.lax.stop_gradient(jnp.round(x)) * x).sum(),
    "behind stop_gradient": lambda x: (ste(jax.lax.stop_gradient(x)) * x).sum(),
}


def planned(function, *theta, inputs=(), declared=()):
    """What is taken for symmetric of a loss of theta."""
    hoisted, consts = hoist(lambda theta, x: (function(*theta, *x), ()), theta, inputs)
    others = range(len(theta), len(theta) + len(inputs) + len(consts))
    floats = [i for i in others if jnp.issubdtype(hoisted.jaxpr.invars[i].aval.dtype, jnp.inexact)]
    return plan(hoisted.jaxpr, range(len(theta)), floats, declared)


@pytest.mark.parametrize(
    "dtype", quick([jnp.float32, jnp.float64], lambda dtype: dtype is jnp.float32)
)
@pytest.mark.parametrize("name", TRUE)
def test_true_derivatives_are_told_from_others_and_commute(name, dtype):
    assert not planned(TRUE[name], jnp.array([0.3, -1.0, 2.0], dtype)).rules


TRUSTED = {
    "relu": lambda x: jax.nn.relu(x) + jax.nn.relu6(x),
    "softmax": jax.nn.softmax,
    "log1mexp": lambda x: jax.nn.log1mexp(x),
    "logaddexp": lambda x: jnp.logaddexp(x, x[::-1]) + jnp.logaddexp2(x, x[::-1]),
    "logit": jax.scipy.special.logit,
    "xlogy": lambda x: jax.scipy.special.xlogy(x, x[::-1]),
    "xlog1py": lambda x: jax.scipy.special.xlog1py(x, x[::-1]),
    "entropy": jax.scipy.special.entr,
    "log_ndtr": jax.scipy.special.log_ndtr,
    "determinants": lambda x: (
        jnp.linalg.det(jnp.outer(x, x) + jnp.diag(x))
        + jnp.linalg.slogdet(jnp.outer(x, x[::-1]) + jnp.diag(x))[1]
    ),
}


@pytest.mark.parametrize("name", TRUSTED)
def test_what_is_trusted_of_jax_is_a_derivative_when_it_is_tried(name, monkeypatch):
    monkeypatch.setattr("metalearn.engines.custom_rules.TRUSTED", {})
    assert not planned(lambda x: TRUSTED[name](x).sum(), jnp.array([0.3, 0.5, 0.6])).rules


@pytest.mark.parametrize(
    "name",
    quick(["softplus", "softmax", "attention", "logsumexp"], lambda name: name == "softplus"),
)
def test_true_derivatives_are_told_in_half_precision_too(name):
    x = jnp.array([0.3, -1.0, 2.0], jnp.bfloat16)
    assert not planned(TRUE[name], x).rules
    assert planned(lambda x: ste(x).sum(), x).rules


def test_complex_functions_are_told_apart_too():
    ours = with_vjp(lambda x: x**2, lambda x: x**2, lambda x, z: (2 * x[0] * z,))
    conjugate = with_vjp(lambda x: x**2, lambda x: x**2, lambda x, z: (2 * x[0].conj() * z,))
    x = jnp.array([0.3 + 1j, 2.0])
    assert not planned(lambda x: ours(x).real.sum(), x).rules
    assert planned(lambda x: conjugate(x).real.sum(), x).rules


def test_only_what_labels_carry_is_taken_backwards_where_a_rule_gives_them_nothing():
    x = jnp.array([0.3, -1.0, 2.0])
    assert planned(cross_entropy, x, inputs=(LABELS,)) == Plan((), frozenset({1}))
    (rule,) = planned(cross_entropy, x, LABELS).rules
    assert rule.trial.verdict is Verdict.NO_DERIVATIVE

    def inner(p, e):
        return cross_entropy(p * p, jnp.stack([e, 1 - e, e**2]))

    np.testing.assert_allclose(solve(MixedFlow(), unroll_of(inner)), by_hand(inner), rtol=1e-12)


def deep(activation):
    """Temporaries [bytes] of a program that learns the rate of a deep network."""
    layers = jax.ShapeDtypeStruct((8, 32, 32), jnp.float32)
    inputs = jax.ShapeDtypeStruct((128, 32), jnp.float32)

    @jax.checkpoint
    def layer(h, w):
        h = h + 0.1 * activation(h @ w)
        return h + 0.1 * jnp.tanh(jnp.tanh(h @ w) @ w.T), None

    def temporaries(engine):
        @jax.jit
        def run(rate, layers, inputs):
            def loss(theta):
                return jnp.mean(jax.lax.scan(layer, inputs, theta)[0] ** 2)

            unroll = Unroll(
                lambda eta: layers,
                lambda eta, theta, batch, grad: theta - eta * grad(loss)(theta),
                lambda eta, theta: (loss(theta), {}),
            )
            return engine.value_and_grad(unroll, rate, jnp.arange(3))[1]

        rate = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = run.lower(rate, layers, inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return temporaries


@pytest.mark.slow
def test_a_rule_of_ones_own_costs_no_memory_if_it_is_true_and_that_of_reverse_if_not():
    plain = deep(lambda x: jnp.logaddexp(x, 0.0))(MixedFlow())
    assert deep(softplus_vjp)(MixedFlow()) < 1.05 * plain
    rounding = deep(ste)
    kept = rounding(MixedFlow())
    assert 1.5 * plain < kept < 1.1 * rounding(Reverse("step", peel=True))


def test_of_two_gradients_of_a_step_only_the_one_concerned_is_not_commuted():
    def smooth(p, e):
        return jnp.sum(jnp.tanh(p * e) ** 2)

    def step(eta, p, batch, grad):
        p = p - 0.1 * grad(lambda p: FALSE["ste"](p, eta))(p)
        return p - 0.1 * grad(smooth)(p, eta)

    unroll = Unroll(lambda eta: START, step, lambda eta, p: (p.sum(), {}))
    np.testing.assert_allclose(solve(MixedFlow(), unroll), solve(Reverse(), unroll), rtol=1e-12)
    engine = MixedFlow()
    assert engine.plan(Call(smooth, 0, False, (START, ETA), {})) == Plan(())
    (rule,) = engine.plan(Call(FALSE["ste"], 0, False, (START, ETA), {})).rules
    assert rule.name == "rounded"


# What cannot be told, and what is declared.


def kernel(x):
    """A function that does not say what it computes."""
    return x * 2


def called_back(x):
    """The identity, by Python: nothing that a trial may call."""
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def too_large(x):
    return jnp.tanh(jnp.broadcast_to(x[0], (2**23 + 1,)))


def unending(x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, x))[1]


double = with_vjp(kernel, kernel, lambda x, z: (2 * z,))
huge = jax.custom_jvp(too_large)
huge.defjvp(lambda p, t: (huge(p[0]), (1 - huge(p[0]) ** 2) * t[0][0]))
looping = with_vjp(unending, lambda x: x + 0 * unending(x), lambda x, z: (z,))


UNKNOWN = {
    "large": (lambda x: huge(x)[0], "too_large", "too large to be tried"),
    "loop": (lambda x: looping(x).sum(), "unending", "a loop that may not end"),
    "kink": (lambda x: relu_vjp(x).sum(), "<lambda>", "where arguments are zero, or equal"),
    "flat": (
        lambda x: with_jvp(rounded, lambda p, t: (rounded(p[0]), 0 * t[0]))(x).sum(),
        "rounded",
        "zero, or not finite",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_does_not_count_unless_it_is_declared(name):
    function, called, reason = UNKNOWN[name]
    x = jnp.array([0.3, -1.0, 2.0])
    (rule,) = planned(function, x).rules
    assert rule.name == called and reason in str(rule) and "test_custom_rules.py" in str(rule)
    assert planned(function, x, declared=("another",)).rules
    assert planned(function, x, declared=(called,)) == Plan(())
    assert planned(function, x, declared=("*",)) == Plan(())


def test_implicit_differentiation_does_not_count_unless_it_is_declared():
    def root(x):
        def solve(f, start):
            return start - f(start)  # one step: it need not have converged

        return jax.lax.custom_root(
            lambda y: y**3 + y - x.sum(), x.sum(), solve, lambda g, y: y / g(1.0)
        )

    (rule,) = planned(root, jnp.ones(3)).rules
    assert "only where the solver has converged" in str(rule)
    assert planned(root, jnp.ones(3), declared=(rule.name,)) == Plan(())


def test_a_rule_that_cannot_be_pushed_forward_is_not_commuted_though_it_is_declared():
    itself = jax.custom_vjp(jnp.tanh)
    itself.defvjp(lambda x: (itself(x), x), lambda x, z: (z * (1 - jnp.tanh(x) ** 2),))
    (rule,) = planned(lambda x: itself(x).sum(), jnp.ones(3), declared=("*",)).rules
    assert "inside its rule has no JVP" in str(rule)


@pytest.mark.parametrize("declared", [("*",), ("straight_through",)])
def test_a_declared_rule_that_was_tried_and_is_none_is_refused_by_name(declared):
    def straight_through(x):
        return jnp.round(x)

    ruled = with_vjp(straight_through, straight_through, lambda x, z: (z,))
    message = (
        "`true_rules` declares the rule of `straight_through` a true derivative, but it has a "
        r"backward pass that is not the derivative of its value \(at x of about 1 .*\. Take it out"
    )
    with pytest.raises(ValueError, match=message):
        solve(MixedFlow(true_rules=declared), unroll_of(squares(ruled)))


def test_a_declared_rule_with_a_kink_is_commuted_and_right_beside_it():
    loss = squares(relu_vjp)
    engine = MixedFlow(true_rules=("<lambda>",))
    np.testing.assert_allclose(solve(engine, unroll_of(loss)), by_hand(loss), rtol=1e-12)


@pytest.mark.parametrize("names", ["attention", ["attention"], (3,), ("",), None])
def test_names_that_are_no_tuple_of_names_are_refused(names):
    with pytest.raises(ValueError, match="it is a tuple of names of functions whose derivative"):
        MixedFlow(true_rules=names)


def test_a_config_declares_rules_as_an_option_of_the_engine():
    named = build.engine("mixed_flow", {"true_rules": ["attention"], "remat": None})
    assert named == MixedFlow(true_rules=("attention",))
    assert build.engine("mixed_flow", {"true_rules": ()}) == MixedFlow()


def test_a_primitive_of_ones_own_is_tried_as_a_rule_is():
    from jax.interpreters import ad, mlir

    def primitive(name, backward):
        mine = core.Primitive(name)
        mine.def_impl(jnp.sin)
        mine.def_abstract_eval(lambda x: x)
        mlir.register_lowering(mine, mlir.lower_fun(jnp.sin, multiple_results=False))
        ad.defjvp(mine, lambda t, x: t * backward(x))
        return mine

    right, wrong = primitive("right_sine", jnp.cos), primitive("wrong_sine", jnp.ones_like)
    assert not planned(lambda x: right.bind(x).sum(), jnp.ones(3)).rules
    # As JAX has it, this one's derivative is 1 wherever it is asked: symmetric, if not a sine's.
    assert not planned(lambda x: wrong.bind(x).sum(), jnp.ones(3)).rules
    crossed = core.Primitive("crossed")
    crossed.def_impl(lambda x, y: x * y)
    crossed.def_abstract_eval(lambda x, y: x)
    mlir.register_lowering(crossed, mlir.lower_fun(lambda x, y: x * y, multiple_results=False))
    ad.defjvp(crossed, lambda t, x, y: t * y, lambda t, x, y: t * jax.lax.stop_gradient(x))
    (rule,) = planned(lambda x: crossed.bind(x, x + 1).sum(), jnp.ones(3)).rules
    assert rule.name == "crossed"


def test_a_trial_is_made_once_for_all_uses_of_a_function(monkeypatch):
    from metalearn.engines import rule_probe

    runs = []
    compared = rule_probe._compared
    monkeypatch.setattr(rule_probe, "_known", {})
    monkeypatch.setattr(rule_probe, "_compared", lambda *x: runs.append(1) or compared(*x))
    x = jnp.ones(5)
    assert not planned(lambda x: softplus(softplus(x) + softplus(-x)).sum(), x).rules
    assert not planned(lambda x: softplus(2 * x).sum(), x).rules
    assert len(runs) == 1


# Health.


@dataclasses.dataclass(frozen=True)
class Rates(Algorithm):
    """Learn a rate for an inner loss of p [3] and eta."""

    inner: object

    def init(self, key):
        return ETA

    def batches(self, episode, key):
        return jnp.arange(3)

    def unroll(self, episode, key):
        return unroll_of(self.inner)


def checked(loss, engine):
    trainer = Trainer(Rates(loss), engine, tasks_per_step=1)
    return trainer.check_health(trainer.init(jax.random.key(0)), Sinusoid())


FINE = (
    "Health: the meta-gradient is finite, with a zero in every inner gradient too, and with all of "
    "them zero."
)


def test_health_notes_which_functions_are_not_commuted_and_what_they_cost():
    report = checked(FALSE["ste as a jvp"], MixedFlow())
    assert report.healthy and len(report.notes) == 1
    for part in ("reverse over reverse", "test_custom_rules.py", "Reverse('step')", "true_rules="):
        assert part in report.notes[0]
    assert str(report) == f"{FINE}\nNote: {report.notes[0]}"
    report.warn()  # a note is no warning


@pytest.mark.parametrize("engine", [Reverse(), Forward()], ids=repr)
def test_health_says_nothing_of_rules_to_engines_that_do_not_commute(engine):
    assert str(checked(FALSE["ste"], engine)) == FINE


@pytest.mark.parametrize("name", quick(["softplus", "optax"], lambda name: name == "softplus"))
def test_health_finds_true_derivatives_symmetric(name):
    assert str(checked(lambda p, e: TRUE[name](p * e), MixedFlow())) == FINE


def hidden(x):
    return x


narrow = with_vjp(hidden, hidden, lambda x, z: (z * jnp.where(abs(x[0] - 7.123) < 1e-9, 3, 1),))


@pytest.mark.parametrize(
    "engine",
    quick([MixedFlow(), InverseVariance(ES(2))], lambda engine: engine == MixedFlow()),
    ids=repr,
)
def test_health_measures_an_asymmetry_that_no_trial_met(engine):
    def loss(p, e):
        return jnp.sum(narrow(p - START + 7.123) ** 2 * jnp.cos(e * p))

    report = checked(loss, engine)
    assert not report.healthy and FINE not in str(report)
    with pytest.warns(HealthWarning, match=r"not symmetric on the first task .*Use `Reverse\(\)`"):
        report.warn()


def test_health_measures_several_gradients_and_leaves_out_those_within_transformations():
    @dataclasses.dataclass(frozen=True)
    class Several(Rates):
        def unroll(self, episode, key):
            def step(eta, p, batch, grad):
                p = p - 0.1 * grad(lambda p: TRUE["softplus"](p * eta))(p)
                p = p - 0.1 * jax.vmap(lambda x: grad(lambda x: (x * eta) ** 2)(x))(p)
                return p - 0.1 * grad(FALSE["tanh backward"])(p, eta)

            return Unroll(lambda eta: START, step, lambda eta, p: (p.sum(), {}))

    trainer = Trainer(Several(None), MixedFlow(), tasks_per_step=1)
    report = trainer.check_health(trainer.init(jax.random.key(0)), Sinusoid())
    assert report.healthy and len(report.notes) == 1
