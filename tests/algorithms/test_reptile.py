"""Reptile: what its outer step is, whichever engine takes it, and that it learns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Episode, Forward, MixedFlow, Reverse, Trainer
from metalearn.algorithms import MAML, Reptile, squared_error
from metalearn.cost import cost
from metalearn.datasets import Sinusoid
from metalearn.experiments import build
from tests.cases import MODELS, TASKS, Float64, mlp, to_float64

pytestmark = pytest.mark.usefixtures("x64")
MODEL = Float64(MODELS["Functions"])
KEY = jax.random.key(0)


def reptile(**options):
    return Reptile(MODEL, squared_error, optax.sgd(0.1), **{"inner_steps": 3, **options})


def episode():
    return to_float64(TASKS["Sinusoid"].sample(jax.random.key(1)))


def solve(algorithm, eta, engine):
    unroll, batches = algorithm.unroll(episode(), KEY), algorithm.batches(episode(), KEY)
    return jax.jit(lambda eta: engine.value_and_grad(unroll, eta, batches))(eta)


@pytest.mark.parametrize("engine", [Reverse(), MixedFlow(), Forward()], ids=repr)
@pytest.mark.slow
def test_the_meta_gradient_is_the_way_from_the_end_of_the_loop_to_its_beginning(engine):
    algorithm = reptile()
    eta = algorithm.init(KEY)
    (loss, aux), grads = solve(algorithm, eta, engine)
    (maml_loss, maml_aux), _ = solve(algorithm.maml, eta, Reverse())
    way = jnp.concatenate(
        [
            (start - end).ravel()
            for start, end in zip(jax.tree.leaves(eta), maml_aux.state.params, strict=True)
        ]
    )
    np.testing.assert_allclose(ravel_pytree(grads)[0], way, rtol=1e-12)
    np.testing.assert_allclose(loss, maml_loss, rtol=1e-14)
    assert aux.metrics.keys() == maml_aux.metrics.keys()


def test_with_one_step_it_is_the_gradient_of_the_support_loss_times_the_inner_rate():
    algorithm = reptile(inner_steps=1)
    eta = algorithm.init(KEY)
    _, grads = solve(algorithm, eta, MixedFlow())

    def support_loss(params):
        inputs, targets = episode().support
        return squared_error(MODEL.apply(params, {}, inputs, train=True)[0], targets)[0]

    expected = ravel_pytree(jax.grad(support_loss)(eta.params))[0]
    np.testing.assert_allclose(ravel_pytree(grads)[0], 0.1 * expected, rtol=1e-12)


def test_an_outer_step_of_sgd_moves_the_initialisation_towards_the_end_of_the_loop():
    trainer = Trainer(reptile(), optimizer=optax.sgd(0.25), tasks_per_step=1)
    before, tasks = trainer.init(KEY), TASKS["Sinusoid"]
    after, _ = trainer.step(before, tasks)
    key = trainer.task_keys(before)[0]
    support, _ = tasks.sample(jax.random.split(key, 4)[0])
    end = trainer.algorithm.adapt(before.eta, support, key).params
    start = before.eta.params
    moved = jax.tree.map(lambda p, q: p + 0.25 * (q - p), start, end)
    np.testing.assert_allclose(ravel_pytree(after.eta.params)[0], ravel_pytree(moved)[0], rtol=1e-5)


@pytest.mark.slow
def test_it_costs_no_backward_pass_of_the_loop():
    """In FLOPs an outer step is close to the loop itself, far below that of MAML."""
    model = Float64(mlp("linen"))
    kind = {"optimizer": optax.sgd(0.1), "inner_steps": 4}
    eta = Reptile(model, squared_error, **kind).init(KEY)

    def flops(algorithm):
        unroll, batches = algorithm.unroll(episode(), KEY), algorithm.batches(episode(), KEY)
        step = jax.jit(lambda eta: Reverse().value_and_grad(unroll, eta, batches)[1])
        return cost(step, eta).flops

    assert flops(Reptile(model, squared_error, **kind)) < 0.6 * flops(
        MAML(model, squared_error, **kind)
    )


@pytest.mark.slow
def test_it_learns_an_initialisation_that_adapts():
    waves = Sinusoid(shots=10, queries=10)
    model = mlp("linen")
    algorithm = Reptile(model, squared_error, optax.sgd(0.02), inner_steps=8, batch=5)
    trainer = Trainer(algorithm, optimizer=optax.sgd(0.5), tasks_per_step=8)
    state = trainer.fit(waves, 600, key=KEY, progress=False)
    before = trainer.evaluate(trainer.init(KEY).eta, waves, KEY, 200)["loss"].mean
    assert trainer.evaluate(state.eta, waves, KEY, 200)["loss"].mean < 0.9 * before


def test_evaluations_take_their_own_number_of_steps():
    algorithm = reptile(eval_steps=7)
    assert algorithm.evaluation().inner_steps == 7
    learner = algorithm.adapt(algorithm.init(KEY), episode().support, KEY)
    assert learner.steps == 7


@pytest.mark.parametrize("field", ["inner_steps", "eval_steps", "batch"])
def test_counts_below_one_are_refused(field):
    message = f"`Reptile({field}=0)`: it is an integer, 1 or more."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reptile(**{field: 0})


def test_a_config_names_it():
    config = {
        "name": "reptile",
        "objective": "squared_error",
        "optimizer": {"name": "adam", "learning_rate": 1e-3, "b1": 0.0},
        "inner_steps": 4,
        "batch": 2,
    }
    made = build.algorithm(config, MODEL)
    assert isinstance(made, Reptile) and made.batch == 2 and made.objective is squared_error


def test_an_evaluation_may_take_smaller_batches_than_training():
    algorithm = reptile(batch=3, eval_batch=1, eval_steps=4)
    support = jax.tree.map(lambda leaf: leaf[:2], episode().support)
    rows = algorithm.evaluation().batches(Episode(support, None), KEY)[1]
    assert rows.shape == (4, 1)
    assert algorithm.batches(episode(), KEY)[1].shape == (3, 3)
    learner = algorithm.adapt(algorithm.init(KEY), support, KEY)
    assert learner.steps == 4
    with pytest.raises(ValueError, match="batch=3, but there are 2 training examples"):
        reptile(batch=3).adapt(algorithm.init(KEY), support, KEY)
    with pytest.raises(ValueError, match="eval_batch=0"):
        reptile(eval_batch=0)
