"""What each engine would cost, which one is chosen, and what fits where none does."""

import dataclasses
import functools
import os

import jax
import optax
import pytest

from metalearn import (
    ES,
    PES,
    Algorithm,
    Forward,
    MixedFlow,
    Replay,
    Reverse,
    Trainer,
    Truncation,
    choose_engine,
)
from metalearn._utils.device_memory import device_memory, host_memory, parse_bytes, show_bytes
from metalearn.algorithms import (
    FDS,
    MAML,
    HypergradientRule,
    Hyperparameter,
    LearnedOptimizer,
    LearningRates,
    Quadratic,
    squared_error,
)
from metalearn.cost import Cost, cost
from metalearn.engines import MetaGradient
from metalearn.planning import plan as planning
from metalearn.planning.plan import CANDIDATES, BudgetError, Plan, plan, tasks_at_once
from metalearn.planning.step_cost import Candidate, Row, StepCosts
from metalearn.sharding import batched_means
from metalearn.training.replay_schedule import advances, replays
from tests.cases import ENGINES, MODELS, TASKS
from tests.helpers.walks import Aims, Walk

WAVES = TASKS["Sinusoid"]
ADAPTATION = MAML(MODELS["Functions"], squared_error, optax.sgd(0.05), inner_steps=4)
TRAINER = Trainer(ADAPTATION, Reverse(), tasks_per_step=4)
TWO = (Candidate(Reverse()), Candidate(Reverse(remat="step")))
KNOWN: dict[str, Cost] = {}  # by program: each is compiled once for all tests


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "StepCosts", functools.partial(planning.StepCosts, known=KNOWN))
        yield


@dataclasses.dataclass(frozen=True)
class Hungry(MetaGradient):
    """Refuses, as an engine does that cannot serve a problem."""

    def value_and_grad(self, unroll, eta, batches, state=()):
        raise ValueError("`Hungry()` wants another problem. Feed it.")


def row(engine, flops, peak, chunk=1, exact=True):
    return Row(engine, exact, chunk, Cost(flops, 0, peak, 0, 0, "program"))


def learned(windows):
    return {"learning_rate": Hyperparameter(0.0, 1.0, 0.1, windows=windows)}


def chosen(*rows, budget=100):
    return Plan(list(rows), Cost(10, 0, 10, 0, 0, "program"), budget).chosen


def peak(trainer, chunk=None, **algorithm):
    """Return the memory of an outer step."""
    changed = dataclasses.replace(trainer.algorithm, **algorithm)
    trainer = dataclasses.replace(trainer, algorithm=changed, chunk=chunk)
    return cost(trainer.step, trainer.shapes(WAVES), WAVES, known=KNOWN).peak


# What is chosen.


def test_the_fewest_flops_that_fit_are_chosen():
    fast, slow = row(Reverse(), 30, 101), row(MixedFlow(), 40, 100)
    slower = row(Reverse(remat="step"), 50, 20)
    assert chosen(fast, slow, slower) is slow
    assert chosen(fast, slow, slower, budget=101) is fast
    assert chosen(fast, slow, slower, budget=10) is None


def test_of_equal_flops_the_most_tasks_at_once_and_then_the_least_memory_are_chosen():
    lean, all_at_once = row(Reverse(), 1000, 10, chunk=1), row(Reverse(), 1010, 90, chunk=4)
    assert chosen(lean, all_at_once) is all_at_once
    leaner = row(MixedFlow(), 1005, 80, chunk=4)
    assert chosen(lean, all_at_once, leaner) is leaner
    assert chosen(lean, row(Reverse(), 1011, 90, chunk=4)) is lean


def test_an_inexact_setting_is_never_chosen():
    exact, inexact = row(Reverse(), 30, 10), row(MixedFlow(), 20, 5, exact=False)
    assert chosen(exact, inexact) is exact
    assert chosen(inexact) is None


# What is found.


REAL = {"xla_backend_optimization_level": 3}  # as it trains; tests compile with 0


