"""Defaults are printed as a person reads them: no address, in no process another text."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalearn
from metalearn import Trainer, algorithms, checkpoints, datasets, engines, loggers, models
from metalearn._utils.readable import described, readable, show
from metalearn.algorithms import FDS, MAML, Hyperparameter, LearningRates, LossWeights, TokenWeights
from metalearn.models import Architecture, Functions

MODULES = (metalearn, algorithms, models, datasets, engines, loggers, checkpoints)
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
}


def begin(key):
    return {"w": jnp.zeros(())}


def line(params, x):
    return params["w"] * x


MODEL = Functions(begin, line)
RATE = {"learning_rate": Hyperparameter(0.0, 1.0, 0.1)}
INSTANCES = (
    MAML(MODEL),
    LearningRates(MODEL),
    LossWeights(MODEL, TokenWeights()),
    FDS(MODEL, RATE, 2, 2, functools.partial(optax.adamw, b1=0.5)),
    algorithms.TunedRule(optax.sgd, RATE),
    algorithms.Supervised(MODEL),
    algorithms.Streamed(MODEL),
    Architecture(3, 4, 1, 1),
)


@pytest.mark.parametrize("name", PUBLIC)
def test_no_signature_shows_an_address(name):
    shown = [PUBLIC[name]]
    if inspect.isclass(PUBLIC[name]):
        methods = inspect.getmembers(PUBLIC[name], inspect.isroutine)
        shown += [value for key, value in methods if key == "__init__" or key[0] != "_"]
    for function in shown:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of a built-in
            continue
        assert " at 0x" not in str(signature), function


@pytest.mark.parametrize("part", INSTANCES, ids=lambda part: type(part).__name__)
def test_no_repr_of_an_instance_shows_an_address(part):
    assert " at 0x" not in repr(part)


def test_a_trainer_is_printed_as_it_was_written():
    trainer = Trainer(MAML(MODEL), metalearn.Reverse())
    assert repr(trainer).startswith(
        "Trainer(algorithm=MAML(model=Functions(init_fn=begin, apply_fn=line), "
        "objective=cross_entropy, optimizer=sgd(0.4), inner_steps=1, "
    )
    assert "optimizer=adam(0.001), tasks_per_step=16" in repr(trainer)
    assert "optimizer: 'optax.GradientTransformation' = sgd(0.4)" in str(inspect.signature(MAML))
    assert MAML(MODEL).objective is algorithms.cross_entropy


def test_a_described_optimizer_is_the_optimizer():
    for make in (optax.sgd, optax.adam):
        ours, theirs = described(make, 0.1), make(0.1)
        assert isinstance(ours, type(theirs)) and len(ours) == 2
        params = {"w": jnp.arange(3.0)}
        state = ours.init(params)
        assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))
        updates, _ = jax.jit(ours.update)(params, state, params)
        expected, _ = jax.jit(theirs.update)(params, theirs.init(params), params)
        np.testing.assert_array_equal(updates["w"], expected["w"])
    assert repr(described(optax.adam, 0.1, eps_root=1e-8)) == "adam(0.1, eps_root=1e-08)"


def test_functions_are_shown_by_name_and_hidden_fields_are_not_shown():
    @readable
    @dataclasses.dataclass(frozen=True)
    class Part:
        activation: object = jax.nn.relu
        hidden: int = dataclasses.field(default=3, repr=False)

    assert repr(Part()).endswith("Part(activation=relu)")
    assert str(inspect.signature(Part)) == "(activation: object = relu, hidden: int = 3) -> None"
    default = inspect.signature(Part).parameters["activation"].default
    assert default(-1.0) == 0.0
    assert show(object()) == "<object object>"
