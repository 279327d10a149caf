"""An evaluation in which some tasks are not finite: counted, said, and never silently better."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Tasks, Trainer
from metalearn._utils.intervals import Estimate, interval
from metalearn.algorithms import MAML, squared_error
from metalearn.datasets import Sinusoid
from metalearn.loggers import ConsoleLogger
from metalearn.loggers.console import validation_cells
from metalearn.models import Functions
from metalearn.training.evaluation import summarised

KEY = jax.random.key(0)
NAN = float("nan")
COLUMNS = {
    "loss": np.array([1.0, NAN, 3.0, 2.0]),
    "accuracy": np.array([0.5, 0.25, 0.75, np.inf]),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steep(Tasks):
    """Waves, a share of them so steep that the inner loop overflows."""

    share: float = dataclasses.field(default=0.2, metadata={"static": True})

    def sample(self, key):
        waves = Sinusoid(shots=3, queries=4).sample(key)
        steep = jax.random.bernoulli(jax.random.fold_in(key, 1), self.share)
        return jax.tree.map(lambda x: jnp.where(steep, 1e20, 1.0) * x, waves)


def trainer(**options):
    model = Functions(lambda key: jnp.ones(()), lambda a, x: a * x)
    return Trainer(MAML(model, squared_error, optax.sgd(0.1)), tasks_per_step=4, **options)


def test_a_task_that_is_not_finite_makes_the_mean_nan_and_is_counted_and_named(capsys):
    found = summarised(COLUMNS)
    assert math.isnan(found["loss"].mean) and found["accuracy"].mean == math.inf
    assert found["tasks_not_finite"] == Estimate(2, 0.0, 4)
    loss, accuracy = interval(np.array([1.0, 3.0])), interval(np.array([0.5, 0.75]))
    assert capsys.readouterr().out == (
        "2 of 4 tasks are not finite in this evaluation (the first: task 1, loss nan). The means "
        f"are therefore not finite either; over the other 2: loss {loss}, accuracy {accuracy}. "
        "`Trainer(isolate=True)`, or config.isolate, leaves such tasks out, and counts them.\n"
    )


def test_tasks_that_are_isolated_are_left_out_of_all_means_and_counted(capsys):
    found = summarised(COLUMNS, isolate=True)
    assert found == {
        "loss": interval(np.array([1.0, 3.0])),
        "accuracy": interval(np.array([0.5, 0.75])),
        "tasks_left_out": Estimate(2, 0.0, 4),
    }
    assert found["loss"].tasks == 2
    assert capsys.readouterr().out.endswith(
        "(the first: task 1, loss nan). The means are over the other 2.\n"
    )


def test_where_no_task_is_finite_nothing_is_left_to_average(capsys):
    found = summarised({"loss": np.full(3, NAN)}, isolate=True)
    assert math.isnan(found["loss"].mean) and found["loss"].tasks == 0
    assert found["tasks_left_out"].mean == 3
    assert capsys.readouterr().out.startswith("3 of 3 tasks are not finite in this evaluation ")


def test_where_all_tasks_are_finite_nothing_is_said(capsys):
    finite = {"loss": np.arange(3.0)}
    assert summarised(finite) == {"loss": interval(np.arange(3.0))}
    assert summarised(finite, isolate=True)["tasks_left_out"] == Estimate(0, 0.0, 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("isolate", [False, True])
def test_a_trainer_evaluates_by_the_policy_that_it_trains_by(isolate, capsys):
    made = trainer(isolate=isolate)
    found = made.evaluate(made.init(KEY).eta, Steep(), KEY, 20)
    name = "tasks_left_out" if isolate else "tasks_not_finite"
    assert math.isfinite(found["loss"].mean) == isolate
    assert 0 < found[name].mean < 20
    assert found["loss"].tasks == (20 - found[name].mean if isolate else 20)
    assert f"{found[name].mean} of 20 tasks" in capsys.readouterr().out


def test_the_console_shows_counts_where_they_are_not_zero(capsys):
    table = {"loss": Estimate(1.0, 0.5, 3), "tasks_left_out": Estimate(1, 0.0, 4)}
    ConsoleLogger().finish(table)
    assert (
        capsys.readouterr().out.splitlines()[1].split()
        == "test tasks_left_out 1 of 4 tasks".split()
    )
    ConsoleLogger().finish({**table, "tasks_left_out": Estimate(0, 0.0, 4)})
    assert len(capsys.readouterr().out.splitlines()) == 1
    row = {"eval/loss": 1.0, "eval/loss_ci95": 0.5}
    count = {"eval/tasks_not_finite": 2, "eval/tasks_not_finite_ci95": 0.0}
    assert list(validation_cells({**row, **count})) == ["loss 1 +- 0.5", "tasks_not_finite 2"]
