"""What inner and outer optimizers of optax are given, against the same thing in plain JAX."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from metalearn import Algorithm, Forward, MixedFlow, Reverse, Trainer, Truncation, Unroll
from metalearn.algorithms import MAML, Hyperparameter, LearnedOptimizer, TunedRule, squared_error
from metalearn.engines.inner_loop import rollout
from metalearn.models import Functions
from metalearn.optimizers import averaged
from metalearn.optimizers.updates import evaluation_params
from tests.cases import ALGORITHMS, MODELS, TASKS, Float64, to_float64
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
MODEL = Float64(MODELS["Functions"])
ENGINES = [Reverse(), Forward(), MixedFlow(), MixedFlow(store="host")]
IDS = ["Reverse", "Forward", "MixedFlow", "MixedFlow-host"]


def _state_model():
    """The two-layer network of plain functions, its parameters an `nnx.State`."""
    plain = MODELS["Functions"]

    def init(key):
        return nnx.State({name: nnx.Param(leaf) for name, leaf in plain.init(key)[0].items()})

    def apply(params, x):
        return jnp.tanh(x @ params["body"].get_value()) @ params["head"].get_value()

    return Functions(init, apply)


NETWORKS = {
    "functions": MODEL,
    "nnx-State": Float64(_state_model()),
    **{name: Float64(MODELS[f"{name}-MLP"]) for name in ("linen", "nnx", "haiku")},
}


def episode():
    return to_float64(TASKS["Sinusoid"].sample(jax.random.key(1)))


def maml(optimizer, model=MODEL, **options):
    return MAML(model, squared_error, optimizer, **{"inner_steps": 2, **options})


def meta_gradient(algorithm, eta, engine):
    """((loss, aux), gradient) on `episode()`."""

    @jax.jit
    def run(eta):
        unroll = algorithm.unroll(episode(), KEY)
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode(), KEY))

    return run(eta)


def support_and_query(model):
    """Return the two losses of a model's parameters, as functions of them."""
    _, state = model.init(KEY)

    def loss(params, data):
        outputs, _ = model.apply(params, state, data[0], train=True, key=KEY)
        return jnp.mean((outputs - data[1]) ** 2)

    return [lambda params, data=data: loss(params, data) for data in episode()]


def by_hand(model, move, steps=2, begin=lambda params: None, judged=lambda params, state: params):
    """Return eta.params -> query loss of an explicit loop: params, value, grads, state -> both."""
    support, query = support_and_query(model)

    def run(params):
        state = begin(params)
        for _ in range(steps):
            value, grads = jax.value_and_grad(support)(params)
            params, state = move(params, value, grads, state)
        return query(judged(params, state))

    return run


def assert_close(ours, expected, rtol=1e-10, atol=1e-13):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def agrees(algorithm, function, engine, derivative=jax.grad):
    """Assert that a meta-gradient is that of an explicit loop."""
    eta = algorithm.init(KEY)
    (loss, aux), grads = meta_gradient(algorithm, eta, engine)
    expected = jax.jit(lambda p: (function(p), derivative(function)(p)))(eta.params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert_close((loss, grads.params), expected)
    return aux


# The inner optimizer sees the model's own tree.


def is_head(path):
    """Whether a path is in the last layer: it is called so in all but the one of Haiku."""
    text = jax.tree_util.keystr(path)
    return "head" in text


def labels(tree):
    return jax.tree_util.tree_map_with_path(lambda p, _: "head" if is_head(p) else "body", tree)


def mask(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: is_head(path), tree)


def of_kinds(params):
    """The head at rate 0.1 and the body at rate 0, each in a way of its own."""
    rates = {"head": optax.sgd(0.1), "body": optax.sgd(0.0)}
    head_alone = optax.chain(
        optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda m: not m, mask(tree))),
        optax.sgd(0.1),
    )
    return {
        "tree of labels": optax.multi_transform(rates, labels(params)),
        "function of labels": optax.multi_transform(rates, labels),
        "mask": head_alone,
        "freeze": optax.chain(
            optax.sgd(0.1), optax.freeze(jax.tree.map(lambda m: not m, mask(params)))
        ),
    }


