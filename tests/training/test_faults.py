"""What a run does on non-finite numbers, diverging inner loops and failing disks."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Algorithm, Faults, Reverse, Tasks, Trainer, Unroll
from metalearn.algorithms import MAML, squared_error
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import Sinusoid
from metalearn.engines.base import Aux
from metalearn.engines.grad_recorder import Inner
from metalearn.loggers import JsonlLogger
from metalearn.models import Functions
from metalearn.training.faults import DivergedError, NonFiniteError, all_finite
from tests.helpers.clock import Heard, clock, fit, steps_of
from tests.helpers.selection import quick

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_meta_gradient_of_few_bits_is_finite_where_its_numbers_are(dtype):
    nothing = Inner(*(jnp.ones(1) for _ in Inner._fields))
    aux = Aux({}, (), nothing._replace(finite=jnp.ones(1, bool)))
    grads = {"a": jnp.full((4, 2), 100.0, dtype)}
    assert all_finite(jnp.float32(1), aux, grads)
    assert not all_finite(jnp.float32(1), aux, {"a": jnp.full(2, jnp.inf, dtype)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Poisoned(Tasks):
    """Waves, a share of which is NaN: so are their loss and their meta-gradient."""

    share: float = dataclasses.field(default=0.4, metadata={"static": True})

    def sample(self, key):
        waves = Sinusoid(shots=3, queries=4).sample(key)
        is_bad = jax.random.bernoulli(jax.random.fold_in(key, 1), self.share)
        return jax.tree.map(lambda x: jnp.where(is_bad, jnp.nan, x), waves)


def line(rate, steps=1):
    """MAML on the model y = a x."""
    model = Functions(lambda key: jax.random.normal(key), lambda a, x: a * x)
    return MAML(model, squared_error, optax.sgd(rate), inner_steps=steps)


@dataclasses.dataclass(frozen=True)
class Bowl(Algorithm):
    """The loss 1.5 eta^2, NaN beyond 100: gradient descent with rate 1 doubles eta, with
    rate 1/2 it halves it."""

    def init(self, key):
        return jnp.ones(())

    def unroll(self, episode, key):
        def loss(eta, state):
            return jnp.where(jnp.abs(eta) > 100, jnp.nan, 1.5 * eta**2), {}

        return Unroll(lambda eta: eta, lambda eta, state, batch, grad: state, loss)


@functools.cache
def bowl():
    return Trainer(Bowl(), Reverse(), optax.sgd(1.0), tasks_per_step=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "skipp"}, "No way with steps that are not finite is called 'skipp'. Did"),
        ({"diverged": "skip"}, "No way with inner runs that diverge is called 'skip'."),
        ({"shrink": 1.0}, "`Faults(shrink=1.0)` makes outer updates smaller: between 0 and 1."),
        ({"most": 0}, "`Faults(most=0)` is a number of times: at least 1."),
        ({"patience": 0}, "`Faults(patience=0)` is a number of times: at least 1."),
        ({"ratio": 1.0}, "`Faults(ratio=1.0)` is how far an inner loss may rise: above 1."),
    ],
)
def test_faults_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Faults(**options)


def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace_but_its_count():
    heard = Heard()
    trainer = Trainer(line(0.01), Reverse(), optax.adam(0.1), tasks_per_step=1)
    faults = Faults(nonfinite="skip", most=20)
    options = {"progress": False, "log_every": 1, "faults": faults}
    state = trainer.fit(Poisoned(), 12, key=KEY, loggers=[heard], **options)
    skipped = [row["step_skipped"] for _, row in heard.rows]
    finite = [math.isfinite(row["loss"]) for _, row in heard.rows]
    assert skipped == [float(not fine) for fine in finite]
    assert 0 < sum(skipped) < 12
    assert int(state.step) == 12
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), state.eta))
    (counts,) = [s.count for s in state.optimizer if isinstance(s, optax.ScaleByAdamState)]
    assert int(counts) == 12 - sum(skipped)


@dataclasses.dataclass(frozen=True)
class Cliff(Bowl):
    """A loss that is finite, with a derivative whose square is not."""

    def unroll(self, episode, key):
        return super().unroll(episode, key)._replace(loss=lambda eta, state: (1e30 * eta, {}))


def test_a_skipped_step_leaves_no_infinity_in_the_outer_optimizer():
    heard, trainer = Heard(), Trainer(Cliff(), Reverse(), optax.adam(0.1), tasks_per_step=1)
    state = fit(trainer, 3, heard, faults=Faults(nonfinite="skip"))
    assert [row["step_skipped"] for _, row in heard.rows] == [1, 1, 1]
    assert float(state.eta) == 1.0
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), state.optimizer))


def test_too_many_steps_skipped_in_a_row_stop_the_run():
    message = "^`loss` became nan at outer step 7, after 4 steps in a row that were skipped, so"
    with pytest.raises(NonFiniteError, match=message):
        fit(clock(loss_at=2.0), 20, faults=Faults(nonfinite="skip", most=4))


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_that_explodes_backs_off_to_its_last_checkpoint_and_takes_smaller_steps(
    saves, tmp_path, capsys
):
    rows = JsonlLogger(tmp_path / "metrics.jsonl")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=3) if saves else None
    state = fit(bowl(), 12, rows, checkpoints=checkpoints, faults=Faults(nonfinite="back_off"))
    # Doubled for seven steps; from step 6, or from the beginning, halved.
    good, size = (6, 64.0) if saves else (0, 1.0)
    expected = size * 0.5 ** (12 - good)
    np.testing.assert_allclose(abs(float(state.eta)), expected, rtol=1e-6)
    assert float(state.pace) == 0.5 and int(state.step) == 12
    logged = [int(step) for step in re.findall(r'"step": (\d+)', rows.path.read_text())]
    assert logged == list(range(1, 13))
    said = capsys.readouterr().out
    assert "`loss` became nan at outer step 8: backing off." in said
    assert f"On from outer step {good}, with outer updates times 0.5." in said
    if checkpoints is not None:
        checkpoints.close()
        again = Checkpoints(tmp_path / "checkpoints", every=3)
        assert float(again.restore(bowl().init(KEY))[0].pace) == 0.5
        again.close()


def test_too_many_back_offs_stop_the_run():
    message = "^`loss` became nan at outer step 3, after 2 times of backing off, so"
    with pytest.raises(NonFiniteError, match=message):
        fit(clock(loss_at=1.0), 9, faults=Faults(nonfinite="back_off", most=2, shrink=0.9))


def test_with_pass_the_outer_optimizer_sees_what_is_not_finite():
    heard = Heard()
    state = fit(clock(loss_at=2.0), 6, heard, log_every=2, faults=Faults(nonfinite="pass"))
    assert int(state.step) == 6
    assert steps_of(heard.rows) == [2, 4, 6]
    assert [math.isfinite(metrics["loss"]) for _, metrics in heard.rows] == [True, False, False]


@pytest.mark.parametrize("chunk", quick([None, 2], lambda chunk: chunk is None))
def test_tasks_that_are_not_finite_are_left_out_of_the_mean_and_counted(chunk, x64):
    trainer = Trainer(line(0.01), Reverse(), optax.sgd(1.0), tasks_per_step=8, isolate=True)
    trainer = dataclasses.replace(trainer, chunk=chunk)
    tasks, start = Poisoned(), trainer.init(KEY)
    end, metrics = trainer.step(start, tasks)
    of_each = jax.jit(jax.vmap(lambda key: trainer.task_gradient(start.eta, tasks, key)))
    grads, seen = of_each(trainer.task_keys(start))
    fine = np.isfinite(seen["loss"])
    assert 0 < fine.sum() < 8
    assert metrics["tasks_left_out"] == 8 - fine.sum()
    moved = start.eta.params - end.eta.params
    np.testing.assert_allclose(moved, grads.params[fine].mean(), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"], seen["loss"][fine].mean(), rtol=1e-12)


def test_a_step_whose_tasks_are_all_left_out_says_so():
    trainer = Trainer(line(0.01), Reverse(), tasks_per_step=2, isolate=True)
    message = "^`loss` became nan at outer step 1.* all 2 inner runs became NaN or infinite"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(Poisoned(1.0), 3, key=KEY, progress=False)


@pytest.mark.slow
def test_without_a_fault_isolation_changes_nothing(x64):
    waves = Sinusoid(shots=3, queries=4)
    found = []
    for isolate in (False, True):
        trainer = Trainer(line(0.01), Reverse(), optax.sgd(1.0), tasks_per_step=4, isolate=isolate)
        found.append(trainer.step(trainer.init(KEY), waves))
    (plain, _), (isolated, metrics) = found
    np.testing.assert_allclose(isolated.eta.params, plain.eta.params, rtol=1e-14)
    assert metrics["tasks_left_out"] == 0


def test_inner_runs_that_diverge_are_reported_once_or_stop_the_run(capsys):
    trainer = Trainer(line(rate=3.0, steps=4), Reverse(), optax.sgd(0.0), tasks_per_step=2)
    message = "The inner loop diverges: for 3 outer steps up to 3 its mean loss has ended more than"
    fit(trainer, 8)
    assert capsys.readouterr().out.count(message) == 1
    with pytest.raises(DivergedError, match=f"^{message} 10 times above"):
        fit(trainer, 8, faults=Faults(diverged="stop"))
    fit(trainer, 8, faults=Faults(diverged="pass"))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_inner_runs_that_converge_are_not_reported(capsys):
    fit(Trainer(line(rate=0.01, steps=4), Reverse(), optax.sgd(0.0), tasks_per_step=2), 5)
    assert capsys.readouterr().out == ""