@pytest.mark.slow
def test_a_row_is_what_the_program_that_trains_will_take():
    found = plan(TRAINER, WAVES, candidates=TWO)
    for one, (engine, _) in zip(found.rows, TWO, strict=True):
        assert one.engine == engine and one.chunk == 4
        trains = dataclasses.replace(TRAINER, engine=engine)
        state = trains.init(jax.random.key(0))
        memory = trains.step.lower(state, WAVES).compile(REAL).memory_analysis()
        assert one.cost.temporaries == memory.temp_size_in_bytes
        assert one.cost.arguments == memory.argument_size_in_bytes
    assert found.rows[0].flops > 2 * found.plain.flops > 0
    assert found.rows[0].peak > found.rows[1].peak > found.plain.peak
    assert found.budget == device_memory() and found.choose() is found.rows[0]


@pytest.mark.slow
def test_the_candidates_of_a_plan_serve_or_refuse_a_single_inner_step():
    maml = MAML(MODELS["Functions"], squared_error, inner_steps=1)
    found = plan(Trainer(maml, tasks_per_step=1), WAVES)
    names = {row.name for row in found.rows if row.cost is not None}
    assert {"Reverse()", "MixedFlow()", "MixedFlow(store='host')", "Forward()"} <= names
    assert {"MixedFlow(store='inexact_bfloat16')"} <= names
    reasons = {row.name: row.refusal for row in found.rows if row.cost is None}
    assert "ExampleMean" in reasons["MixedFlow(micro_batches=4)"]
    assert "has no `undo`" not in reasons.get("MixedFlow()", "")


def test_nothing_is_put_on_the_device():
    trainer = dataclasses.replace(TRAINER, tasks_per_step=1)
    shapes = jax.eval_shape(lambda tasks: tasks, WAVES)
    before = {id(array) for array in jax.live_arrays()}
    plan(trainer, shapes, candidates=TWO[:1])
    assert {id(array) for array in jax.live_arrays()} <= before


def test_every_engine_has_a_candidate_and_every_candidate_is_an_engine_with_a_case():
    assert {type(engine) for engine, _ in CANDIDATES} == {type(e) for e in ENGINES.values()}
    assert len(set(CANDIDATES)) == len(CANDIDATES)


def test_an_engine_that_refuses_is_a_row_with_its_reason():
    candidates = (*TWO[:1], Candidate(Forward(max_directions=3)))
    found = plan(TRAINER, WAVES, candidates=candidates)
    assert found.rows[1].cost is None and not found.fits(found.rows[1])
    assert found.rows[1].refusal.startswith("`Forward()` pushes one tangent per meta-parameter")
    assert found.choose().engine == Reverse()


def test_truncated_training_is_planned_whatever_state_its_engine_or_a_candidate_has():
    short = {"truncation": Truncation(2), "tasks_per_step": 2}
    for engine in (PES(), Reverse()):
        trainer = Trainer(ADAPTATION, engine, **short)
        found = plan(trainer, WAVES, candidates=(*TWO[:1], Candidate(PES(), exact=False)))
        assert all(row.cost is not None for row in found.rows), found.rows
        assert found.choose().engine == Reverse()


def test_truncated_training_has_no_horizon_that_would_fit():
    trainer = Trainer(ADAPTATION, Reverse(), truncation=Truncation(4), tasks_per_step=1)
    found = plan(trainer, WAVES, candidates=TWO[:1], budget=1)
    assert found.chosen is None and found.largest_horizon is None
    with pytest.raises(BudgetError) as caught:
        found.choose()
    assert "inner steps do not help" not in str(caught.value)


def test_programs_that_turn_out_the_same_cost_the_same():
    """MAML's theta_0 is eta: there is no step to peel off."""
    peeled = Candidate(Reverse(peel=True))
    found = plan(TRAINER, WAVES, candidates=(TWO[0], peeled))
    assert found.rows[0].cost is found.rows[1].cost


def test_one_task_at_a_time_is_looked_at_when_asked_for():
    found = plan(TRAINER, WAVES, candidates=TWO[:1], all_chunks=True)
    assert [one.chunk for one in found.rows] == [4, 1]
    assert found.rows[1].peak < found.rows[0].peak and found.choose().chunk == 4


