"""How wrong each engine is: measured against the exact meta-gradient of the same outer step."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn import ES, Algorithm, Implicit, MixedFlow, Reverse, Trainer, Truncated, Unroll
from metalearn.datasets import Quadratics
from metalearn.diagnostics import compare
from metalearn.diagnostics.comparison import candidates, closeness

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class Pull(Algorithm):
    """Descent on a quadratic of eigenvalues 1 and 2, whose minimum is eta times the key's draw."""

    inner_steps: int = 100

    def init(self, key):
        return {"target": jnp.array([1.0, -0.5])}

    def batches(self, episode, key):
        return jnp.arange(self.inner_steps)

    def unroll(self, episode, key):
        scale = 1 + jax.random.uniform(key, (2,))

        def step(eta, theta, batch, grad):
            curvature = jnp.diag(jnp.array([1.0, 2.0]))
            aim = eta["target"] * scale
            return theta - 0.3 * grad(lambda x: (x - aim) @ curvature @ (x - aim) / 2)(theta)

        return Unroll(lambda eta: jnp.zeros(2), step, lambda eta, x: (jnp.sum(x**4), {}))


ENGINES = [
    Reverse(),
    Truncated(1),
    Truncated(20),
    Implicit("cg", tolerance=1e-10),
    ES(pairs=2),
    MixedFlow(micro_batches=4),
]


@functools.cache
def comparison():
    trainer = Trainer(Pull(), tasks_per_step=3)
    with jax.enable_x64(True):
        return compare(trainer, Quadratics(2), engines=ENGINES, repeats=1)


def row_of(engine):
    return comparison().rows[ENGINES.index(engine)]


@pytest.mark.slow
def test_errors_are_those_of_the_mean_meta_gradient_of_the_outer_step():
    trainer, key = Trainer(Pull(), MixedFlow(), tasks_per_step=3), jax.random.key(0)
    state = trainer.init(key, Quadratics(2))
    grads = [
        dataclasses.replace(trainer, engine=engine).gradient(state, Quadratics(2))[0]["target"]
        for engine in (Reverse(), Truncated(1))
    ]
    error, cosine = closeness(*map(np.asarray, reversed(grads)))
    assert math.isclose(row_of(Truncated(1)).relative_error, error, rel_tol=1e-9)
    assert math.isclose(row_of(Truncated(1)).cosine, cosine, rel_tol=1e-9)
    assert 0.1 < error < 1
    keys = trainer.task_keys(state)
    each = [trainer.task_gradient(state.eta, Quadratics(2), k)[0]["target"] for k in keys]
    np.testing.assert_allclose(grads[0], sum(each) / 3, rtol=1e-10)


@pytest.mark.slow
def test_exact_engines_and_a_fixed_point_have_no_error_and_few_steps_have_one():
    assert row_of(Reverse()).relative_error < 1e-12
    assert row_of(ENGINES[3]).relative_error < 1e-8 and row_of(ENGINES[3]).doubts == ()
    assert 1e-5 < row_of(Truncated(20)).relative_error < row_of(Truncated(1)).relative_error
    assert 1e-3 < row_of(ES(pairs=2)).relative_error
    assert comparison().inner_steps == 100 and comparison().tasks == 3
    assert comparison().dtype == "float64" and comparison().exact == MixedFlow()


@pytest.mark.slow
def test_costs_stand_beside_the_errors_and_a_solver_has_a_lower_bound():
    rows = [row for row in comparison().rows if not row.refusal]
    assert all(row.cost.peak > 0 and row.seconds > 0 for row in rows)
    assert row_of(Truncated(1)).cost.temporaries < row_of(Reverse()).cost.temporaries
    assert [row.flops_known for row in rows] == [row.engine != ENGINES[3] for row in rows]


@pytest.mark.slow
def test_what_refuses_says_why():
    row = row_of(MixedFlow(micro_batches=4))
    assert "ExampleMean" in row.refusal and row.cost is None and math.isnan(row.cosine)


def test_the_cheapest_is_the_fastest_within_the_tolerance():
    rows = [row._replace(seconds=float(i)) for i, row in enumerate(comparison().rows)]
    timed = comparison()._replace(rows=list(reversed(rows)))
    assert timed.cheapest(1e-6).engine == Reverse()
    assert timed.cheapest(math.inf).engine == Reverse()
    slow = [row._replace(seconds=9.0) if row.engine == Reverse() else row for row in rows]
    assert comparison()._replace(rows=slow).cheapest(1e-6).engine == ENGINES[3]
    assert comparison()._replace(rows=slow).cheapest(1.0).engine == Truncated(1)
    with pytest.raises(ValueError, match="No engine has a relative error of 1e-30 or less here. "):
        comparison()._replace(rows=rows[1:]).cheapest(1e-30)
    with pytest.raises(ValueError, match="within the memory that it may take"):
        timed.cheapest(1.0, budget=1)


@pytest.mark.parametrize("norm", [0.0, math.nan])
def test_nothing_is_the_cheapest_where_no_error_can_be_told(norm):
    with pytest.raises(ValueError, match=f"The exact meta-gradient has the norm {norm:g} here"):
        comparison()._replace(norm=norm).cheapest(0.1)


def test_a_loop_that_has_not_converged_has_doubts_beside_its_error():
    trainer = Trainer(Pull(inner_steps=2), tasks_per_step=1)
    (row,) = compare(trainer, Quadratics(2), engines=[Implicit("cg")], repeats=1).rows
    assert row.relative_error > 0.1
    assert "theta_T is no fixed point of the inner step" in row.doubts[0]


def test_training_says_once_that_the_loop_has_not_converged(capsys):
    trainer = Trainer(Pull(inner_steps=2), Implicit("cg"), tasks_per_step=1)
    trainer.fit(Quadratics(2), 3, key=jax.random.key(0), log_every=0, progress=False)
    said = capsys.readouterr().out
    assert said.startswith("At outer step 1: theta_T is no fixed point of the inner step")
    assert said.count("At outer step") == 1


def test_it_compares_at_a_state_that_was_trained():
    trainer = Trainer(Pull(inner_steps=2), tasks_per_step=1)
    state = trainer.init(jax.random.key(0))
    moved = dataclasses.replace(state, eta={"target": jnp.array([2.0, 0.1])})
    norms = [
        compare(trainer, Quadratics(2), state=at, engines=[], repeats=1).norm
        for at in (state, moved)
    ]
    assert norms[1] > 2 * norms[0]


def test_a_trainer_that_cuts_its_outer_step_is_refused():
    trainer = Trainer(Pull(), segment=10)
    with pytest.raises(ValueError, match=r"this trainer cuts it \(segment=10\)"):
        compare(trainer, Quadratics(2))


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_the_engines_that_are_compared_take_no_more_steps_than_there_are(steps):
    lasts = [engine.last for engine in candidates(steps) if isinstance(engine, Truncated)]
    assert all(last < steps for last in lasts[:-1]) and len({*map(repr, candidates(steps))}) > 8