KINDS = ["tree of labels", "function of labels", "mask", "freeze"]
# All kinds on one network; labels on all.
PATHS = [(n, kind) for n in NETWORKS for kind in (KINDS if n == "functions" else KINDS[:2])]


@pytest.mark.parametrize(
    ("network", "kind", "adapt"),
    quick(
        [(*path, adapt) for adapt in ("", "head") for path in PATHS],
        lambda network, kind, adapt: (network, adapt) == ("functions", ""),
    ),
)
def test_labels_and_masks_by_path_choose_the_parameters_they_name(network, kind, adapt):
    model = NETWORKS[network]
    optimizer = of_kinds(model.init(KEY)[0])[kind]

    def move(params, value, grads, state):
        rates = jax.tree.map(lambda m: 0.1 if m else 0.0, mask(params))
        return jax.tree.map(lambda p, r, g: p - r * g, params, rates, grads), None

    algorithm = maml(optimizer, model, adapted=adapt)
    aux = agrees(algorithm, by_hand(model, move), MixedFlow())
    assert (aux.inner.update_norm > 1e-3).all()
    heads = len(jax.tree.leaves(model.init(KEY)[0])) if not adapt else None
    assert heads is None or len(aux.state.params) == heads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapt", "engine"),
    [*itertools.product(("", "hidden"), (Reverse(), MixedFlow()))],
    ids=str,
)
def test_a_mask_of_weight_decay_by_path_decays_what_it_names(adapt, engine):
    """Kernels and no biases, in a nested dict, of all layers or of the adapted one."""
    model, decay = NETWORKS["linen"], 0.3

    def kernels(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path[-1]), tree)

    def move(params, value, grads, state):
        def one(path, p, g):
            moves = adapt in jax.tree_util.keystr(path)
            return p - moves * 0.1 * (g + ("kernel" in str(path[-1])) * decay * p)

        return jax.tree_util.tree_map_with_path(one, params, grads), None

    rates = optax.sgd(0.1)
    by_function = optax.chain(optax.add_decayed_weights(decay, kernels), rates)
    by_tree = optax.chain(optax.add_decayed_weights(decay, kernels(model.init(KEY)[0])), rates)
    for optimizer in (by_function, by_tree):
        agrees(maml(optimizer, model, adapted=adapt), by_hand(model, move), engine)