def test_tasks_that_outgrow_the_cache_of_a_cpu_are_planned_as_they_are_unrolled(monkeypatch):
    monkeypatch.setattr(batched_means, "CACHE", 10)
    for backend, chunks in (("cpu", [1]), ("gpu", [4, 1])):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found = plan(TRAINER, WAVES, candidates=TWO[:1], all_chunks=True, budget=2**30)
        assert [one.chunk for one in found.rows] == chunks
    asked = dataclasses.replace(TRAINER, chunk=4)
    assert plan(asked, WAVES, candidates=TWO[:1], budget=2**30).choose().chunk == 4
    assert choose_engine(asked, WAVES, budget=2**30, progress=False).chunk == 4


# Where little fits.


@pytest.mark.slow
def test_where_not_all_tasks_fit_the_most_that_do_are_taken():
    one, two, all_at_once = (peak(TRAINER, n) for n in (1, 2, 4))
    assert one < two < all_at_once
    found = plan(TRAINER, WAVES, candidates=TWO[:1], budget=two)
    assert [row.chunk for row in found.rows] == [4, 1, 2]
    assert found.choose().chunk == 2 and found.choose().peak == two
    assert plan(TRAINER, WAVES, candidates=TWO[:1], budget=two - 1).choose().chunk == 1


@pytest.mark.slow
def test_where_nothing_fits_the_least_that_would_do_and_the_largest_horizon_are_named():
    trainer = dataclasses.replace(TRAINER, tasks_per_step=1)
    budget = peak(trainer, inner_steps=2)
    assert peak(trainer, inner_steps=3) > budget
    found = plan(trainer, WAVES, candidates=TWO[:1], budget=budget)
    assert found.chosen is None and found.largest_horizon == 2
    with pytest.raises(BudgetError) as caught:
        found.choose()
    assert str(caught.value) == (
        f"No exact engine fits {show_bytes(budget)}. The leanest, Reverse() with 1 task at a "
        f"time, needs {show_bytes(peak(trainer))}: the least that would do. With it, inner_steps=2 "
        "is the largest horizon that fits. Give it that memory, or take a smaller model or fewer "
        "examples in a batch."
    )


@pytest.fixture
def two_candidates(monkeypatch):
    monkeypatch.setattr(planning, "CANDIDATES", TWO)


def test_one_call_returns_the_trainer_with_the_engine_of_the_plan_and_says_why(
    two_candidates, capsys
):
    expected = plan(TRAINER, WAVES, candidates=TWO, budget=2**30)
    trainer = choose_engine(dataclasses.replace(TRAINER, engine=MixedFlow()), WAVES, budget="1GiB")
    assert trainer.engine == expected.choose().engine and trainer.chunk is None
    printed = capsys.readouterr()
    assert printed.out == f"engine: {expected.reason()}.\n"
    assert f"compiling engines, {tasks_at_once(TRAINER.batch.at_once)}" in printed.err
    assert choose_engine(TRAINER, WAVES, progress=False).engine == trainer.engine
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_small_budget_has_fewer_tasks_at_once_or_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "CANDIDATES", TWO[:1])
    budget = peak(TRAINER, 1)
    trainer = choose_engine(TRAINER, WAVES, budget=budget, progress=False)
    assert trainer.chunk == 1 and peak(trainer, trainer.chunk) <= budget
    with pytest.raises(BudgetError, match=r"^No exact engine fits 1\.0 KiB\. The leanest, "):
        choose_engine(TRAINER, WAVES, budget="1KiB", progress=False)


def test_a_plan_of_segments_says_what_is_kept_and_what_is_run_again():
    trainer = Trainer(Walk(24), MixedFlow(), tasks_per_step=2, segment=2, replay=Replay(states=3))
    cut = StepCosts(trainer, Aims()).row(Candidate(MixedFlow()), 2)
    assert cut.segments is not None and cut.cost is not None
    assert cut.segments.replays == replays(12, 3)
    assert cut.segments.programs == advances(12, 3) + 12
    assert (cut.segments.device, cut.segments.host, cut.segments.disk) == (0, 3, 0)
    assert cut.segments.recomputed == 11
    assert "differentiate" in StepCosts(trainer, Aims()).row(Candidate(ES()), 2).refusal


