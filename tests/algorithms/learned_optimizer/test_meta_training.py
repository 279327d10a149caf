"""Three levels and four: the outer loop of an algorithm is the inner loop of a level above."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metalearn import PES, Forward, MixedFlow, Reverse, Trainer, Truncation
from metalearn.algorithms import (
    MAML,
    Hyperparameter,
    LearnedOptimizer,
    MAMLPlusPlus,
    MetaTraining,
    Quadratic,
    Supervised,
    Together,
    TunedRule,
    squared_error,
)
from metalearn.datasets import MetaTrainingRuns, SideBySide, Sinusoid, TaskStream
from metalearn.engines.inner_loop import rollout
from metalearn.tasks import draw_task
from tests.cases import MODELS, TASKS, WAYS, Float64, to_float64
from tests.helpers.refusals import refused
from tests.helpers.selection import quick

KEY = jax.random.key(5)
MODEL = Float64(MODELS["Functions"])
OUTER_STEPS = 3
REVERSE = Reverse()
RATE = TunedRule(
    functools.partial(optax.adam, eps_root=1e-4),
    {
        "learning_rate": Hyperparameter(1e-3, 1.0, 0.1, space="log"),
        "b1": Hyperparameter(0.0, 1.0, 0.6, space="logit"),
    },
)
WAVES = Sinusoid(shots=3, queries=4)


def maml():
    return MAML(MODEL, squared_error, optax.sgd(0.1), inner_steps=2)


def meta_training(algorithm=None, engine=REVERSE, steps=OUTER_STEPS, judge="validation"):
    problem = MetaTraining(algorithm or maml(), engine, tasks_per_step=2)
    return LearnedOptimizer(problem, RATE, steps, judge)


def meta_runs(tasks=WAVES):
    return MetaTrainingRuns.create(tasks, queries=3)


def refused_in_tracing(message):
    """The message of a refusal, after which JAX adds a note on frames."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


def start(algorithm):
    """Return phi, a generic point: no coordinate is what it was initialised with."""
    flat, unravel = ravel_pytree(to_float64(algorithm.init(KEY)))
    return unravel(flat + 0.1 * jax.random.normal(KEY, flat.shape))


def solved(algorithm, upper, tasks):
    """Return ((loss, aux), gradient with respect to phi) on one meta-training run."""

    @jax.jit
    def solve(phi, tasks):
        task = draw_task(algorithm, tasks, KEY)
        return upper.value_and_grad(task.unroll, phi, task.batches())

    return solve(start(algorithm), tasks)


def differences(algorithm, tasks, step=1e-5):
    """Return the gradient with respect to phi by central differences, along its axes."""
    flat, unravel = ravel_pytree(start(algorithm))

    @jax.jit
    @jax.vmap
    def value(point):
        task = draw_task(algorithm, tasks, KEY)
        return rollout(task.unroll, unravel(point), task.batches())[0]

    rows = step * jnp.eye(flat.size)
    return (value(flat[None] + rows) - value(flat[None] - rows)) / (2 * step)


UPPER = {
    "Reverse": Reverse(),
    "Reverse-nested": Reverse(remat="nested"),
    "Forward": Forward(),
    "MixedFlow": MixedFlow(),
    "MixedFlow-none": MixedFlow(remat="none"),
    "MixedFlow-segments": MixedFlow(remat="segments"),
    "MixedFlow-host": MixedFlow(store="host"),
}
LOWER = {
    "Reverse": Reverse(),
    "Reverse-step": Reverse(remat="step"),
    "Reverse-nested": Reverse(remat="nested", segment=1),
    "Reverse-segments": Reverse(remat="segments"),
    "Reverse-peel": Reverse(remat="step", peel=True),
    "MixedFlow": MixedFlow(),
    "MixedFlow-none": MixedFlow(remat="none"),
    "MixedFlow-nested": MixedFlow(remat="nested", segment=1, peel=False),
    "MixedFlow-segments": MixedFlow(remat="segments"),
}


# Each upper engine over both kinds of lower ones, and the plain upper ones over all.
PAIRS = [
    (upper, lower)
    for upper in UPPER
    for lower in LOWER
    if lower in ("Reverse", "MixedFlow") or upper in ("Reverse", "Forward", "MixedFlow")
]