@pytest.mark.slow
def test_adamw_with_a_mask_is_the_same_inside_and_outside_of_maml():
    model = NETWORKS["haiku"]
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)  # noqa: E731
    optimizer = optax.adamw(0.1, eps_root=1e-4, weight_decay=0.5, mask=wide)

    def move(params, value, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    agrees(maml(optimizer, model), by_hand(model, move, begin=optimizer.init), MixedFlow())


@pytest.mark.slow
def test_learned_rates_and_masks_go_together():
    optimizer = optax.multi_transform({"head": optax.sgd(1.0), "body": optax.sgd(0.0)}, labels)
    algorithm = maml(optimizer, learned_rates=0.1)
    eta = algorithm.init(KEY)
    assert len(eta.rates) == 2

    def move(params, value, grads, state):
        return {**params, "head": params["head"] - 0.1 * grads["head"]}, None

    agrees(algorithm, by_hand(MODEL, move), MixedFlow())
    _, grads = meta_gradient(algorithm, eta, MixedFlow())
    assert (grads.rates[0] == 0).all() and abs(grads.rates[1]).min() > 1e-6  # body, head


def test_what_does_not_adapt_takes_no_room_in_the_optimizer():
    algorithm = maml(optax.adam(0.1), NETWORKS["linen"], adapted="head")
    eta = algorithm.init(KEY)
    state = algorithm.unroll(episode(), KEY).init(eta)
    assert len(state.params) == 2 and len(jax.tree.leaves(state.optimizer)) == 1 + 2 * 2
    assert isinstance(state.optimizer[0].mu["hidden_0"]["kernel"], optax.MaskedNode)


# The value of the loss.

POLYAK = optax.polyak_sgd(max_learning_rate=10.0, scaling=2.0)
WANTING = {
    "polyak_sgd": POLYAK,
    "momo": contrib.momo(10.0),
    "momo_adam": contrib.momo_adam(10.0, eps=1e-3),
    "reduce_on_plateau": optax.chain(
        optax.sgd(0.2), contrib.reduce_on_plateau(patience=1, rtol=0.9)
    ),
    "in a chain": optax.chain(optax.clip_by_global_norm(0.7), POLYAK),
    "masked": optax.multi_transform({"head": POLYAK, "body": optax.sgd(0.1)}, labels),
}


def loop_of(optimizer, steps=2, judged=lambda params, state: params, given=("value",)):
    """An explicit loop around an optax optimizer that takes extra arguments."""
    support, _ = support_and_query(MODEL)

    def move(params, value, grads, state):
        extra = {"value": value, "grad": grads, "value_fn": support, "obj_fn": support}
        extra = {name: extra[name] for name in given}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return by_hand(MODEL, move, steps, optimizer.init, judged)


# One by every engine, the others by mixed flow.
@pytest.mark.parametrize(
    ("name", "engine"),
    quick(
        itertools.product(WANTING, ENGINES[:3]),
        lambda name, engine: engine == MixedFlow() and name in ("polyak_sgd", "masked"),
    ),
    ids=str,
)
def test_optimizers_that_want_the_loss_get_it_and_its_derivative(name, engine):
    agrees(maml(WANTING[name], inner_steps=3), loop_of(WANTING[name], 3), engine)


@pytest.mark.slow
def test_the_step_size_of_polyak_is_a_part_of_the_meta_gradient():
    """The same step size as a constant gives another gradient: the test above would see it."""

    def move(params, value, grads, state, cut):
        value, norm = cut((value, optax.tree.norm(grads, squared=True)))
        return jax.tree.map(lambda p, g: p - value / (2 * norm) * g, params, grads), None

    params = maml(POLYAK).init(KEY).params
    whole, cut = (
        jax.jit(jax.grad(by_hand(MODEL, functools.partial(move, cut=c))))(params)
        for c in (lambda x: x, jax.lax.stop_gradient)
    )
    _, grads = meta_gradient(maml(POLYAK), maml(POLYAK).init(KEY), MixedFlow(store="host"))
    assert_close(grads.params, whole)
    assert abs(whole["head"] - cut["head"]).max() > 1e-3
    first_order = maml(POLYAK, first_order=True)
    _, grads = meta_gradient(first_order, first_order.init(KEY), MixedFlow())
    assert_close(grads.params, _first_order(params))


def _first_order(params):
    """The query gradient where the loop has ended: no step is differentiated."""
    support, query = support_and_query(MODEL)
    slope = jax.jit(jax.value_and_grad(support))
    for _ in range(2):
        value, grads = slope(params)
        step = value / (2 * optax.tree.norm(grads, squared=True))
        params = jax.tree.map(lambda p, g, step=step: p - step * g, params, grads)
    return jax.grad(query)(params)


def by_value(learning_rate, momentum=0.0):
    """Scale gradients by the loss, and carry how far what `update` gets is from what it says."""

    def begin(params):
        return jnp.zeros(())

    def move(updates, state, params=None, *, value, grad, value_fn):
        apart = [jnp.abs(value - value_fn(params))]
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), updates, grad)
        apart += jax.tree.leaves(differences)
        apart = jax.lax.stop_gradient(jnp.stack(apart).max())
        scale = -learning_rate * (1 + momentum) * value
        return jax.tree.map(lambda g: scale * g, updates), jnp.maximum(state, apart)

    return optax.GradientTransformationExtraArgs(begin, move)


