"""The pages of the documentation: their code runs, their commands exist, their algorithms learn."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Forward, MixedFlow, Reverse
from tests.helpers.selection import quick

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def python_blocks(page):
    """Return the Python of a page, its blocks joined."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    return "\n".join(blocks)


def run_page(page):
    """Run the Python of a page from top to bottom, and return its names."""
    names = {"__name__": page}
    exec(compile(python_blocks(page), page, "exec"), names)  # noqa: S102
    return names


# Recipe -> (the name of its tasks on the page, outer steps of the test, the metric that falls).
RECIPES = {
    "reptile": ("waves", 1000, "query_loss"),
    "protonet": ("classes", 100, "loss"),
    "imaml": ("waves", 200, "loss"),
    "ridge": ("SparseLines", 60, "loss"),
    "learned_loss": ("waves", 300, "loss"),
    "cavia": ("waves", 500, "loss"),
    "ridge_head": ("classes", 100, "loss"),
    "weighting": ("WrongLabels", 60, "loss"),
    "noise": ("SparseLines", 60, "loss"),
    "step_rates": ("waves", 500, "loss"),
    "misses": ("waves", 500, "loss"),
}
CONSTANT_END = ("reptile", "imaml")  # their outer loss takes the end of the loop for a constant


@functools.cache
def cookbook():
    """Return the names of the page of recipes; its last block, which trains one, is left out."""
    code = python_blocks("own_algorithm").partition("state = ridge.fit(")[0]
    names = {"__name__": "own_algorithm"}
    exec(compile(code, "own_algorithm", "exec"), names)  # noqa: S102
    return names


def recipe(name):
    """Return (trainer, tasks) of a recipe."""
    tasks = cookbook()[RECIPES[name][0]]
    return cookbook()[name], tasks() if isinstance(tasks, type) else tasks


def gradient(name, engine, eta=None):
    """Return (meta-gradient [n], outer loss as a function of eta [n]) of a recipe on one task."""
    trainer, tasks = recipe(name)
    trainer = dataclasses.replace(trainer, engine=engine)
    eta, unravel = ravel_pytree(trainer.algorithm.init(jax.random.key(1)))
    eta = eta + 0.05 * jax.random.normal(jax.random.key(2), eta.shape)  # generic: no entry is zero

    @jax.jit
    def solve(eta):
        grads, metrics = trainer.task_gradient(unravel(eta), tasks, jax.random.key(3))
        return ravel_pytree(grads)[0], metrics["loss"]

    return solve(eta)[0], eta, lambda eta: solve(eta)[1]


QUICK = ("protonet", "imaml", "ridge", "weighting", "step_rates")  # of each kind one
EXACT = quick([name for name in RECIPES if name != "misses"], lambda name: name in QUICK)


@pytest.mark.parametrize("name", EXACT)
def test_a_recipe_has_one_meta_gradient_and_it_is_the_derivative(name):
    grads, eta, loss = gradient(name, MixedFlow())
    expected, _, _ = gradient(name, Reverse())
    assert jnp.linalg.norm(grads) > 0
    np.testing.assert_allclose(grads, expected, atol=2e-4 * float(jnp.abs(expected).max()))
    if name not in CONSTANT_END:
        norm = float(jnp.linalg.norm(grads))
        direction, size = grads / norm, 0.01 / max(norm, 1)
        slope = float(loss(eta + size * direction) - loss(eta - size * direction)) / (2 * size)
        np.testing.assert_allclose(slope, norm, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "misses"])
def test_a_recipe_has_the_same_meta_gradient_in_forward_mode(name):
    grads, expected = gradient(name, Forward())[0], gradient(name, Reverse())[0]
    np.testing.assert_allclose(grads, expected, atol=2e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", quick(RECIPES, lambda name: name == "cavia"))
def test_a_recipe_learns(name):
    trainer, tasks = recipe(name)
    _, steps, metric = RECIPES[name]
    state = trainer.init(jax.random.key(0))
    before = trainer.evaluate(state.eta, tasks, jax.random.key(1), 500)[metric]
    state = trainer.fit(tasks, steps, state=state, progress=False)
    after = trainer.evaluate(trainer.learned(state), tasks, jax.random.key(1), 500)[metric]
    assert after.mean + after.ci95 < before.mean - before.ci95


def test_implicit_maml_agrees_with_the_unrolled_loop_where_that_has_converged():
    def gradient_of(implicit):
        trainer, tasks = recipe("imaml")
        algorithm = dataclasses.replace(
            trainer.algorithm, implicit=implicit, inner_steps=400, solver_steps=30
        )
        eta, trainer = (
            algorithm.init(jax.random.key(1)),
            dataclasses.replace(trainer, algorithm=algorithm),
        )
        grads, _ = jax.jit(trainer.task_gradient)(eta, tasks, jax.random.key(3))
        return ravel_pytree(grads)[0]

    expected = gradient_of(implicit=False)
    error = jnp.linalg.norm(gradient_of(implicit=True) - expected)
    assert error < 0.02 * jnp.linalg.norm(expected)


def test_example_weights_find_the_wrong_labels():
    trainer, tasks = recipe("weighting")
    eta = trainer.fit(tasks, 40, key=jax.random.key(0), progress=False).eta
    assert eta[::3].mean() < eta[1::3].mean() - 0.5 and eta[::3].mean() < eta[2::3].mean() - 0.5


def test_learned_noise_blurs_the_features_that_do_not_matter():
    trainer, tasks = recipe("noise")
    eta = trainer.fit(tasks, 60, key=jax.random.key(0), progress=False).eta
    assert (eta[1:] > eta[0] + 0.3).all()
