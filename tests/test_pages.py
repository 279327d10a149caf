"""The pages of the documentation: their code runs, their commands exist, their algorithms learn."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax.flatten_util import ravel_pytree

from metalearn import Forward, MixedFlow, Reverse
from metalearn.cost import cost
from metalearn.experiments import main
from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments
from tests.helpers.selection import quick

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def python_blocks(page):
    """Return the Python of a page, its blocks joined."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    return "\n".join(blocks)


OWN_TESTS = ("custom_rules", "few_shot_by_friday", "own_classes", "use_what_was_learned")
MINUTES = (  # or a good part of one, on a busy machine
    *(
        "adapt",
        "choosing_engine",
        "data",
        "coming_from",
        "few_shot",
        "learned_optimizers",
        "levels",
        "long_runs",
        "models",
    ),
    *("nan", "own_algorithm", "quickstart", "schedules", "tracking", "scaling", "runs", "replay"),
    *("approximate_hypergradients", "data_weights", "data_rater", "smoothness", "inner_optimizers"),
)
SEVERAL_DEVICES = ("devices", "scaling")
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if python_blocks(path.stem))
RUN_HERE = [page for page in PAGES if page not in (*OWN_TESTS, "devices")]


@pytest.mark.parametrize("page", quick(RUN_HERE, lambda page: page not in MINUTES))
@pytest.mark.filterwarnings("ignore:.*:metalearn.diagnostics.health.HealthWarning")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(page), page, "exec"), {"__name__": page})  # noqa: S102


@pytest.mark.slow
@pytest.mark.parametrize("page", SEVERAL_DEVICES)
def test_pages_on_devices_run_where_there_are_several(page, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code = python_blocks(page) + "\nassert layout.mesh.size == 4\n"
    run = [sys.executable, "-c", code]
    subprocess.run(run, check=True, cwd=tmp_path, env=environment, timeout=600)


def commands():
    """Return (page, command line) of each `metalearn` command in an indented block of a page."""
    found = []
    for path in sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        text = path.read_text().replace("\\\n", " ")
        lines = re.findall(r"^ {4}(?:srun )?(metalearn .*?)(?:  #.*)?$", text, re.MULTILINE)
        found += [(path.stem, line) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=str)
@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_a_command_of_a_page_has_options_and_keys_that_exist(page, line, monkeypatch):
    _, command, *options = words = shlex.split(line)
    assert command in main.COMMANDS
    monkeypatch.setattr(sys, "path", list(sys.path))
    values = [value for value in vars(main).values() if isinstance(value, flags.FlagHolder)]
    own = {value.name for value in values if command in main.OPTIONS.get(value.name, main.COMMANDS)}
    for option in options:
        name = re.match(r"--(?:no)?([\w-]+)", option)
        if name and not option.startswith(("--config", "--sweep.")):
            assert name[1].replace("-", "_") in own or name[0][2:].replace("-", "_") in own, option
    of_ones_own = re.compile(r"--config=(C$|.*[./])|.*=mine:")  # files that are not there
    if not any(map(of_ones_own.match, options)):
        words = [word for word in words if not word.startswith("--sweep.")]  # ranges, not values
        arguments.expanded(words, sections.renew, sections.nullable)


PICTURES = ("timelines", "inner_gradient", "decision")


def test_the_timelines_visit_every_step_backwards_and_save_what_the_engines_do():
    spec = importlib.util.spec_from_file_location("draw_timelines", DOCS / "draw_timelines.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    schedules = {
        "everything": drawing.save_everything(),
        "states": drawing.save_states(),
        "segments": drawing.save_segments(),
        "nested": drawing.save_nested(),
    }
    recomputed = {"everything": 0, "states": 1, "segments": 1, "nested": 2}
    for name, moments in schedules.items():
        backward = [moment for moment in moments if moment.kind == "backward"]
        assert [moment.step for moment in backward] == list(reversed(range(drawing.STEPS)))
        assert all(moment.step in moment.residuals for moment in backward)
        again = sum(moment.kind == "again" for moment in moments)
        assert again == recomputed[name] * drawing.STEPS
    most = {
        name: max(len(moment.states) for moment in moments) for name, moments in schedules.items()
    }
    segments = drawing.STEPS // drawing.SEGMENT
    assert most["states"] == drawing.STEPS and most["segments"] == segments
    assert most["nested"] == segments + drawing.SEGMENT - 1  # the first of a segment counts once
    assert {moment.kind for moment in drawing.push_forward()} == {"tangents"}
    assert set(PICTURES) <= {path.stem for path in (DOCS / "pictures").glob("*.png")}
    assert all((DOCS / "pictures" / f"{name}.png").stat().st_size < 60_000 for name in PICTURES)


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


QUICK = ("ridge", "step_rates")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns(name):
    trainer, tasks = recipe(name)
    _, steps, metric = RECIPES[name]
    state = trainer.init(jax.random.key(0))
    before = trainer.evaluate(state.eta, tasks, jax.random.key(1), 500)[metric]
    state = trainer.fit(tasks, steps, state=state, progress=False)
    after = trainer.evaluate(trainer.learned(state), tasks, jax.random.key(1), 500)[metric]
    assert after.mean + after.ci95 < before.mean - before.ci95


@pytest.mark.slow
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


@pytest.mark.slow
def test_implicit_maml_saves_no_inner_states_and_reptile_differentiates_no_loop():
    def compiled(name, **changes):
        trainer, tasks = recipe(name)
        algorithm = dataclasses.replace(trainer.algorithm, **changes)
        gradient = jax.jit(dataclasses.replace(trainer, algorithm=algorithm).task_gradient)
        arguments = algorithm.init(jax.random.key(0)), tasks, jax.random.key(1)
        if name == "reptile":
            return cost(gradient, *arguments).flops
        return gradient.lower(*arguments).compile().memory_analysis()

    short, long = (compiled("imaml", inner_steps=steps) for steps in (16, 256))
    grown = long.temp_size_in_bytes - short.temp_size_in_bytes
    assert grown <= 240 * 16  # what is recorded of a step, and not its state, of 49 numbers
    unrolled = compiled("imaml", inner_steps=256, implicit=False)
    assert unrolled.temp_size_in_bytes > 5 * long.temp_size_in_bytes

    one, two = (compiled("reptile", inner_steps=steps) for steps in (1, 2))
    passes = cost(jax.jit(jax.grad(reptile_error)), *reptile_inputs()).flops
    assert two - one == passes  # an inner gradient for each step


def reptile_error(params, support):
    return recipe("reptile")[0].algorithm.error(params, support)


def reptile_inputs():
    trainer, tasks = recipe("reptile")
    return trainer.algorithm.init(jax.random.key(0)), tasks.sample(jax.random.key(1)).support


@pytest.mark.slow
def test_example_weights_find_the_wrong_labels():
    trainer, tasks = recipe("weighting")
    eta = trainer.fit(tasks, 40, key=jax.random.key(0), progress=False).eta
    assert eta[::3].mean() < eta[1::3].mean() - 0.5 and eta[::3].mean() < eta[2::3].mean() - 0.5


@pytest.mark.slow
def test_learned_noise_blurs_the_features_that_do_not_matter():
    trainer, tasks = recipe("noise")
    eta = trainer.fit(tasks, 60, key=jax.random.key(0), progress=False).eta
    assert (eta[1:] > eta[0] + 0.3).all()