def wanting_value(name):
    """An algorithm of the conformance tests whose inner optimizer wants the loss, and its tasks."""
    algorithm, tasks = ALGORITHMS[name].problem("linen")
    if name == "FDS":
        return dataclasses.replace(algorithm, optimizer=by_value), tasks
    if name == "LearnedOptimizer":
        rate = {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log")}
        return LearnedOptimizer(algorithm.problem, TunedRule(by_value, rate), 3), tasks
    return dataclasses.replace(algorithm, optimizer=by_value(0.1)), tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "MAML",
        "ANIL",
        "LearningRates",
        "FDS",
        "LearnedOptimizer",
        "example-weights",
        "token-weights",
    ],
)
def test_every_algorithm_passes_the_loss_its_gradient_is_of(name):
    algorithm, tasks = wanting_value(name)
    task = to_float64(jax.jit(tasks.sample)(jax.random.key(1)))
    eta = to_float64(jax.jit(algorithm.init)(KEY))

    def run(eta, engine):
        unroll = algorithm.unroll(task, KEY)
        return engine.value_and_grad(unroll, eta, algorithm.batches(task, KEY))

    (loss, aux), grads = jax.jit(run, static_argnums=1)(eta, MixedFlow())
    state = aux.state.optimizer
    assert state < 1e-12
    assert any((abs(leaf) > 1e-9).any() for leaf in jax.tree.leaves(grads))
    if name == "example-weights":  # leaves a path out, as the paper does
        return
    (expected, _), expected_grads = jax.jit(run, static_argnums=1)(eta, Reverse())
    assert_close((loss, grads), (expected, expected_grads), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_an_example_mean_passes_its_loss_part_by_part_too(averaged):
    algorithm, tasks = ALGORITHMS["LearningRates"].problem("linen")
    algorithm = dataclasses.replace(algorithm, optimizer=by_value(0.5), mean_over_examples=averaged)
    task = to_float64(tasks.sample(jax.random.key(1)))
    engine = MixedFlow(micro_batches=3) if averaged else MixedFlow()
    unroll, batches = algorithm.unroll(task, KEY), algorithm.batches(task, KEY)
    eta = to_float64(algorithm.init(KEY))
    (loss, aux), grads = jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches))(eta)
    expected = jax.jit(lambda eta: Reverse().value_and_grad(unroll, eta, batches))(eta)
    assert aux.state.optimizer < 1e-12
    assert_close((loss, grads), (expected[0][0], expected[1]), rtol=1e-8)


@pytest.mark.parametrize(
    "engine", quick(ENGINES[:3], lambda engine: engine == MixedFlow()), ids=IDS[:3]
)
def test_a_backtracking_line_search_is_differentiated(engine):
    """Its step size is one of a row of constants, so no derivative goes through the loop."""
    search = optax.scale_by_backtracking_linesearch(4, decrease_factor=0.5, store_grad=True)
    optimizer = optax.chain(optax.sgd(4.0), search)
    function = loop_of(optimizer, 2, given=("value", "grad", "value_fn"))
    agrees(maml(optimizer), function, engine, jax.jacfwd)


@pytest.mark.slow
def test_forward_mode_goes_through_the_line_search_of_lbfgs():
    optimizer = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(3))
    function = loop_of(optimizer, 2, given=("value", "grad", "value_fn"))
    agrees(maml(optimizer), function, Forward(), jax.jacfwd)


@pytest.mark.parametrize(
    "engine",
    quick([Reverse(remat="step"), *ENGINES[2:]], lambda engine: engine == MixedFlow()),
    ids=["Reverse", *IDS[2:]],
)
@pytest.mark.slow
def test_the_line_search_of_lbfgs_is_refused_where_the_backward_pass_cannot_go(engine):
    algorithm = maml(optax.lbfgs())
    message = (
        "An inner loop holds a `jax.lax.while_loop`, and JAX has no backward pass through one. "
        "The usual cause is a line search of the inner optimizer, such as that of `optax.lbfgs`. "
        "Use `Forward()`, which goes through it, an estimator such as `ES()`, or an optimizer "
        "without it: `optax.lbfgs(0.1, linesearch=None)`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        meta_gradient(algorithm, algorithm.init(KEY), engine)


@pytest.mark.slow
def test_lbfgs_without_a_line_search_is_differentiated():
    optimizer = optax.lbfgs(0.1, linesearch=None)
    agrees(maml(optimizer), loop_of(optimizer, given=()), MixedFlow())


@pytest.mark.slow
def test_sophia_and_opaque_sam_get_what_they_ask_for():
    sophia = contrib.sophia(0.1, eps=1e-3, update_interval=1)
    agrees(maml(sophia), loop_of(sophia, given=("obj_fn",)), Reverse())
    support, _ = support_and_query(MODEL)
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.1))
    sam = contrib.sam(optax.sgd(0.2), adversary, opaque_mode=True)

    def move(params, value, grads, state):
        grad_fn = lambda p, _: jax.grad(support)(p)  # noqa: E731
        updates, state = sam.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    agrees(maml(sam), by_hand(MODEL, move, begin=sam.init), MixedFlow())


