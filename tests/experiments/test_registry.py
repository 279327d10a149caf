"""What is exported is found by configs: nothing else names an algorithm, a dataset or a network."""

import importlib.util
import json
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalearn.algorithms
import metalearn.datasets
from metalearn import Algorithm, Tasks
from metalearn.algorithms import sgd
from metalearn.datasets import ClassIndex, Sinusoid
from metalearn.experiments import build
from metalearn.experiments.build import registry
from metalearn.experiments.cli import arguments
from metalearn.experiments.commands import run
from metalearn.experiments.runs import load_run
from metalearn.models import linen_networks
from tests.helpers.command_line import call
from tests.helpers.small_configs import small

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

TOY = '''
"""Learn an initialisation, one step at a time."""

from __future__ import annotations

import dataclasses
import json

import jax
import optax

from metalearn import Algorithm, Unroll
from metalearn.algorithms.objectives import Objective
from metalearn.model import Model


@dataclasses.dataclass(frozen=True)
class OneStep(Algorithm):
    model: Model
    inner: optax.GradientTransformation
    objective: Objective
    scale: float = 1.0
    export_name = "one_step.json"

    def init(self, key):
        return self.model.init(key)[0]

    def batches(self, episode, key):
        return jax.random.split(key, 1)

    def unroll(self, episode, key):
        def loss_on(params, data):
            outputs, _ = self.model.apply(params, {}, data[0], train=True, key=key)
            return self.scale * self.objective(outputs, data[1])[0]

        def step(eta, state, batch, grad):
            updates, _ = self.inner.update(grad(loss_on)(state, episode.support), inner, state)
            return optax.apply_updates(state, updates)

        inner = self.inner.init(self.model.init(key)[0])
        return Unroll(lambda eta: eta, step, lambda eta, state: (loss_on(state, episode.query), {}))

    def outer_optimizer(self, optimizer):
        return optax.chain(optax.clip(1e-3), optimizer)

    def export(self, eta, path):
        path.write_text(json.dumps(len(jax.tree.leaves(eta))))
        return "the number of arrays"
'''


