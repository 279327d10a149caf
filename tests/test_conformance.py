"""Every algorithm under every engine, with a model of every library, in float64.

All engines return the same derivative, to rounding, and it is the derivative of the
loss that they return. A class of ours without a case in `tests/cases.py` fails here.
"""

import functools
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import Algorithm, MetaGradient, Reverse, Tasks
from metalearn.engines.inner_loop import rollout
from metalearn.model import Model
from tests import cases
from tests.cases import (
    ADAPTED,
    ALGORITHMS,
    APPROXIMATE,
    ENGINES,
    ESTIMATORS,
    LIBRARIES,
    MODELS,
    TASKS,
)
from tests.helpers.selection import quick

pytestmark = pytest.mark.usefixtures("x64")
# Each algorithm, and each engine, in every library: a library does not know which of the engines
# differentiates it, so that their product is that of one library.
PAIRS = [(name, library) for name in ALGORITHMS for library in ADAPTED]
REVERSE = Reverse()
# What compiles longest and has a quick sibling: tests of its own, or the same algorithm above.
LARGE = (
    *("LearnedOptimizer", "example-weights", "token-weights", "LearningRates-ConvNet"),
    *("mini-batches", "MAML++", "MAML++-annealing", "CAVIA", "MetaCurvature"),
    *("running", "LoRA", "Trainable", "Meta-SGD", "LearningRates", "Reptile"),
    *("LearnedLoss", "LearnedLoss-classes", "COMLN", "MetaNTK", "MetaNTK-classes"),
    *("DataWeights", "DataRater", "ProtoNet"),
)
EXACT_PAIRS = quick(
    [
        (name, library)
        for name, library in PAIRS
        if ALGORITHMS[name].exact and (library == "linen" or name in ("MAML", "running"))
    ],
    lambda name, library: library == "linen" and name not in LARGE,
)
# One algorithm with the settings that no test of scenarios has, all but the largest with mixed
# flow, one in every library.
MET = ("Forward-chunk", "MixedFlow-host")
SETTINGS = quick(
    [
        (name, library, engine)
        for name, library in PAIRS
        for engine in ENGINES
        if engine != "Reverse" and (library == "linen" or name == "MAML" or engine == "MixedFlow")
    ],
    lambda name, library, engine: (
        (library == "linen" and name == "MAML-adam" and engine in MET)
        or (library == "linen" and name not in LARGE and engine == "MixedFlow")
        or (name == "MAML" and engine == "MixedFlow")
    ),
)


@functools.cache
def problem(case, library):
    """Return (algorithm, eta, episode, key). Eta is generic: no bias is zero."""
    algorithm, tasks = case.problem(library)
    keys = jax.random.split(jax.random.key(7), 4)
    flat, unravel = ravel_pytree(jax.jit(algorithm.init)(keys[0]))
    eta = unravel(flat + 0.1 * jax.random.normal(keys[1], flat.shape))
    return algorithm, eta, cases.to_float64(jax.jit(tasks.sample)(keys[2])), keys[3]


@functools.cache
def solved(case, library, engine=REVERSE):
    """Return ((loss, aux), gradient) as one compiled call gives them."""
    algorithm, eta, episode, key = problem(case, library)

    @jax.jit
    def solve(eta, episode):
        unroll = algorithm.unroll(episode, key)
        return engine.value_and_grad(unroll, eta, algorithm.batches(episode, key))

    return solve(eta, episode)


def relative_error(tree, expected):
    tree, expected = ravel_pytree(tree)[0], ravel_pytree(expected)[0]
    assert tree.dtype == expected.dtype == np.float64
    if not expected.size:  # without inner steps there are no inner losses
        return float(tree.size)
    return float(jnp.linalg.norm(tree - expected) / jnp.linalg.norm(expected))


def assert_same(ours, expected):
    (loss, aux), grads = ours
    (expected_loss, expected_aux), expected_grads = expected
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    assert relative_error(grads, expected_grads) < 1e-10
    assert relative_error(loss, expected_loss) < 1e-12
    assert relative_error(aux.state.params, expected_aux.state.params) < 1e-12
    assert relative_error(aux.inner.losses, expected_aux.inner.losses) < 1e-12
    assert relative_error(aux.inner.update_norm, expected_aux.inner.update_norm) < 1e-10
    assert aux.inner.finite.all() and expected_aux.inner.finite.all()


