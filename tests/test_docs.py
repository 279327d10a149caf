"""The documentation's code runs, under every engine, and the README's commands exist."""

import ast
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Forward, MixedFlow, Reverse, Trainer
from metalearn.algorithms import load_optimizer, save_optimizer
from metalearn.datasets import Sinusoid
from metalearn.experiments.cli.arguments import packaged
from metalearn.models import Linen, train_flag
from metalearn.models.linen_networks import MLP
from tests.helpers.selection import quick

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "own_algorithm.py"


def example():
    return load("own_algorithm")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE.with_stem(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def algorithm():
    inputs = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return example().TunedAdaptation(Linen(MLP(1, hidden=(8,)), inputs, train_flag))


def gradient(algorithm, engine):
    trainer = Trainer(algorithm, engine)
    eta = trainer.init(jax.random.key(0)).eta
    return jax.jit(trainer.task_gradient)(eta, Sinusoid(), jax.random.key(1))[0]


@pytest.mark.parametrize(
    "engine",
    quick([Forward(), Forward(chunk=5), MixedFlow()], lambda engine: engine == MixedFlow()),
    ids=str,
)
def test_own_algorithm_has_one_meta_gradient_whatever_the_engine(algorithm, engine):
    expected = gradient(algorithm, Reverse())
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(algorithm, engine),
        expected,
    )


@pytest.mark.slow
def test_own_algorithm_learns(algorithm):
    trainer = Trainer(algorithm, MixedFlow(), optax.adam(1e-2), tasks_per_step=25)
    start = trainer.init(jax.random.key(0))
    state = trainer.fit(Sinusoid(), 500, key=jax.random.key(0), progress=False)
    before, after = (
        trainer.evaluate(eta, Sinusoid(), jax.random.key(2), 2000)["loss"]
        for eta in (start.eta, state.eta)
    )
    assert after.mean + after.ci95 < before.mean - before.ci95


@pytest.mark.slow
def test_own_parts_of_a_learned_optimizer_train_and_come_back_from_a_file(tmp_path):
    parts = load("own_learned_optimizer")
    for name, rule in parts.RULES.items():
        start, eta = rule.init(jax.random.key(0)), parts.train(rule, steps=2)
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), start, eta)))
        save_optimizer(tmp_path / name, rule, eta)
        loaded = load_optimizer(tmp_path / name, known=(parts.Agreement, parts.Decaying))
        params = {"w": jnp.ones(3)}
        updates, _ = loaded.update(params, loaded.init(params), params)
        assert (updates["w"] < 0).all()


def test_own_algorithm_takes_thirty_lines_of_code():
    tree = ast.parse(EXAMPLE.read_text())
    (algorithm,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert algorithm.end_lineno - algorithm.lineno + 1 <= 34  # four of them are blank


def test_readme_names_configs_and_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"--config=([a-z_]+)(?![a-z_/.])", text):
        assert name in packaged()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_code_of_the_readme_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "steps=500" in code
    shown = {}
    exec(compile(code.replace("steps=500", "steps=2"), "README.md", "exec"), shown)  # noqa: S102
    assert "+-" in capsys.readouterr().out
    assert shown["logits"].shape == (5 * 15, 5)


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_readme_has_no_number_left_to_fill_in():
    assert not re.findall(r"[A-Z]+_RESULT", (ROOT / "README.md").read_text())


@pytest.mark.slow
def test_custom_rules_are_as_the_documentation_shows_them():
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "custom_rules.md").read_text(), re.S
    )
    shown = {}
    exec("\n".join(blocks), shown)
    with pytest.raises(ValueError, match="declares the rule of `straight_through`"):
        shown["meta_gradient"](MixedFlow(true_rules=("straight_through",)))
