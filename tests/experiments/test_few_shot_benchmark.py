"""The few-shot benchmark: its protocols can be built, its runs resume, its table is honest."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from metalearn._utils.intervals import Estimate
from metalearn.algorithms import MAML, R2D2, ProtoNet
from metalearn.datasets import ClassIndex
from metalearn.experiments.benchmarks import few_shot
from metalearn.models import Linen, train_flag
from metalearn.models.linen_networks import ConvNet
from metalearn.optimizers.averaged import Averaged
from tests.helpers.selection import quick

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("method", "tasks"),
    quick(
        [(method, tasks) for method in few_shot.METHODS for tasks in few_shot.TASKS],
        lambda method, tasks: method in ("maml_plus_plus", "protonet") and tasks == "20w1s",
    ),
)
def test_a_protocol_is_of_its_tasks(method, tasks):
    ways, shots = few_shot.TASKS[tasks]
    protocol = few_shot.Run(method, tasks, 0).protocol
    eta = jax.eval_shape(protocol.algorithm.init, KEY)
    assert jax.tree.leaves(eta) and protocol.steps >= 20_000
    assert protocol.ways >= ways and protocol.shots >= shots
    assert protocol.algorithm.own_head == isinstance(protocol.algorithm, ProtoNet | R2D2)


def test_first_order_maml_anil_and_meta_sgd_are_what_they_say():
    of = {name: few_shot.Run(name, "5w1s", 0).protocol.algorithm for name in few_shot.METHODS}
    assert of["first_order_maml"].first_order and of["anil"].adapted == "head"
    assert of["meta_sgd"].learned_rates == 0.1 and of["imaml"].proximal == 2.0
    assert isinstance(of["maml"], MAML) and of["maml"].evaluation_steps == 3


def test_the_table_says_what_was_run_and_what_was_not():
    row = {"method": "protonet", "tasks": "5w1s", "steps": 400, "queries": 15, "accuracy": 0.95}
    row |= few_shot.DEFAULTS
    rows = [{**row, "seed": 0, "half_width": 0.004}]
    lines = few_shot.table(rows).splitlines()
    (ours,) = (line for line in lines if line.startswith("| protonet (1703.05175) | 5w1s |"))
    assert "| 15 | 98.8 | 95.00 +- 0.40 | 1 | 400 of 20,000 |" in ours
    assert len(lines) == 2 + len(few_shot.METHODS) * len(few_shot.TASKS)
    assert sum("| not run | 0 | - |" in line for line in lines) == len(lines) - 3
    two = [*rows, {**row, "seed": 1, "accuracy": 0.97, "half_width": 0.004}]
    assert "| 96.00 +- 12.71 | 2 |" in few_shot.table(two)  # Student's t of one degree of freedom
    other = few_shot.table([*rows, {**rows[0], "queries": 5, "accuracy": 0.99}])
    assert "| 5 | 98.8 | 99.00 +- 0.40 | 1 |" in other and "| 15 | 98.8 | 95.00 +- 0.40 |" in other
    other = few_shot.table([*rows, {**rows[0], "split": "validation", "accuracy": 0.99}])
    assert "| 15 | 98.8 | 99.00 +- 0.40 (validation) | 1 |" in other
    assert "| 15 | 98.8 | 95.00 +- 0.40 | 1 |" in other
    other = few_shot.table([*rows, {**rows[0], "eval_steps": 5, "last": True, "accuracy": 0.94}])
    assert "| 94.00 +- 0.40 (5 steps, last iterate) | 1 |" in other and "| 95.00 +- 0.40 |" in other


def test_rows_are_of_the_test_split_and_the_protocol_where_they_say_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"method": "maml"}\n')
    (row,) = few_shot.read_rows(tmp_path / "rows.jsonl")
    assert row == {"method": "maml", "split": "test", "eval_steps": None, "last": False}
    (tmp_path / "rows.jsonl").write_text('{"method": "maml", "tasks": "20w1s"}\n')
    (row,) = few_shot.read_rows(tmp_path / "rows.jsonl")  # before it was averaged
    assert row["eval_steps"] == 5 and row["last"]


def test_only_maml_of_20_ways_is_judged_at_an_average_and_adapts_by_ten_steps():
    for method in few_shot.METHODS:
        for tasks in ("5w1s", "20w1s"):
            protocol = few_shot.Run(method, tasks, 0).protocol
            state = protocol.optimizer.init({"w": jnp.zeros(1)})
            assert isinstance(state, Averaged) == ((method, tasks) == ("maml", "20w1s"))
            if method in ("maml", "first_order_maml") and tasks == "20w1s":
                assert protocol.algorithm.evaluation_steps == (10 if method == "maml" else 5)


def test_inner_steps_of_a_method_without_any_are_refused():
    assert few_shot.Run("maml", "20w1s", 0, eval_steps=5).eval_steps == 5
    with pytest.raises(ValueError, match="protonet adapts without inner steps"):
        few_shot.Run("protonet", "20w1s", 0, eval_steps=5)


def test_test_tasks_have_the_queries_of_the_paper_or_those_asked_for():
    queries = {name: few_shot.Run(name, "5w5s", 0).test_queries for name in few_shot.METHODS}
    fifteen = {name for name, count in queries.items() if count == 15}
    assert fifteen == {"reptile", "protonet", "r2d2"} and set(queries.values()) == {5, 15}
    assert few_shot.Run("maml", "5w1s", 0, queries=7).test_queries == 7


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="No method is called 'mamml'. Did you mean 'maml'?"):
        few_shot.Run("mamml", "5w1s", 0)


@pytest.fixture
def small_data(monkeypatch):
    """Noise in place of Omniglot, and few test tasks; a list of the splits that are read."""
    splits = []

    def of_classes(count):
        examples = np.random.default_rng(0).integers(0, 256, (count, 20, 28, 28, 1), np.uint8)
        index = ClassIndex(examples, np.full(count, 20, np.int32))
        monkeypatch.setattr(
            few_shot, "omniglot", lambda split, partition: splits.append(split) or index
        )
        return splits

    monkeypatch.setattr(few_shot, "TEST_TASKS", 20)
    return of_classes


@pytest.mark.slow
@pytest.mark.parametrize("tasks", few_shot.TASKS)
@pytest.mark.parametrize("method", few_shot.METHODS)
def test_every_setting_trains_and_is_tested(method, tasks, tmp_path, monkeypatch, small_data):
    """Two outer steps of narrow networks on tasks of the paper's shape."""
    small_data(80)  # 20 characters, each in four turns

    def narrow(outputs, **options):
        return Linen(ConvNet(outputs, filters=4, **options), few_shot.IMAGE, train_flag)

    monkeypatch.setattr(few_shot, "network", narrow)
    row = few_shot.Run(method, tasks, 0, 2).row(tmp_path)
    assert row.items() >= {"method": method, "tasks": tasks, "seed": 0, "steps": 2}.items()
    assert 0 <= row["accuracy"] <= 1 and row["half_width"] >= 0