@pytest.mark.parametrize(("name", "library", "engine"), SETTINGS)
def test_engines_agree_with_reverse_mode(name, library, engine):
    case = ALGORITHMS[name]
    assert_same(solved(case, library, ENGINES[engine]), solved(case, library))


@pytest.mark.parametrize(
    "engine", quick(["Reverse-nested", "Forward", "MixedFlow"], lambda e: e == "MixedFlow")
)
def test_engines_agree_on_a_convolution_network_with_batch_statistics(engine):
    expected = solved(cases.CONV_MAML, "linen")
    assert_same(solved(cases.CONV_MAML, "linen", ENGINES[engine]), expected)


@pytest.mark.parametrize(("name", "library"), EXACT_PAIRS)
def test_gradient_matches_central_differences(name, library):
    algorithm, eta, episode, key = problem(ALGORITHMS[name], library)
    flat, unravel = ravel_pytree(eta)

    @jax.jit
    @jax.vmap
    def value(point):
        batches = algorithm.batches(episode, key)
        return rollout(algorithm.unroll(episode, key), unravel(point), batches)[0]

    directions, step = jax.random.normal(key, (3, flat.size)), 1e-5
    high, low = (value(flat[None] + s * step * directions).reshape(3) for s in (1, -1))
    grads = ravel_pytree(solved(ALGORITHMS[name], library)[1])[0]
    assert jnp.linalg.norm(grads) > 1e-3  # there is something to compare
    assert relative_error(directions @ grads, (high - low) / (2 * step)) < 1e-5


@pytest.mark.parametrize("library", quick(LIBRARIES, lambda library: library == "linen"))
def test_first_order_gradient_is_the_query_gradient_at_the_adapted_parameters(library):
    """Central differences do not apply: it leaves out how adaptation depends on eta."""
    case = ALGORITHMS["first-order"]
    algorithm, eta, episode, key = problem(case, library)
    (_, aux), grads = solved(case, library)

    def query_loss(params):
        state = aux.state._replace(params=params)
        return algorithm.unroll(episode, key).loss(eta, state)[0]

    assert relative_error(grads, jax.jit(jax.grad(query_loss))(aux.state.params)) < 1e-12
    assert relative_error(grads, solved(ALGORITHMS["MAML"], library)[1]) > 1e-3


# One algorithm with every estimator; with persistent particles, which is where something can get
# lost, one with a model state and one that learns a tree. The rest is slow.
ESTIMATED = quick(
    [(name, engine) for name in ALGORITHMS for engine in ESTIMATORS],
    lambda name, engine: name == "MAML",
)


def shapes(tree):
    return jax.eval_shape(lambda tree: tree, tree)


@pytest.mark.parametrize(("name", "engine"), ESTIMATED)
def test_estimators_serve_every_algorithm_and_hand_back_a_state_like_the_one_given(name, engine):
    algorithm, eta, episode, key = problem(ALGORITHMS[name], "linen")

    def solve(engine, eta, episode):
        unroll, batches = algorithm.unroll(episode, key), algorithm.batches(episode, key)
        state = engine.init(key, unroll, eta)
        return state, engine.value_and_grad(unroll, eta, batches, state)

    run = jax.jit(functools.partial(solve, ESTIMATORS[engine]))
    state, ((loss, aux), grads) = run(eta, episode)
    _, ((_, expected), _) = jax.eval_shape(functools.partial(solve, REVERSE), eta, episode)
    assert shapes(aux.engine) == shapes(state)
    assert shapes(grads) == shapes(eta)
    assert shapes(aux.state) == expected.state
    assert shapes(aux.inner) == expected.inner
    assert aux.metrics.keys() - {"pathwise_weight"} == expected.metrics.keys()
    assert jnp.isfinite(loss) and aux.inner.finite.all()
    assert jnp.isfinite(ravel_pytree(grads)[0]).all() and jnp.any(ravel_pytree(grads)[0] != 0)