@functools.cache
def by_differences():
    return differences(meta_training(), meta_runs())


@pytest.mark.parametrize(
    ("upper", "lower"),
    quick(PAIRS, lambda upper, lower: (upper, lower) == ("MixedFlow", "Reverse")),
)
def test_the_gradient_of_three_levels_matches_central_differences(upper, lower, x64):
    (_, aux), grads = solved(meta_training(engine=LOWER[lower]), UPPER[upper], meta_runs())
    assert aux.inner.losses.shape == (OUTER_STEPS, 1) and aux.inner.finite.all()
    grads = ravel_pytree(grads)[0]
    assert abs(grads).min() > 1e-3
    np.testing.assert_allclose(grads, by_differences(), rtol=1e-6)


@pytest.mark.slow
def test_a_run_is_the_loop_of_outer_steps_that_one_writes_by_hand(x64):
    algorithm, phi, tasks = meta_training(), start(meta_training()), meta_runs()
    lower, engine = maml(), Reverse()

    @jax.jit
    def by_hand(phi):
        task = draw_task(algorithm, tasks, KEY)
        eta = task.unroll.init(phi).params
        optimizer = RATE.optimizer(phi)
        state = optimizer.init(eta)
        _, keys = task.batches()[0]
        for step in range(OUTER_STEPS):
            total = jax.tree.map(jnp.zeros_like, eta)
            for key in keys[step]:
                drawn = draw_task(lower, tasks.tasks, key)
                _, grads = engine.value_and_grad(drawn.unroll, eta, drawn.batches())
                total = jax.tree.map(lambda t, g: t + g / 2, total, grads)
            updates, state = optimizer.update(total, state, eta)
            eta = optax.apply_updates(eta, updates)
        return eta

    (_, aux), _ = solved(algorithm, Reverse(), tasks)
    for ours, expected in zip(*map(jax.tree.leaves, (aux.state.params, by_hand(phi))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("upper", [Reverse(), MixedFlow()], ids=["Reverse", "MixedFlow"])
def test_the_gradient_of_four_levels_matches_central_differences(upper, x64):
    """The learning rate of what learns the learning rate of MAML."""
    algorithm, tasks = meta_training(meta_training(steps=2), steps=2), meta_runs(meta_runs())
    _, grads = solved(algorithm, upper, tasks)
    grads = ravel_pytree(grads)[0]
    assert abs(grads).min() > 1e-7
    np.testing.assert_allclose(grads, differences(algorithm, tasks), rtol=1e-5)


@pytest.mark.slow
def test_what_anneals_below_sees_the_number_of_its_outer_step(x64):
    """The loss of each step of a run, and of the algorithm as it is in that outer step."""
    lower = MAMLPlusPlus(MODEL, squared_error, inner_steps=2, multi_step=3)
    algorithm, tasks = meta_training(lower, judge="training"), meta_runs()
    (_, aux), _ = solved(algorithm, Reverse(), tasks)
    phi = start(algorithm)

    @jax.jit
    def first_losses(phi):
        task = draw_task(algorithm, tasks, KEY)
        eta, (_, keys) = task.unroll.init(phi).params, task.batches()[0]

        def loss(annealed, key):
            drawn = draw_task(annealed, tasks.tasks, key)
            return rollout(drawn.unroll, eta, drawn.batches())[0]

        return [
            jnp.stack([loss(each, key) for key in keys[0]]).mean()
            for each in (lower.at_outer_step(jnp.asarray(0)), lower)
        ]

    annealed, after = first_losses(phi)
    np.testing.assert_allclose(aux.inner.losses[0, 0], annealed, rtol=1e-12)
    assert abs(annealed - after) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", [MixedFlow(), PES(pairs=2)], ids=["MixedFlow", "PES"])
def test_a_trainer_learns_an_outer_learning_rate_in_truncated_unrolls(engine):
    rate = {"learning_rate": Hyperparameter(1e-4, 1.0, 1e-3, space="log")}
    lower = MAML(MODELS["linen-MLP"], squared_error, optax.sgd(0.01))
    problem = MetaTraining(lower, tasks_per_step=4)
    algorithm = LearnedOptimizer(problem, TunedRule(optax.adam, rate), 20)
    trainer = Trainer(
        algorithm, engine, optax.adam(0.1), tasks_per_step=2, truncation=Truncation(5)
    )
    state = trainer.fit(meta_runs(), 40, key=KEY, progress=False)
    assert algorithm.rule.values(trainer.learned(state))["learning_rate"] > 3e-3


def test_an_engine_that_cannot_be_differentiated_again_is_refused_below():
    for engine in (Forward(), MixedFlow(store="host"), PES()):
        algorithm = meta_training(engine=engine)
        message = (
            f"`{engine}` returns a meta-gradient that a level above cannot differentiate once "
            "more, so it cannot be the engine of a lower level. Use `Reverse()`, with any `remat`, "
            "or `MixedFlow()` as `MetaTraining(engine=)`; the engine of the level above, the "
            "Trainer's, may be any."
        )
        with refused_in_tracing(message):
            jax.eval_shape(lambda a=algorithm: solved(a, Reverse(), meta_runs()))


def test_more_levels_than_the_tasks_have_are_refused():
    message = (
        "`MetaTraining(MAML)` is one level more than these tasks are for: an episode of them is "
        "one task of MAML, and each step of the meta-training of MAML draws 2 of those. Wrap the "
        "tasks once for each level above the second: "
        "`metalearn.datasets.MetaTrainingRuns.create(tasks, held_out)`."
    )
    with refused_in_tracing(message):
        Trainer(meta_training()).fit(WAVES, 1, key=KEY, progress=False)
    four = meta_training(meta_training())
    with refused_in_tracing(message):  # the lowest pair of levels lacks its tasks
        Trainer(four).fit(meta_runs(), 1, key=KEY, progress=False)


def test_more_levels_than_the_algorithm_has_are_refused():
    for algorithm, name in (
        (maml(), "MAML"),
        (LearnedOptimizer(Supervised(MODEL), RATE, OUTER_STEPS), "LearnedOptimizer"),
    ):
        message = (
            f"{name} got the tasks `MetaTrainingRuns`, of which an episode is a whole "
            "meta-training run: its support set is a distribution over tasks, `Sinusoid`, not "
            f"examples. Pass {name} the `Sinusoid` itself; or, to learn how an algorithm is "
            "meta-trained, one level above it, pass `MetaTrainingRuns` to "
            "`LearnedOptimizer(MetaTraining(algorithm), rule, inner_steps)`."
        )
        with refused_in_tracing(message):
            draw_task(algorithm, meta_runs(), KEY)
    with refused_in_tracing("MAML got the tasks `MetaTrainingRuns`, of which an episode is"):
        Trainer(maml()).fit(meta_runs(), 1, key=KEY, progress=False)
    with refused_in_tracing("MAML got the tasks `MetaTrainingRuns`, of which an episode is"):
        Trainer(meta_training()).fit(meta_runs(meta_runs()), 1, key=KEY, progress=False)
    parts = LearnedOptimizer(Together({"bowl": Quadratic(2)}), RATE, OUTER_STEPS)
    with refused_in_tracing("LearnedOptimizer got the tasks `SideBySide`, of which an episode is"):
        draw_task(parts, SideBySide({"bowl": meta_runs()}), KEY)


def test_tasks_of_a_level_above_are_on_the_device_and_say_their_labels():
    stream = TaskStream([WAVES.sample(KEY)])
    message = (
        "`MetaTrainingRuns.create(held_out=)` got a `TaskStream`, which is read on the host before "
        "each outer step, but a meta-training run draws its tasks inside a compiled program. Use "
        "tasks on the device, such as `FewShot.from_arrays`."
    )
    with refused(message):
        MetaTrainingRuns.create(WAVES, stream)
    with pytest.raises(TypeError, match=re.escape("`MetaTrainingRuns.create(tasks=)` takes a")):
        MetaTrainingRuns.create(None)
    assert meta_runs().label_range() is None
    assert MetaTrainingRuns.create(WAVES, TASKS["FewShot"]).label_range() == (0, WAYS - 1)