def test_an_argument_that_nobody_passes_is_named():
    def update(updates, state, params=None, *, temperature):
        return updates, state

    strange = optax.GradientTransformationExtraArgs(lambda params: (), update)
    algorithm = maml(optax.chain(optax.sgd(0.1), strange))
    message = (
        "The optimizer's `update` asks for 'temperature'. An inner loop passes value, grad and "
        "value_fn to an optimizer whose `update` takes them"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        meta_gradient(algorithm, algorithm.init(KEY), MixedFlow())


@pytest.mark.slow
def test_multi_steps_hands_the_loss_on():
    optimizer = optax.MultiSteps(POLYAK, 2, accumulator_dtype=jnp.float64)
    agrees(maml(optimizer, inner_steps=4), loop_of(optimizer, 4), MixedFlow())


# Where a run is judged.


def test_lookahead_is_refused_by_name_inside_and_outside():
    fast = optax.chain(optax.clip(1.0), optax.lookahead(optax.sgd(0.1), 2, 0.5))
    way_out = "Take the fast optimizer by itself or"
    with pytest.raises(ValueError, match=f"^An inner loop carries one set of.*{way_out}"):
        maml(fast).unroll(episode(), KEY).init(maml(fast).init(KEY))
    with pytest.raises(ValueError, match=f"^The Trainer carries one set of.*{way_out}"):
        Trainer(Bowl(), Reverse(), fast).init(KEY)


def free(wrap=lambda optimizer: optimizer):
    return wrap(contrib.schedule_free_sgd(0.3, b1=0.7))


FREE = {
    "alone": (free(), lambda state: state),
    "in a chain": (free(lambda o: optax.chain(optax.clip(1.0), o)), lambda state: state[1]),
    "with hyperparameters": (
        optax.inject_hyperparams(contrib.schedule_free_sgd)(0.3, b1=0.7),
        lambda state: state.inner_state,
    ),
}


@pytest.mark.parametrize(
    "engine", quick(ENGINES[:3], lambda engine: engine == MixedFlow()), ids=IDS[:3]
)
@pytest.mark.parametrize("name", quick(FREE, lambda name: name == "in a chain"))
def test_schedule_free_is_judged_at_its_average(name, engine):
    optimizer, inside = FREE[name]

    def judged(params, state):
        return contrib.schedule_free_eval_params(inside(state), params)

    agrees(maml(optimizer, inner_steps=3), loop_of(optimizer, 3, judged), engine)


@pytest.mark.slow
def test_schedule_free_of_some_parameters_averages_those():
    optimizer = optax.multi_transform({"head": free(), "body": optax.sgd(0.1)}, labels)

    def judged(params, state):
        inner = state.inner_states["head"].inner_state
        head = contrib.schedule_free_eval_params(inner._replace(z=inner.z["head"]), params["head"])
        return {**params, "head": head}

    agrees(maml(optimizer, inner_steps=3), loop_of(optimizer, 3, judged), MixedFlow())


@pytest.mark.parametrize(
    "name",
    quick(["LearningRates", "token-weights", "FDS"], lambda name: name == "FDS"),
)
def test_every_algorithm_is_judged_where_its_optimizer_says(name):
    algorithm, tasks = ALGORITHMS[name].problem("linen")
    make = lambda learning_rate, momentum: free()  # noqa: E731
    optimizer = make if name == "FDS" else free()
    algorithm = dataclasses.replace(algorithm, optimizer=optimizer)
    task = to_float64(tasks.sample(jax.random.key(1)))
    unroll = algorithm.unroll(task, KEY)

    @jax.jit
    def run(eta):
        loss, aux = rollout(unroll, eta, algorithm.batches(task, KEY))
        state = aux.state
        judged = contrib.schedule_free_eval_params(state.optimizer, state.params)
        none = optax.sgd(0.1).init(judged)
        there, _ = unroll.loss(eta, state._replace(params=judged, optimizer=none))
        plain, _ = unroll.loss(eta, state._replace(optimizer=none))
        return loss, there, plain

    loss, there, plain = run(to_float64(algorithm.init(KEY)))
    np.testing.assert_allclose(loss, there, rtol=1e-12)
    assert abs(loss - plain) > 1e-6


@pytest.mark.parametrize("steps", quick([3, 4], lambda steps: steps == 3))
def test_sam_is_judged_where_it_comes_back_to(steps):
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.1))
    sam = contrib.sam(optax.sgd(0.2), adversary)
    support, query = support_and_query(MODEL)

    def run(params):
        for _ in range(steps // 2):  # a pair of steps is one of the paper's
            grads = jax.grad(support)(params)
            step = optax.tree.scale(0.1 / optax.tree.norm(grads), grads)
            there = optax.tree.add(params, step)
            params = jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(support)(there))
        return query(params)

    agrees(maml(sam, inner_steps=steps), run, MixedFlow())