NO_STEPS = "takes none (T = 0)"
# An approximate engine serves an algorithm, or says at trace time what it would not see. Which:
REFUSED = {
    **{name: "is read by `Unroll.init` alone" for name in ALGORITHMS},
    "iMAML": "",  # its proximal term reads theta_0 in every step
    "Reptile": "",  # and so does the outer loss
    "CAVIA": "",
    "FDS": "",
    "DataWeights": "",
    "DataRater": "",
    "LearnedOptimizer": "",
    **dict.fromkeys(("LearningRates", "LearningRates-ConvNet", "Trainable"), ""),
    **dict.fromkeys(("example-weights", "token-weights"), ""),
    **dict.fromkeys(("LearnedLoss", "LearnedLoss-classes"), ""),
    "COMLN": "no step changes it, and it is read afterwards",
    **dict.fromkeys(("ProtoNet", "R2D2", "MetaNTK", "MetaNTK-classes"), NO_STEPS),
}
COUNTS = "the inner state has no fixed point as a whole"
# Of the running sum of training losses, with `variables`; and the last update is in no loss of it.
SUMMED = ("but the outer loss reads it", "through earlier steps alone")


@pytest.mark.parametrize(
    ("name", "engine"),
    quick(
        [(name, engine) for name in ALGORITHMS for engine in APPROXIMATE],
        lambda name, engine: name in ("MAML", "Meta-SGD") or (name, engine) == ("FDS", "Truncated"),
    ),
)
def test_approximate_engines_serve_an_algorithm_or_say_what_they_would_not_see(name, engine):
    algorithm, eta, episode, key = problem(ALGORITHMS[name], "linen")

    def solve(eta, episode):
        unroll, batches = algorithm.unroll(episode, key), algorithm.batches(episode, key)
        state = APPROXIMATE[engine].init(key, unroll, eta)
        return APPROXIMATE[engine].value_and_grad(unroll, eta, batches, state)

    try:
        (loss, aux), grads = jax.jit(solve)(eta, episode)
    except ValueError as error:
        reasons = REFUSED[name] or COUNTS, COUNTS, *(SUMMED if name == "LearnedOptimizer" else ())
        assert any(reason in str(error) for reason in reasons)
        return
    whole = REFUSED[name] == NO_STEPS and "Truncated" in engine  # all of the last T = 0 steps
    assert not REFUSED[name] or whole
    (expected, expected_aux), _ = solved(ALGORITHMS[name], "linen")
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(aux.state.params, expected_aux.state.params) < 1e-12
    assert relative_error(aux.inner.losses, expected_aux.inner.losses) < 1e-12
    assert shapes(grads) == shapes(eta) and jnp.isfinite(ravel_pytree(grads)[0]).all()
    assert jnp.any(ravel_pytree(grads)[0] != 0)


# What has a case.

BASES = (Algorithm, MetaGradient, Model, Tasks)
WITH_A_CASE = {
    type(instance)
    for instance in (
        *(case.problem("linen")[0] for case in ALGORITHMS.values()),
        *ENGINES.values(),
        *ESTIMATORS.values(),
        *APPROXIMATE.values(),
        *MODELS.values(),
        *TASKS.values(),
    )
}


def public_classes(package):
    """Return the concrete subclasses of `BASES` that a package and its modules define."""
    names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    library = [n for n in names if not re.match(r"metalearn\.(experiments|__main__)", n)]
    modules = [package, *map(importlib.import_module, library)]
    return {
        value
        for module in modules
        for name, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, BASES)
        and not inspect.isabstract(value)
        and not name.startswith("_")
        and value.__module__ == module.__name__
    }


def test_every_public_class_has_a_case():
    import metalearn

    found = public_classes(metalearn)
    assert {base for base in BASES if any(issubclass(c, base) for c in found)} == set(BASES)
    missing = sorted(c.__qualname__ for c in found - WITH_A_CASE)
    assert not missing, f"Give {', '.join(missing)} a case in tests/cases.py."


def test_the_walk_finds_a_new_class_wherever_it_is(tmp_path, monkeypatch):
    source = """
        import abc
        from metalearn import Algorithm, Reverse

        class Abstract(Algorithm):
            pass

        class Invented(Algorithm):
            def init(self, key): ...
            def unroll(self, episode, key): ...

        class _Private(Invented):
            pass
    """
    folder = tmp_path / "newly_invented" / "deeper"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "method.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    found = public_classes(importlib.import_module("newly_invented"))
    assert [c.__name__ for c in found - WITH_A_CASE] == ["Invented"]
    for name in [name for name in sys.modules if name.startswith("newly_invented")]:
        monkeypatch.delitem(sys.modules, name)
