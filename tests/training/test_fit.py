"""The loop around the step: what is logged when, and what happens to a loss that breaks."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Reverse, Trainer
from metalearn._utils import strict_json
from metalearn.algorithms import MAML, squared_error
from metalearn.checkpoints.manager import Checkpoints
from metalearn.loggers import JsonlLogger
from metalearn.models import Functions
from metalearn.training.faults import NonFiniteError
from tests.helpers.clock import KEY, TASKS, Heard, clock, fit, steps_of
from tests.helpers.selection import quick


def test_metrics_are_logged_every_log_every_steps_and_at_the_last_one():
    heard = Heard()
    state = fit(clock(), 7, heard, log_every=3)
    assert steps_of(heard.rows) == [3, 6, 7]
    assert [metrics["clock"] for _, metrics in heard.rows] == [2.0, 5.0, 6.0]
    assert all(type(value) is float for _, metrics in heard.rows for value in metrics.values())
    assert int(state.step) == 7 and float(state.eta) == 7.0


def test_loggers_are_started_once_and_left_open_for_the_final_table():
    heard = Heard()
    fit(clock(), 2, heard)
    assert heard.started == [(0, {}, {})]
    assert heard.tables == []


def test_evaluation_is_of_held_out_tasks_every_eval_every_steps_and_at_the_last_one():
    heard, trainer = Heard(), clock()
    far = dataclasses.replace(TASKS, amplitude=(100.0, 101.0))
    fit(trainer, 5, heard, held_out=far, eval_every=2, eval_tasks=50)
    evaluated = {step: metrics for step, metrics in heard.rows if "eval/loss" in metrics}
    assert list(evaluated) == [2, 4, 5]
    assert [metrics["eval/clock"] for metrics in evaluated.values()] == [2.0, 4.0, 5.0]
    assert all(metrics["eval/size"] > 10 for metrics in evaluated.values())
    assert all(metrics["size"] < 10 for _, metrics in heard.rows if "size" in metrics)


def test_evaluation_reports_a_mean_with_its_interval_over_the_same_tasks_every_time():
    heard = Heard()
    fit(clock(), 2, heard, held_out=TASKS, eval_every=1, eval_tasks=400)
    first, second = (metrics for _, metrics in heard.rows if "eval/loss" in metrics)
    assert first["eval/size"] == second["eval/size"]
    np.testing.assert_allclose(first["eval/loss"] - second["eval/loss"], 1.0, rtol=1e-5)
    # The loss differs between tasks by the mean of three points of a wave.
    mean = jax.jit(jax.vmap(lambda key: TASKS.sample(key).query[1].mean()))
    means = mean(jax.random.split(KEY, 400))
    expected = 1.96 * np.std(means, ddof=1) / math.sqrt(400)
    np.testing.assert_allclose(first["eval/loss_ci95"], expected, rtol=0.2)
    assert first["eval/clock_ci95"] == 0.0


def test_nothing_is_evaluated_unless_asked_for():
    heard = Heard()
    fit(clock(), 2, heard, held_out=TASKS)
    assert steps_of(heard.rows, "eval/loss") == []


@pytest.mark.parametrize("broken", quick([math.nan, math.inf], math.isnan))
def test_an_outer_loss_that_is_not_finite_stops_training_and_keeps_what_was_logged(
    broken, tmp_path
):
    heard, rows = Heard(), JsonlLogger(tmp_path / "metrics.jsonl")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    trainer = clock(loss_at=3.0, broken=broken)
    with pytest.raises(NonFiniteError, match=f"^`loss` became {broken} at outer step 4, so"):
        fit(trainer, 8, heard, rows, log_every=3, checkpoints=checkpoints)
    checkpoints.close()
    logged = [strict_json.loads(line) for line in rows.path.read_text().splitlines()]
    assert [row["step"] for row in logged] == [3, 4]
    assert not math.isfinite(logged[-1]["loss"]) and math.isfinite(logged[-1]["meta_grad_norm"])
    assert heard.tables == [None]

    restored, _ = Checkpoints(tmp_path / "checkpoints").restore(trainer.init(KEY))
    assert int(restored.step) == 3
    assert float(restored.eta) == 3.0


def test_the_message_about_a_broken_loss_says_where_to_look():
    with pytest.raises(NonFiniteError, match=r"In its task 1 of 2 the outer loss is nan.*look at"):
        fit(clock(loss_at=0.0), 2)


def test_a_meta_gradient_that_is_not_finite_stops_training_though_the_loss_is_healthy():
    heard = Heard()
    with pytest.raises(NonFiniteError, match="^`meta_grad_norm` became nan at outer step 3"):
        fit(clock(slope_at=2.0), 8, heard)
    step, metrics = heard.rows[-1]
    assert step == 3 and math.isfinite(metrics["loss"])
    assert heard.tables == [None]


def maml_by_adam(eps_root):
    """MAML by Adam on a model that begins where some gradients are exactly zero."""

    def init(key):
        return {"slope": jax.random.normal(key), "gate": jnp.zeros(()), "gated": jnp.zeros(())}

    model = Functions(init, lambda p, x: (p["slope"] + p["gate"] * p["gated"]) * x)
    inner = optax.adam(0.1, eps_root=eps_root)
    return Trainer(MAML(model, squared_error, inner, inner_steps=2), Reverse(), tasks_per_step=2)


@pytest.mark.slow  # diagnostics/test_health.py has both halves in `make test`
def test_inner_adam_with_a_zero_gradient_is_caught_and_eps_root_mends_it():
    with pytest.raises(NonFiniteError, match="^`meta_grad_norm` became nan at outer step 1"):
        fit(maml_by_adam(eps_root=0.0), 2)
    assert int(fit(maml_by_adam(eps_root=1e-8), 2).step) == 2


@pytest.mark.parametrize("first", [3, 4])  # a checkpoint off and on the common rhythm
def test_a_run_in_two_parts_ends_where_one_in_one_part_does(first, tmp_path):
    trainer = clock()
    whole, parts = Heard(), Heard()
    expected = fit(trainer, 6, whole)
    for steps in (first, 6):
        checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=2)
        state = fit(trainer, steps, parts, checkpoints=checkpoints)
        checkpoints.close()
    assert parts.rows == whole.rows
    assert parts.started == [(0, {"seed": 0}, {}), (first, {"seed": 0}, {"rows": first})]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, expected)
    assert jax.tree.all(same)


def test_a_run_that_has_taken_its_steps_takes_no_more(tmp_path):
    heard = Heard()
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path, every=2)
        state = fit(clock(), 2, heard, checkpoints=checkpoints)
        checkpoints.close()
    assert steps_of(heard.rows) == [1, 2]
    assert float(state.eta) == 2.0


def test_the_progress_bar_shows_the_rate_and_the_loss(capsys):
    fit(clock(), 5, progress=True)
    shown = capsys.readouterr().err
    assert "outer steps of 2 tasks" in shown and "5/5" in shown
    assert re.search(r"\d(step/s|s/step)", shown)
    assert re.search(r"loss=-?\d+\.\d{4}", shown)


def test_the_progress_bar_can_be_switched_off(capsys):
    fit(clock(), 2, progress=False)
    assert capsys.readouterr().err == ""


def test_an_interval_of_zero_steps_means_never(tmp_path):
    heard, checkpoints = Heard(), Checkpoints(tmp_path / "checkpoints", every=0)
    options = {"held_out": TASKS, "eval_every": 0, "log_every": 0, "checkpoints": checkpoints}
    state = fit(clock(), 2, heard, **options)
    checkpoints.close()
    assert int(state.step) == 2 and heard.rows == [] and checkpoints.latest() is None


def test_a_fit_from_the_initial_state_is_the_fit_from_its_key():
    trainer, by_key, by_state = clock(), Heard(), Heard()
    expected = fit(trainer, 3, by_key)
    state = trainer.init(KEY, TASKS)
    got = trainer.fit(TASKS, 3, state=state, loggers=[by_state], log_every=1, progress=False)
    assert by_state.rows == by_key.rows
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, expected))


def test_a_fit_from_a_later_state_takes_the_steps_that_are_left():
    trainer, heard = clock(), Heard()
    middle = fit(trainer, 2)
    state = trainer.fit(TASKS, 5, state=middle, loggers=[heard], log_every=1, progress=False)
    assert steps_of(heard.rows) == [3, 4, 5]
    assert float(state.eta) == 5.0


def test_a_fit_needs_a_key_or_a_state_and_knows_its_options():
    with pytest.raises(TypeError, match="needs `key`, of the run, or a `state` to start from"):
        clock().fit(TASKS, 2, progress=False)
    with pytest.raises(
        TypeError, match=r"^`Trainer.fit\(state=\)` starts from a TrainState.*ArrayI"
    ):
        clock().fit(TASKS, 2, state=jnp.zeros(()), progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evaluate_every'"):
        fit(clock(), 2, evaluate_every=1)


@pytest.mark.parametrize(
    ("best", "has"),
    [
        ("max eval/los", r"Did you mean 'eval/loss'\? It has: eval/clock, eval/loss, eval/size\."),
        ("min eval/tasks_left_out", "It has: eval/clock, eval/loss, eval/size"),
    ],
)
def test_a_best_checkpoint_by_no_metric_is_refused_before_the_first_step(tmp_path, best, has):
    heard, checkpoints = Heard(), Checkpoints(tmp_path, every=1, best=best)
    name = best.split()[1]
    with pytest.raises(ValueError, match=f"^checkpoint_best='{best}': .* no '{name}'.*{has}"):
        fit(clock(), 3, heard, held_out=TASKS, eval_every=2, checkpoints=checkpoints)
    assert not heard.rows and checkpoints.latest() is None
    if name.endswith("left_out"):
        isolated = dataclasses.replace(clock(), isolate=True)
        fit(isolated, 2, heard, held_out=TASKS, eval_every=2, checkpoints=checkpoints)
        assert checkpoints.best_step() == 2
    checkpoints.close()