@pytest.mark.parametrize("engine", ENGINES, ids=IDS)
def test_the_outer_loss_is_at_the_average_of_the_iterates(engine):
    steps, decay = 4, 0.5

    def move(params, value, grads, state):
        number, average = state
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        weight = max(1 / (number + 1), 1 - decay)
        moved = jax.tree.map(lambda a, p: a + weight * (p - a), average, params)
        return params, (number + 1, moved)

    run = by_hand(MODEL, move, steps, lambda params: (1, params), lambda _, state: state[1])
    agrees(maml(averaged(optax.sgd(0.1), decay), inner_steps=steps), run, engine)


def test_a_flattened_schedule_free_is_refused_by_name():
    flat = optax.flatten(free())
    message = (
        "`optax.contrib.schedule_free` is judged at parameters of its own, which it keeps as "
        "another tree than the model's"
    )
    for params in ({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, jnp.ones((2, 2))):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluation_params(flat.init(params), params)


# The outer side.


@dataclasses.dataclass(frozen=True)
class Bowl(Algorithm):
    """Two steps of gradient descent in a bowl that is learned to lie well."""

    def init(self, key):
        return {"x": jnp.array([1.0, -2.0]), "y": jnp.array(0.5)}

    def unroll(self, episode, key):
        def step(eta, state, batch, grad):
            return state - 0.1 * grad(lambda x: ((x - eta["x"]) ** 2).sum() + x.sum())(state)

        def loss(eta, state):
            return (state**2).sum() + (eta["y"] - 1) ** 2, {}

        return Unroll(lambda eta: 2 * eta["x"], step, loss)

    def batches(self, episode, key):
        return jnp.arange(2)


ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(0.05))
SAM = contrib.sam(optax.sgd(0.1), ADVERSARY)
OUTER = {
    "sam": SAM,
    "sam in a chain": optax.chain(optax.clip_by_global_norm(1.0), SAM),
    "polyak_sgd": optax.polyak_sgd(max_learning_rate=0.5),
    "plateau": optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()),
    "momo": contrib.momo(1.0),
    "lbfgs": optax.lbfgs(0.1, linesearch=None),
    "schedule_free": contrib.schedule_free_sgd(0.1),
    "MultiSteps": optax.MultiSteps(optax.polyak_sgd(0.5), 2),
}


def trained(optimizer, steps=4):
    trainer = Trainer(Bowl(), Reverse(), optimizer, tasks_per_step=1)
    return trainer, trainer.fit(TASKS["Sinusoid"], steps, key=KEY, progress=False)