@pytest.mark.slow
def test_the_same_run_is_judged_at_the_average_or_the_last_iterate(
    tmp_path, monkeypatch, small_data
):
    small_data(80)
    judged = []

    def evaluate(self, eta, tasks, key, count):
        judged.append((self.algorithm.evaluation_steps, eta))
        return {"accuracy": Estimate(0.5, 0.1, 20)}

    def narrow(outputs, **options):
        return Linen(ConvNet(outputs, filters=4, **options), few_shot.IMAGE, train_flag)

    monkeypatch.setattr(few_shot, "network", narrow)
    monkeypatch.setattr(few_shot.Trainer, "evaluate", evaluate)
    for options in ({}, {"last": True}, {"eval_steps": 5}):
        few_shot.Run("maml", "20w1s", 0, 2, **options).row(tmp_path)
    assert [steps for steps, _ in judged] == [10, 10, 5]
    average, last, again = (jax.flatten_util.ravel_pytree(eta)[0] for _, eta in judged)
    assert (average == again).all() and abs(average - last).max() > 1e-4


@pytest.mark.slow
def test_a_run_resumes_and_is_not_run_twice(tmp_path, monkeypatch, capsys, small_data):
    splits = small_data(8)
    small = few_shot.METHODS["protonet"].protocol(5, 1)
    algorithm = dataclasses.replace(small.algorithm, ways=6)
    protocol = small._replace(algorithm=algorithm, ways=6)
    method = few_shot.METHODS["protonet"]._replace(protocol=lambda ways, shots: protocol)
    monkeypatch.setitem(few_shot.METHODS, "protonet", method)
    words = ["--methods=protonet", "--tasks=5w1s", "--steps=2", f"--workdir={tmp_path}"]
    few_shot.main(words)
    assert "2 of 20,000" in capsys.readouterr().out
    (row,) = few_shot.read_rows(tmp_path / "rows.jsonl")
    few_shot.main(words)
    assert few_shot.read_rows(tmp_path / "rows.jsonl") == [row]
    (tmp_path / "rows.jsonl").unlink()
    few_shot.main(words)  # from the checkpoint
    assert few_shot.read_rows(tmp_path / "rows.jsonl") == [row]
    few_shot.main([*words, "--queries=3"])
    assert few_shot.read_rows(tmp_path / "rows.jsonl")[1]["queries"] == 3
    assert set(splits) == {"train", "test"}
    few_shot.main([*words, "--split=validation"])
    assert splits[-2:] == ["train", "validation"]
    assert few_shot.read_rows(tmp_path / "rows.jsonl").pop(2)["split"] == "validation"
    few_shot.main([*words, "--steps=4"])  # goes on where the run of two steps stopped
    assert "Going on from outer step 2 of 4" in capsys.readouterr().out
    assert few_shot.read_rows(tmp_path / "rows.jsonl")[3]["steps"] == 4
    with pytest.raises(ValueError, match="already taken 4 outer steps, and --steps asks for 3"):
        few_shot.main([*words, "--steps=3"])