@pytest.mark.slow
def test_the_temporaries_of_a_segment_do_not_grow_with_the_horizon():
    def temporaries(steps):
        trainer = Trainer(Walk(steps), MixedFlow(), tasks_per_step=2, segment=2)
        costs = trainer.segments(Aims()).costs(trainer.shapes(), Aims(), KNOWN)
        return [costs[name].temporaries for name in ("advance 2", "pull_back")]

    assert max(temporaries(24)) > 0 and temporaries(24) == temporaries(24_000)


@pytest.mark.slow
def test_where_not_one_inner_step_fits_that_is_said():
    found = plan(TRAINER, WAVES, candidates=TWO[:1], budget=1)
    assert found.inner_steps == 4 and found.largest_horizon == 0
    assert [one.chunk for one in found.rows] == [4, 1]
    with pytest.raises(
        BudgetError, match=r"that would do\. Fewer inner steps do not help: not one"
    ):
        found.choose()


@pytest.mark.parametrize(
    ("algorithm", "takes"),
    [
        (ADAPTATION, range(1, 8)),
        (LearnedOptimizer(Quadratic(3), HypergradientRule(), inner_steps=8), range(1, 8)),
        (FDS(MODELS["Functions"], learned(3), inner_steps=8, batch=2), range(3, 8)),
        (FDS(MODELS["Functions"], learned((0, 3, 8)), inner_steps=8, batch=2), ()),
    ],
    ids=["MAML", "LearnedOptimizer", "FDS", "FDS-edges"],
)
def test_every_algorithm_sets_its_horizon_by_the_same_field(algorithm, takes):
    costs = StepCosts(Trainer(algorithm), WAVES)
    assert [steps for steps in range(1, 8) if costs.takes_horizon(steps)] == [*takes]
    for steps in takes:
        assert costs.with_horizon(steps).trainer.algorithm.inner_steps == steps


@pytest.mark.slow
def test_tasks_that_set_the_horizon_set_it_by_the_same_field_too():
    costs = StepCosts(Trainer(LearningRates(MODELS["Functions"])), TASKS["Text"])
    assert costs.takes_horizon(2) and costs.with_horizon(2).tasks.inner_steps == 2
    support, _ = costs.with_horizon(2).tasks.sample(jax.random.key(0))
    assert support.inputs.shape[0] == 2


def test_where_every_engine_refuses_its_reason_is_the_error():
    found = plan(TRAINER, WAVES, candidates=[Candidate(Hungry())])
    message = (
        r"^No exact engine serves this problem\. `Hungry\(\)` wants another problem\. Feed it\.$"
    )
    with pytest.raises(BudgetError, match=message):
        found.choose()


def test_an_algorithm_that_does_not_set_its_horizon_has_none_to_name():
    class Other(Algorithm):
        def init(self, key):
            return ADAPTATION.init(key)

        def unroll(self, episode, key):
            return ADAPTATION.unroll(episode, key)

    trainer = dataclasses.replace(TRAINER, algorithm=Other(), tasks_per_step=1)
    found = plan(trainer, WAVES, candidates=TWO[:1], budget=1)
    assert found.inner_steps == 3 and found.largest_horizon is None  # 3 shots: batches of one
    with pytest.raises(
        BudgetError, match=r"that would do\. Give it that memory, or take a smaller"
    ):
        found.choose()


# Amounts of memory.


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("40GiB", 40 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5e9", 1_500_000_000),
        (" 2 kb", 2000),
        ("0.5 TiB", 2**39),
        ("7", 7),
    ],
)
def test_an_amount_of_memory_is_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "GiB", "-1GiB", "40 GiB of it", "1e", "4,5GB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="is no amount of memory. Write a number and a unit, such"):
        parse_bytes(text)


def test_an_unknown_unit_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="^'40Gib2?B' is no amount of memory. Did you mean 'GiB'?"):
        parse_bytes("40GibB")


@pytest.mark.parametrize("count", [0, 1023, 1024, 10 * 2**20, 3 * 2**40, 5000 * 2**40])
def test_a_shown_amount_reads_back_to_the_same(count):
    assert parse_bytes(show_bytes(count)) == count


def test_a_device_without_a_limit_has_the_memory_of_its_host():
    assert 0 < host_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu":
        assert device_memory() == host_memory()