def export(monkeypatch, package, name, value):
    """Export a name, as a line in the package's `__init__` would."""
    monkeypatch.setattr(package, name, value, raising=False)
    monkeypatch.setattr(package, "__all__", [*package.__all__, name])


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    """An algorithm in a module of its own, exported and not named anywhere else."""
    (tmp_path / "one_step.py").write_text(TOY)
    spec = importlib.util.spec_from_file_location("one_step", tmp_path / "one_step.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "one_step", module)
    spec.loader.exec_module(module)
    export(monkeypatch, metalearn.algorithms, "OneStep", module.OneStep)
    return module.OneStep


def one_step_config():
    config = small("maml_sinusoid", **{"steps": 2, "test_tasks": 4, "eval_every": 0})
    config.health, config.wandb.mode, config.engine = False, "disabled", "reverse"
    inner = {"name": "sgd", "learning_rate": 0.1}
    config.algorithm = {"name": "one_step", "inner": inner, "objective": "squared_error"}
    return config


def test_an_exported_algorithm_trains_evaluates_and_exports_from_a_config(
    one_step, tmp_path, capsys
):
    workdir = tmp_path / "run"
    run.train(one_step_config(), workdir, progress=False)
    restored = load_run(workdir)
    learner = restored.trainer.algorithm
    assert isinstance(learner, one_step) and learner.scale == 1.0
    assert int(restored.state.step) == 2
    run.export(workdir)
    arrays = json.loads((workdir / "one_step.json").read_text())
    assert arrays == len(jax.tree.leaves(restored.state.eta))
    expected = f"{workdir / 'one_step.json'}: the number of arrays of outer step 2.\n"
    assert capsys.readouterr().out.endswith(expected)


def test_the_keys_of_an_exported_algorithm_are_its_arguments(one_step):
    config = one_step_config().to_dict()["algorithm"]
    with pytest.raises(
        ValueError,
        match=r"^The algorithm 'one_step' has no option 'x_y'. It has: "
        r"\['inner', 'objective', 'scale'\].$",
    ):
        build.algorithm({**config, "x_y": 1}, None)
    del config["inner"]
    with pytest.raises(ValueError, match="The algorithm 'one_step' needs inner, which this"):
        build.algorithm(config, None)


def test_an_exported_dataset_is_a_function_of_a_split(monkeypatch):
    def shapes(split: str, sides: int = 3) -> ClassIndex:
        images = np.full((6, 8, sides, sides, 1), len(split), np.uint8)
        return ClassIndex(images, np.full(6, 8, np.int32))

    def waves(split: str, shots: int) -> Sinusoid:
        return Sinusoid(shots, 3)

    export(monkeypatch, metalearn.datasets, "shapes", shapes)
    export(monkeypatch, metalearn.datasets, "waves", waves)
    few = {"ways": 5, "shots": 1, "queries": 2, "eval_queries": 3}
    data = build.splits({"name": "shapes", **few, "sides": 4})
    assert data.inputs.shape == (1, 4, 4, 1) and data.outputs == 5
    assert (data.train.queries, data.test.queries) == (2, 3)
    with pytest.raises(ValueError, match=r"no option 'size'. It has: \['ways', .*, 'sides'\]"):
        build.splits({"name": "shapes", **few, "size": 4})
    data = build.splits({"name": "waves", "shots": 2})
    assert isinstance(data.train, Tasks) and data.train == Sinusoid(2, 3)
    assert data.inputs == jax.ShapeDtypeStruct((1, 1), jnp.float32) and data.outputs == 1


def test_an_exported_network_is_sized_by_the_dataset(monkeypatch):
    class Line(nn.Module):
        outputs: int
        bias: bool = True

        @nn.compact
        def __call__(self, x, train=True):
            return nn.Dense(self.outputs, use_bias=self.bias)(x)

    export(monkeypatch, linen_networks, "Line", Line)
    splits = build.Splits(None, None, None, jax.ShapeDtypeStruct((1, 2), jnp.float32), 3)
    made = build.model({"name": "line", "library": "linen", "bias": False}, splits)
    params, _ = made.init(jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(2, 3)]
    with pytest.raises(ValueError, match="No network is called 'line'"):
        build.model({"name": "line", "library": "haiku"}, splits)


def test_an_algorithm_brings_nothing_beyond_training_unless_it_says_so():
    class Nothing(Algorithm):
        def init(self, key):
            return jnp.zeros(())

        def unroll(self, episode, key):
            raise NotImplementedError

    learner, optimizer = Nothing(), optax.sgd(0.1)
    assert learner.outer_optimizer(optimizer) is optimizer
    assert learner.outer_rules() == {} and learner.pictures() == {}
    assert learner.export_name is None
    with pytest.raises(NotImplementedError, match="Nothing has nothing to export"):
        learner.export(None, None)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_without_weight_decay_is_that_of_optax(options):
    assert registry.OPTIMIZERS["sgd"] is sgd
    params = {"w": jnp.linspace(-1.0, 1.0, 5)}
    ours, theirs = sgd(0.3, **options), optax.sgd(0.3, **options)
    states = ours.init(params), theirs.init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for n in range(3):
        both = zip((ours, theirs), states, strict=True)
        grads = {"w": jnp.cos(n + params["w"])}
        (u, a), (v, b) = (o.update(grads, s, params) for o, s in both)
        states = a, b
        assert (u["w"] == v["w"]).all()


def test_sgd_decays_weights_with_their_gradient():
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    optimizer = sgd(0.1, momentum=0.9, weight_decay=0.01)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    velocity = grads + 0.01 * params
    np.testing.assert_allclose(updates, -0.1 * velocity, rtol=1e-6)
    updates, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(updates, -0.1 * (0.9 * velocity + velocity), rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [None, 0.01])
def test_the_rate_of_sgd_falls_linearly_to_zero(weight_decay):
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    optimizer = sgd(0.1, weight_decay=weight_decay, decay_steps=4)
    state, velocity = optimizer.init(params), grads + (weight_decay or 0) * params
    for step in range(6):
        updates, state = optimizer.update(grads, state, params)
        rate = 0.1 * max(1 - step / 4, 0)
        np.testing.assert_allclose(updates, -rate * velocity, rtol=1e-6)


def test_a_decay_of_no_steps_or_of_a_rate_that_is_a_function_is_refused():
    with pytest.raises(ValueError, match=re.escape("`sgd(decay_steps=0)`: it is an integer, 1 or")):
        sgd(0.1, decay_steps=0)
    message = "`sgd(decay_steps=9)` lets a learning rate fall from a number to zero, but"
    with pytest.raises(ValueError, match=re.escape(message)):
        sgd(lambda step: 0.1, decay_steps=9)


COUNTED = """
import pathlib

from metalearn.experiments.configs import maml_sinusoid

with pathlib.Path(__file__).with_suffix(".txt").open("a") as file:
    file.write("executed\\n")


def get_config(option=""):
    config = maml_sinusoid.get_config()
    config.wandb.name = option
    return config
"""


@pytest.mark.parametrize("option", ["", ":mine"])
def test_a_config_file_is_executed_once(tmp_path, option, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(COUNTED)
    trained = []
    monkeypatch.setattr(run, "train", lambda config, *_: trained.append(config))
    config = f"{tmp_path / 'mine.py'}{option}"
    assert call("train", f"--config={config}", "--config.seed=3", f"--workdir={tmp_path}") == 0
    assert (tmp_path / "mine.txt").read_text() == "executed\n"
    assert trained[0].seed == 3 and trained[0].wandb.name == option[1:]
    assert config not in arguments.LOADED  # it has been handed over
