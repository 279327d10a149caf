"""Counts that are none, and sizes that cannot fit: refused in a paragraph, nothing allocated."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from metalearn import (
    ES,
    PES,
    Forward,
    Layout,
    MixedFlow,
    Reverse,
    Trainer,
    Truncation,
    make_mesh,
)
from metalearn._utils.checks import unusable
from metalearn._utils.trees import split_by_path
from metalearn.algorithms import (
    FDS,
    MAML,
    HypergradientRule,
    Hyperparameter,
    LearnedOptimizer,
    Supervised,
    TokenWeights,
    squared_error,
)
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import Sinusoid, TrainingRuns
from metalearn.diagnostics import memory
from metalearn.experiments import build
from metalearn.models import Architecture, Linen, linen_networks, train_flag
from metalearn.models.layouts import wide_blocks
from metalearn.sharding.batched_means import divisors
from metalearn.training.evaluation import estimate
from metalearn.training.faults import Faults
from tests.cases import MODELS
from tests.helpers.small_configs import small

KEY = jax.random.key(0)
MODEL = MODELS["Functions"]
RATE = {"learning_rate": Hyperparameter(0.0, 1.0, 0.1)}


def fit(steps, **options):
    return Trainer(MAML(MODEL)).fit(Sinusoid(), steps, key=KEY, **options)


MAKES = {  # what takes a count that is 1 or more
    "tasks_per_step": lambda n: Trainer(MAML(MODEL), tasks_per_step=n),
    "Trainer.chunk": lambda n: Trainer(MAML(MODEL), chunk=n),
    "segment": lambda n: Trainer(MAML(MODEL), Forward(), segment=n),
    "evaluate": lambda n: Trainer(MAML(MODEL)).evaluate(None, Sinusoid(), KEY, n),
    "estimate": lambda n: estimate(lambda keys: {}, KEY, n, 1),
    "inner_steps": lambda n: MAML(MODEL, inner_steps=n),
    "eval_steps": lambda n: MAML(MODEL, eval_steps=n),
    "FDS.inner_steps": lambda n: FDS(MODEL, RATE, n, 2),
    "FDS.batch": lambda n: FDS(MODEL, RATE, 10, n),
    "LearnedOptimizer.inner_steps": lambda n: LearnedOptimizer(
        Supervised(MODEL, squared_error, 2), HypergradientRule(), n
    ),
    "Supervised.batch": lambda n: Supervised(MODEL, squared_error, n),
    "Truncation.steps": lambda n: Truncation(n),
    "Truncation.shortest": lambda n: Truncation(1, n),
    "fit.eval_tasks": lambda n: fit(1, eval_tasks=n),
    "Faults.most": lambda n: Faults(most=n),
    "Faults.patience": lambda n: Faults(patience=n),
    "Checkpoints.keep": lambda n: Checkpoints("nowhere", {}, 1, n),
    "ES": lambda n: ES(n),
    "PES": lambda n: PES(n),
    "directions": lambda n: Forward(directions=n),
    "Forward.chunk": lambda n: Forward(chunk=n),
    "micro_batches": lambda n: MixedFlow(micro_batches=n),
    "Reverse.segment": lambda n: Reverse("nested", segment=n),
    "depth": lambda n: wide_blocks(n, 1),
    "layers": lambda n: Architecture(3, 4, n, 2),
    "width": lambda n: Architecture(3, n, 2, 1),
    "mesh.tasks": lambda n: make_mesh(n),
    "mesh.data": lambda n: make_mesh(data=n),
    "mesh.model": lambda n: make_mesh(model=n),
    "mesh.tangents": lambda n: make_mesh(tangents=n),
}
NONE_OF_THEM = (0, -1, True, False, 2.5, "3", float("nan"))


@pytest.mark.parametrize("name", MAKES)
def test_what_is_no_count_is_refused_by_a_sentence_and_not_by_python(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in NONE_OF_THEM:
        with pytest.raises(ValueError, match=r"[a-z)`].*\.$") as caught:
            MAKES[name](value)
        assert str(value) in str(caught.value) and "supported between" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: fit(n),
        lambda n: fit(1, log_every=n),
        lambda n: Forward(max_directions=n),
        lambda n: Reverse("nested", budget=n),
        lambda n: TokenWeights(sources=n),
        lambda n: Hyperparameter(0.0, 1.0, 0.5, shape=(n,)),
    ],
)
def test_a_number_that_may_be_none_at_all_is_an_integer_too(make):
    for value in (True, 2.5, "3", float("nan")):
        with pytest.raises(ValueError, match=r"integer|number of sources|tuple of sizes"):
            make(value)


def test_a_billion_is_refused_at_once_where_it_would_be_tried():
    began = time.monotonic()
    refused = {
        "takes 10,000,000 tasks at most, not 1,000,000,000": "tasks_per_step",
        "does not divide into chunks of 1000000000. Chunks that fit: 1, 2": "Trainer.chunk",
        "`evaluate(tasks=1000000000)`: it is 10000000 at most": "estimate",
        "`Trainer.fit(eval_tasks=1000000000)`: it is 10000000 at most": "fit.eval_tasks",
        "`ES(pairs=1000000000)`: it is 1000000 at most": "ES",
        "`Forward(directions=1000000000)`: it is 1000000 at most": "directions",
        "`WideResNet(depth=1000000000)`: it is 6000 at most": "depth",
    }
    for message, name in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            MAKES[name](10**9)
    with pytest.raises(ValueError, match="divide into truncations of 7. Lengths that fit: 1, 2, "):
        Truncation(7).check(10**9)
    with pytest.raises(ValueError, match="Chunks that fit: 1, 2, 4, 5, 8, 10, 16, 20, ..., 50"):
        Trainer(MAML(MODEL), tasks_per_step=10**7, chunk=3)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("library", build.LIBRARIES)
def test_a_network_of_a_billion_blocks_is_refused_before_the_first_is_made(library):
    config = {"name": "conv_net", "library": library, "filters": 2, "blocks": 10**9}
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    splits = build.Splits(None, None, None, image, 3)
    with pytest.raises(ValueError, match=r"`ConvNet\(blocks=1000000000\)`: it is 1000 at most"):
        jax.eval_shape(build.model(config, splits).init, KEY)


@pytest.mark.parametrize("number", [1, 2, 36, 97, 10_000])
def test_the_divisors_of_a_number_are_those_by_hand(number):
    found = divisors(number).split(", ")
    by_hand = [str(n) for n in range(1, number + 1) if number % n == 0]
    assert found == by_hand or (len(by_hand) > 16 and found == by_hand[:8] + ["..."] + by_hand[-8:])


# Memory: what every engine needs, against what there is.


@pytest.fixture
def eight_gibibytes(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 8 * 2**30)


def wide(width):
    image = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return Linen(linen_networks.MLP(1, (width, width)), image, train_flag)


def maml(model=MODEL, **options):
    return MAML(model, squared_error, optax.sgd(0.1), **options)


@pytest.mark.usefixtures("eight_gibibytes")
def test_an_eta_that_does_not_fit_is_refused_before_it_is_drawn():
    trainer = Trainer(maml(wide(10**9)))
    message = r"eta has 1,000,000,00\d,000,000,001 numbers and takes .* Ti?B with the outer opt"
    with pytest.raises(ValueError, match=message) as caught:
        trainer.init(KEY)
    assert "8.0 GiB" in str(caught.value) and "(1000000000, 1000000000)" in str(caught.value)
    Trainer(maml(wide(1000))).init(KEY)


@pytest.mark.usefixtures("eight_gibibytes")
@pytest.mark.parametrize(
    ("trainer", "tasks", "largest"),
    [
        (Trainer(maml(inner_steps=10**9)), Sinusoid(), "batches of 1,000,000,000 inner steps"),
        (Trainer(maml()), Sinusoid(shots=10**9), "examples (shots, queries"),
        (Trainer(maml()), Sinusoid(queries=10**9), "examples (shots, queries"),
        (Trainer(maml(wide(10**4)), tasks_per_step=10**4), Sinusoid(), "inner state (the model"),
        (
            Trainer(FDS(MODEL, RATE, 10**9, 2), tasks_per_step=1),
            TrainingRuns.create(np.ones((9, 5), np.float32), np.zeros(9), validation=2),
            "batches of 1,000,000,000 inner steps",
        ),
    ],
    ids=["inner_steps", "shots", "queries", "tasks", "horizon"],
)
def test_inner_runs_that_do_not_fit_are_refused_before_the_outer_step(trainer, tasks, largest):
    with pytest.raises(
        ValueError, match="An outer step takes .* at least, but there are 8.0 GiB"
    ) as e:
        trainer.fit(tasks, 1, key=KEY, progress=False)
    assert largest in str(e.value)


@pytest.mark.usefixtures("eight_gibibytes")
def test_an_evaluation_that_does_not_fit_is_refused_before_training():
    trainer = Trainer(maml(eval_steps=10**9), tasks_per_step=2)
    trainer.check_memory(Sinusoid())
    with pytest.raises(ValueError, match="An evaluation takes .* batches of 1,000,000,000 inner s"):
        trainer.check_memory(Sinusoid(), [Sinusoid()])
    with pytest.raises(ValueError, match="An evaluation takes"):
        trainer.fit(Sinusoid(), 1, key=KEY, held_out=Sinusoid(), eval_every=1, progress=False)


@pytest.mark.usefixtures("eight_gibibytes")
def test_what_is_there_once_or_taken_in_parts_is_not_counted_for_every_task():
    data = TrainingRuns.create(np.ones((2**20, 16, 16), np.uint8), np.zeros(2**20), validation=9)
    fds = FDS(MODEL, RATE, 10, 2)
    Trainer(fds, tasks_per_step=64).check_memory(data)  # 64 times the data would be 16 GiB
    long = FDS(MODEL, RATE, 10**9, 2)
    Trainer(long, Forward(), tasks_per_step=1, segment=1000).check_memory(data)
    Trainer(maml(inner_steps=10**9), tasks_per_step=1, truncation=Truncation(10)).check_memory(
        Sinusoid()
    )
    Trainer(maml(wide(10**4)), tasks_per_step=10**4, chunk=1).check_memory(Sinusoid())


def test_a_run_reads_no_more_examples_than_32_bits_count():
    FDS(MODEL, RATE, 2**30, 1)
    with pytest.raises(ValueError, match=r"`FDS` reads 1,000,000,000 x 64 examples in a run"):
        FDS(MODEL, RATE, 10**9, 64)
    support = np.ones((9, 5)), np.zeros(9), np.arange(9)
    problem = Supervised(MODEL, squared_error, 8)
    problem.check(support, 10**8)
    with pytest.raises(ValueError, match=r"`Supervised` reads 268,435,456 x 8 examples in a run"):
        problem.check(support, 2**28)


def test_what_takes_less_than_a_gibibyte_is_tried_on_any_device(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: 1)
    Trainer(maml()).check_memory(Sinusoid(), [Sinusoid()])
    with pytest.raises(ValueError, match="but there are 1 B"):
        Trainer(maml(), tasks_per_step=10**7).check_memory(Sinusoid())


def test_tasks_that_cannot_be_drawn_are_left_to_the_outer_step_to_refuse():
    class Broken(Sinusoid):
        def sample(self, key):
            raise RuntimeError("no such file")

    Trainer(maml()).check_memory(Broken())


def test_a_config_of_python_with_a_boolean_for_a_count_or_what_is_no_json_is_refused():
    for key in ("tasks_per_step", "seed", "steps", "log_every", "eval_tasks", "checkpoint_keep"):
        with pytest.raises(ValueError, match=f"^config.{key} takes an integer, .* not True"):
            build.to_json(small("maml_digits", **{key: True}))
    for value in ((np.int64(2),), (object(),), (1 + 2j,)):
        with pytest.raises(ValueError, match="this one holds what JSON does not: .*Write numbers"):
            build.to_json(small("maml_digits", **{"mesh.rules": value}))
    deep = functools.reduce(lambda inner, _: (inner,), range(5000), ())
    for nested in (deep, functools.reduce(lambda inner, _: (inner,), range(100), ())):
        with pytest.raises(ValueError, match="recursion depth|more than 64 deep"):
            build.to_json(small("maml_digits", **{"mesh.rules": nested}))


# Patterns for paths.

PATHS = {"params": {"body": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}}
CATASTROPHES = (
    *("(a+)+$", "(a|a)*b", "(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(.*)*x", "([a-z/]+)*\\d"),
    *("(a*){99}b", "(?:a?){50}a{50}", "a*" * 30 + "b", ".*.*.*.*.*.*=", "a?" * 40 + "a" * 40),
    *("(a|a)(a|a)(a|a)(a|a)b", "(" * 5000, "a" * 301, "(?=(a+))\\1*b"),
)


@pytest.mark.parametrize("pattern", CATASTROPHES, ids=lambda x: x[:20])
def test_a_pattern_that_could_take_for_ever_is_refused_wherever_it_comes_from(pattern):
    began = time.monotonic()
    reason = "repeats a group|more than 3 repeats|300 at most|no regular expression"
    with pytest.raises(ValueError, match=rf"`MAML\(adapted=.*\)`: .*({reason})"):
        MAML(MODEL, adapted=pattern)
    with pytest.raises(ValueError, match=rf"The rule .* is no regular .*({reason})"):
        Layout(make_mesh(1), ((pattern, P()),))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("pattern", [3, None, b"head", ["head"]])
def test_a_pattern_is_a_text(pattern):
    with pytest.raises(ValueError, match="it is a text, a regular expression, not "):
        MAML(MODEL, adapted=pattern)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", [2.0, 1.0, 4.0, 3.0]),
        (".*", [2.0, 1.0, 4.0, 3.0]),
        ("head", [4.0, 3.0]),
        ("kernel$", [1.0, 3.0]),
        ("^params/(body|head)/bias$", [2.0, 4.0]),
        ("body/.*/?kernel|head", [1.0, 4.0, 3.0]),
        ("b[a-z]+/kernel", [1.0]),
    ],
)
def test_patterns_find_parts_of_paths_as_they_did(pattern, found):
    assert not unusable(pattern)
    assert split_by_path(PATHS, pattern)[0] == found


@pytest.mark.parametrize("pattern", [".*.*.*~", "[a-z/]+[a-z/]+[a-z/]+~", "(a|b).*.*~"])
def test_the_slowest_patterns_that_are_taken_are_quick(pattern):
    began = time.monotonic()
    with pytest.raises(ValueError, match="No parameter path matches"):
        split_by_path({"a" * 100: {"b" * 20: 1.0}}, pattern)
    assert not unusable(pattern) and time.monotonic() - began < 5