@pytest.mark.parametrize("name", quick(OUTER, lambda name: name in ("polyak_sgd", "lbfgs")))
@pytest.mark.slow
def test_outer_optimizers_get_the_loss_where_they_take_it(name):
    algorithm, optimizer = Bowl(), OUTER[name]

    def loss(eta):
        unroll = algorithm.unroll(None, KEY)
        return rollout(unroll, eta, algorithm.batches(None, KEY))[0]

    takes = "sam" not in name
    eta = algorithm.init(KEY)
    state = optimizer.init(eta)
    slope = jax.jit(jax.value_and_grad(loss))
    for _ in range(4):
        value, grads = slope(eta)
        extra = {"value": value} if takes else {}
        updates, state = optimizer.update(grads, state, eta, **extra)
        eta = optax.apply_updates(eta, updates)
    _, ours = trained(optimizer)
    assert_close(ours.eta, eta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optax.lbfgs(),
            "The outer optimizer contains a line search, which takes the outer loss or its "
            "gradient at further points, and an outer step has those at eta alone. Take "
            "`optax.lbfgs(learning_rate, linesearch=None)`, or `optax.adam`.",
        ),
        (
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
            "The outer optimizer contains a line search",
        ),
        (contrib.sophia(0.1), "contains an estimate of the Hessian (`optax.contrib.sophia`)"),
        (
            contrib.sam(optax.sgd(0.1), ADVERSARY, opaque_mode=True),
            "contains `optax.contrib.sam(opaque_mode=True)`, which",
        ),
    ],
    ids=["lbfgs", "backtracking", "sophia", "opaque sam"],
)
def test_outer_optimizers_that_want_further_points_are_refused(optimizer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Trainer(Bowl(), Reverse(), optimizer).init(KEY)


@pytest.mark.slow
def test_the_trainer_says_which_eta_has_been_learned():
    trainer, state = trained(OUTER["schedule_free"])
    expected = contrib.schedule_free_eval_params(state.optimizer, state.eta)
    assert_close(trainer.learned(state), expected)
    assert abs(expected["x"] - state.eta["x"]).max() > 1e-4
    trainer, state = trained(OUTER["sam"], steps=3)
    assert_close(trainer.learned(state), trained(OUTER["sam"], steps=2)[1].eta)
    trainer, state = trained(OUTER["lbfgs"])
    assert_close(trainer.learned(state), state.eta)


@pytest.mark.slow
def test_held_out_tasks_judge_the_eta_that_has_been_learned(tmp_path):
    class Kept:
        def __init__(self):
            self.seen = {}

        def start(self, *_):
            pass

        def record(self):
            return {}

        def log(self, step, metrics):
            self.seen |= {k: v for k, v in metrics.items() if k == "eval/loss"}

        def finish(self, *_):
            pass

        abandon = back_to = finish

    trainer = Trainer(Bowl(), Reverse(), OUTER["schedule_free"], tasks_per_step=1)
    logger = Kept()
    state = trainer.fit(
        TASKS["Sinusoid"],
        3,
        key=KEY,
        progress=False,
        held_out=TASKS["Sinusoid"],
        eval_every=3,
        eval_tasks=2,
        loggers=[logger],
    )
    of = {
        name: trainer.evaluate(eta, TASKS["Sinusoid"], KEY, 2)["loss"].mean
        for name, eta in {"learned": trainer.learned(state), "state": state.eta}.items()
    }
    np.testing.assert_allclose(logger.seen["eval/loss"], of["learned"], rtol=1e-6)
    assert abs(of["learned"] - of["state"]) > 1e-5


@pytest.mark.slow
def test_truncated_runs_carry_the_state_of_an_optimizer_that_wants_the_loss():
    algorithm, tasks = wanting_value("LearnedOptimizer")
    rate = {"max_learning_rate": Hyperparameter(1e-3, 10.0, 1.0, space="log")}
    rule = TunedRule(functools.partial(optax.polyak_sgd, eps=1e-3), rate)
    algorithm = dataclasses.replace(algorithm, rule=rule, inner_steps=4)
    trainer = Trainer(algorithm, MixedFlow(), tasks_per_step=2, truncation=Truncation(2))
    state = trainer.fit(tasks, 3, key=KEY, progress=False)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.eta))
