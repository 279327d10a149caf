"""Fast, slow and frozen parameters: what is frozen is an argument of the program, and no more."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import ES, Forward, MixedFlow, Reverse, Trainer, Truncation
from metalearn._utils.trees import paths, size
from metalearn.algorithms import (
    MAML,
    Hyperparameter,
    LearnedOptimizer,
    LearningRates,
    Supervised,
    Together,
    TunedRule,
    squared_error,
)
from metalearn.checkpoints import Checkpoints
from metalearn.datasets import Sinusoid
from metalearn.model import Model
from metalearn.models import Functions, with_params
from metalearn.sharding.layout import Layout
from metalearn.sharding.mesh import make_mesh
from metalearn.tasks import draw_episode
from tests.cases import Float64
from tests.helpers.selection import quick

KEY = jax.random.key(0)
WIDTH, TASKS = 16, Sinusoid(shots=3, queries=4)


def network(layers=1, width=WIDTH):
    """A tanh network of a first layer, a body of square matrices, and a head."""

    def init(key):
        first, head, *body = jax.random.split(key, layers + 2)
        return {
            "first": jax.random.normal(first, (1, width)),
            "body": [jax.random.normal(k, (width, width)) / math.sqrt(width) for k in body],
            "head": jax.random.normal(head, (width, 1)) / 8,
        }

    def apply(params, x):
        for matrix in (params["first"], *params["body"]):
            x = jnp.tanh(x @ matrix)
        return x @ params["head"]

    return Functions(init, apply)


def pretrained(layers=1, width=WIDTH):
    model = network(layers, width)
    return with_params(model, model.init(jax.random.key(1))[0])


def maml(model, *, inner_steps=2, **options):
    return MAML(model, squared_error, optax.adam(1e-2, eps_root=1e-6), inner_steps, **options)


def trainer(model, engine, *, options=None, **fields):
    return Trainer(maml(model, **fields), engine, tasks_per_step=2, **options or {})


FROZEN = {"adapted": "head", "learned": "first|head"}


def test_eta_holds_what_is_learned_and_the_inner_state_what_adapts():
    algorithm = maml(pretrained(3), **FROZEN)
    eta = algorithm.init(KEY)
    assert paths(eta.params) == ["first", "head"]
    task = TASKS.sample(KEY)
    state = algorithm.unroll(task, KEY).init(eta)
    assert [leaf.shape for leaf in state.params] == [(WIDTH, 1)]
    assert size(state.optimizer) == 2 * WIDTH + 1  # the moments of the head, and a count
    learned = Trainer(algorithm).init(KEY)
    assert size(learned.optimizer) == 2 * 2 * WIDTH + 1


@pytest.mark.parametrize(
    "engine",
    quick([Reverse(), Reverse(remat="step"), MixedFlow(), Forward()], lambda e: e == MixedFlow()),
    ids=str,
)
def test_the_meta_gradient_is_that_of_the_whole_network_where_it_is_learned(engine, x64):
    frozen = maml(Float64(pretrained()), **FROZEN)
    whole = maml(Float64(pretrained()), adapted="head")
    task = jax.tree.map(lambda x: x.astype(float), TASKS.sample(KEY))

    def solve(algorithm, engine):
        unroll, batches = algorithm.unroll(task, KEY), algorithm.batches(task, KEY)
        return jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches))(algorithm.init(KEY))

    (loss, _), grads = solve(frozen, engine)
    (expected_loss, _), expected = solve(whole, Reverse())
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    for name in ("first", "head"):
        np.testing.assert_allclose(grads.params[name], expected.params[name], rtol=1e-8, atol=1e-12)
    assert jnp.abs(grads.params["first"]).max() > 1e-6


def test_a_learner_has_the_frozen_body_and_the_loss_of_an_evaluation():
    model = pretrained(2)
    algorithm = maml(model, **FROZEN)
    eta = algorithm.init(KEY)
    losses = []
    for key in jax.random.split(KEY, 2):
        episode = draw_episode(TASKS, key)
        learner = algorithm.adapt(eta, episode.support, key)
        inputs, targets = episode.query
        losses.append(float(squared_error(learner.predict(inputs), targets)[0]))
    initial = model.init(KEY)[0]
    for name, same in (("first", True), ("body", True), ("head", False)):
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), learner.params[name], initial[name])
        assert all(jax.tree.leaves(equal)) == same
    expected = Trainer(algorithm, tasks_per_step=2).evaluate(eta, TASKS, KEY, 2)["loss"].mean
    np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-5)


def test_patterns_and_functions_of_a_path_choose_alike():
    by_function = maml(
        pretrained(),
        adapted=lambda path: path == "head",
        learned=lambda path: path in ("first", "head"),
    )
    etas = [a.init(KEY) for a in (by_function, maml(pretrained(), **FROZEN))]
    assert jax.tree.structure(etas[0]) == jax.tree.structure(etas[1])


def test_what_adapts_and_is_not_learned_begins_as_the_model_says_in_every_task():
    algorithm = maml(pretrained(), adapted="head", learned="first")
    eta = algorithm.init(KEY)
    assert paths(eta.params) == ["first"]
    state = algorithm.unroll(TASKS.sample(KEY), jax.random.key(9)).init(eta)
    np.testing.assert_array_equal(state.params[0], algorithm.model.params["head"])


def test_only_rates_may_be_learned():
    algorithm = maml(pretrained(), adapted="head", learned=lambda path: False, learned_rates=0.1)
    eta = algorithm.init(KEY)
    assert paths(eta) == ["rates/0"]
    grads, _ = jax.jit(Trainer(algorithm).task_gradient)(eta, TASKS, KEY)
    assert jnp.abs(grads.rates[0]).max() > 0


def test_what_is_frozen_and_drawn_at_random_is_refused():
    message = (
        "`MAML(adapted='head', learned='first|head')` leaves body/0 as the model initialises it, "
        "which is at random, anew for every task. Give the model its values, "
        "`with_params(model, params)` of `metalearn.models`; or learn it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        maml(network(), **FROZEN).init(KEY)
    body = {"body": network().init(KEY)[0]["body"]}
    maml(with_params(network(), body, partial=True), **FROZEN).init(KEY)


def test_a_path_that_nothing_matches_is_refused():
    with pytest.raises(ValueError, match="No parameter path matches 'tail'. There are: body/0,"):
        maml(pretrained(), learned="tail").init(KEY)
    with pytest.raises(ValueError, match=r"`MAML\(learned='\('\)`: it is no regular expression"):
        maml(pretrained(), learned="(")


def test_a_function_that_adapts_nothing_is_refused():
    with pytest.raises(ValueError, match="`MAML.adapted=nothing.` chooses none of body/0, first, "):

        def nothing(path):
            return False

        maml(pretrained(), adapted=nothing).init(KEY)


# Memory.

ENGINES = {"Reverse": Reverse(), "Reverse-step": Reverse(remat="step"), "MixedFlow": MixedFlow()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "adapted"),
    [(engine, adapted) for engine in ENGINES for adapted in ("head", "first|head")],
)
def test_a_body_ten_times_as_large_costs_its_activations_alone(engine, adapted):
    """With "first" the gradient passes through the body, so its activations are needed."""
    steps, layers, width, tasks = 8, (2, 20), 128, Sinusoid(shots=1, queries=2)
    temporaries, arguments, programs = [], [], []
    for count in layers:
        train = trainer(
            pretrained(count, width),
            ENGINES[engine],
            **{**FROZEN, "adapted": adapted},
            inner_steps=steps,
        )
        lowered = train.step.lower(train.shapes(tasks), tasks)
        memory = lowered.compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
        arguments.append(memory.argument_size_in_bytes)
        programs.append(len(lowered.as_text()))
    more = layers[1] - layers[0]
    body = more * width * width * 4
    activations = more * width * (1 + 2) * 4 * 2 * steps  # of two tasks, in all inner steps
    assert temporaries[1] - temporaries[0] < 2 * activations < body
    assert arguments[1] - arguments[0] == body  # once, and an argument
    assert programs[1] < 10 * programs[0]  # no array is written out in the program


# The constants reach every program of a trainer.


@dataclasses.dataclass(frozen=True, eq=False)
class Closed(Model):
    """The same model without constants: programs close over its arrays."""

    model: Model

    def init(self, key):
        return self.model.init(key)

    def apply(self, params, state, inputs, **mode):
        return self.model.apply(params, state, inputs, **mode)

    def constants(self):
        return ()


KINDS = {
    "whole": (Reverse(), {}),
    "chunks": (MixedFlow(), {"chunk": 1}),
    "segments": (Forward(max_directions=200), {"segment": 1}),
    "truncated": (MixedFlow(), {"truncation": Truncation(2)}),
    "devices": (MixedFlow(), {"layout": Layout(make_mesh(1))}),
    "estimate": (ES(pairs=2), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_passes_the_constants_to_every_program(kind, tmp_path):
    engine, options = KINDS[kind]
    runs = []
    for model in (pretrained(), Closed(pretrained())):
        train = trainer(model, engine, **FROZEN, inner_steps=4, options=options)
        path = tmp_path / type(model).__name__
        state = train.fit(
            TASKS,
            2,
            key=KEY,
            held_out=TASKS,
            eval_every=2,
            eval_tasks=4,
            check_every=2 if kind == "whole" else None,
            progress=False,
            checkpoints=Checkpoints(path, every=1),
        )
        runs.append((state, train.evaluate(state.eta, TASKS, KEY, 4), train))
        again = train.fit(TASKS, 2, key=KEY, progress=False, checkpoints=Checkpoints(path))
        jax.tree.map(np.testing.assert_array_equal, again.eta, state.eta)
    (ours, evaluated, train), (theirs, expected, closed) = runs
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours.eta, theirs.eta
    )
    np.testing.assert_allclose(evaluated["loss"].mean, expected["loss"].mean, rtol=1e-5)
    assert train.constants and not closed.constants


def test_any_algorithm_with_a_model_hands_its_constants_on():
    algorithm = LearningRates(pretrained(), squared_error)
    (name,) = algorithm.constants()
    assert name == "model"
    doubled = jax.tree.map(lambda x: 2 * x, algorithm.constants())
    params, _ = algorithm.bind(doubled).model.init(KEY)
    np.testing.assert_array_equal(params["head"], 2 * algorithm.model.params["head"])
    plain = LearningRates(network(), squared_error)
    assert plain.constants() == {} and plain.bind({}) is plain


@pytest.mark.slow
def test_a_learned_optimizer_hands_on_the_constants_of_its_problems():
    problem = Supervised(pretrained(), squared_error)
    rule = TunedRule(optax.sgd, {"learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log")})
    for whole in (problem, Together({"one": problem})):
        algorithm = LearnedOptimizer(whole, rule, inner_steps=2)
        (leaf, *_) = leaves = jax.tree.leaves(algorithm.constants())
        assert sum(leaf.size for leaf in leaves) == 2 * WIDTH + WIDTH**2
        doubled = algorithm.bind(jax.tree.map(lambda x: 2 * x, algorithm.constants()))
        np.testing.assert_array_equal(jax.tree.leaves(doubled.problem.init(KEY)[0])[0], 2 * leaf)
    plain = LearnedOptimizer(Supervised(network(), squared_error), rule, inner_steps=2)
    assert plain.bind(plain.constants()) is plain
