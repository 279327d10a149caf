"""`metalearn plan`, and training with `engine="auto"`: what is typed, what comes back."""

import contextlib
import functools
import io
import json
import shutil

import jax
import pytest

from metalearn import Forward, MixedFlow, Reverse
from metalearn._utils import device_memory
from metalearn._utils.device_memory import parse_bytes
from metalearn.experiments import build
from metalearn.experiments.commands import plan as auto
from metalearn.experiments.configs import maml_digits
from metalearn.planning import plan
from tests.helpers.command_line import call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

SMALL = (
    *("--config=maml_sinusoid", "--config.model.hidden=(3,)", "--config.tasks_per_step=2"),
    *("--config.algorithm.inner_steps=2", "--config.health=False"),
)
PLAN = ("plan", *SMALL)
AUTO = (
    *("train", *SMALL, "--config.engine=auto", "--config.steps=2", "--config.test_tasks=4"),
    *("--config.eval_every=0", "--config.wandb.mode=disabled", "--noprogress"),
)
ENGINES = (Reverse(), Forward(), MixedFlow(micro_batches=4))


@pytest.fixture(scope="module", autouse=True)
def fewer_candidates():
    """Plan with an engine that is chosen, one that is not and one that refuses: seconds less.

    Programs that are equal are compiled once for all tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CANDIDATES", tuple(map(plan.Candidate, ENGINES)))
        patch.setattr(plan, "StepCosts", functools.partial(plan.StepCosts, known={}))
        yield


@pytest.fixture(scope="module")
def planned(fewer_candidates):
    """The plan as a program reads it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call(*PLAN, "--json") == 0
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def table(fewer_candidates):
    """The plan as a person reads it: lines."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call(*PLAN, "--budget=1GiB") == 0
    return printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def trained(fewer_candidates, tmp_path_factory):
    """The workdir of a run whose engine was chosen, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "auto"
    assert call(*AUTO, f"--workdir={workdir}") == 0
    return workdir


def choice_of(workdir):
    (record,) = (workdir / "checkpoints").glob("2/record/metadata")
    return json.loads(record.read_text())["config"]["auto"]


@pytest.mark.slow
def test_plan_prints_json_alone_with_a_row_for_each_engine_and_setting(planned):
    assert planned["budget"] == device_memory.device_memory()
    assert planned["jax"] == jax.__version__
    assert planned["tasks_per_step"] == planned["inner_steps"] == 2
    rows = [(row["engine"], row["engine_options"], row["chunk"]) for row in planned["rows"]]
    settings = [("reverse", {}), ("forward", {}), ("mixed_flow", {"micro_batches": 4})]
    assert rows == [(*one, chunk) for chunk in (2, 1) for one in settings]
    none = [row for row in planned["rows"] if row["cost"] is None]
    assert [row["engine"] for row in none] == ["mixed_flow"] * 2
    assert "`metalearn.ExampleMean`" in none[0]["refusal"] and not none[0]["fits"]


def test_the_json_of_a_cost_adds_up_and_compares_with_plain_training(planned):
    plain = planned["plain"]
    for row in planned["rows"]:
        if row["cost"]:
            cost = row["cost"]
            parts = cost["arguments"] + cost["temporaries"] + cost["output"] - cost["aliased"]
            assert cost["peak"] == parts and row["fits"] and row["refusal"] is None
            assert cost["peak_of_plain"] == cost["peak"] / plain["peak"]
            assert cost["flops_of_plain"] == cost["flops"] / plain["flops"] > 1
    best = planned["rows"][planned["chosen"]]
    assert (best["engine"], best["chunk"]) == ("reverse", 2)
    assert planned["why"].startswith("Reverse() with 2 tasks at once: of the exact settings that ")


def test_plan_prints_an_aligned_table_with_the_chosen_row_marked(table):
    assert table[0].startswith("An outer step of 2 tasks of 2 inner steps; ")
    assert table[0].endswith(f", jax {jax.__version__}; budget 1.0 GiB")
    header, plain, *rows = table[2 : table.index("", 2)]
    assert header.split()[:3] == ["engine", "tasks", "memory"]
    assert plain.split()[:3] == ["plain", "training", "2"] and plain.count("1.00x") == 2
    names = [row[1:].split()[0] for row in rows]
    assert names == ["Reverse()", "Forward()"] * 2 and [row[0] for row in rows] == ["*", *"   "]
    assert {len(row) for row in (header, *rows)} == {len(header)}  # the last column is full
    (refusal,) = [line for line in table if " refuses: " in line]
    assert refusal.startswith("MixedFlow(micro_batches=4) refuses: `MixedFlow(micro_batches=4)` ")


def test_plan_ends_with_the_choice_and_the_options_that_make_it(table):
    assert table[-2].startswith("Chosen: Reverse() with 2 tasks at once: ")
    assert table[-1] == "  --config.engine=reverse --config.chunk=2"


@pytest.mark.slow
def test_a_budget_that_nothing_fits_ends_with_status_2_after_the_table(capsys):
    assert call(*PLAN, "--budget=1kB") == 2
    captured = capsys.readouterr()
    assert "plain training" in captured.out and "*" not in captured.out
    assert "Chosen" not in captured.out
    bar, message = captured.err.rsplit("\nmetalearn: ", 1)
    assert message.startswith("No exact engine fits 1000 B. The leanest, ")
    assert "compiling engines, 2 tasks at once" in bar and "Traceback" not in bar


@pytest.mark.slow
def test_a_budget_that_nothing_fits_is_json_too(capsys):
    assert call(*PLAN, "--budget=1kB", "--json", "--config.tasks_per_step=1") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] is None and not any(row["fits"] for row in found["rows"])


@pytest.mark.slow
def test_the_largest_value_of_a_key_fits_and_twice_as_much_does_not(capsys):
    one = (*PLAN, "--config.tasks_per_step=1", "--config.model.hidden=(40,)")
    words = ("--json", "--budget=30KiB", "--largest=dataset.queries")
    assert call(*one, *words) == 0
    most = json.loads(capsys.readouterr().out)["largest"]
    assert most["key"] == "dataset.queries" and most["value"] > 10
    assert most["value"] % 10 == 0 and parse_bytes(most["beyond"]) > 30 * 2**10
    assert call(*one, *words, f"--config.dataset.queries={2 * most['value']}") == 2
    smaller = json.loads(capsys.readouterr().out)
    assert smaller["largest"] == most and smaller["chosen"] is None


@pytest.mark.parametrize("key", ["dataset.querys", "dataset", "algorithm.first_order", "engine"])
def test_what_has_no_size_has_no_largest_value(refused, key):  # noqa: F811
    message = refused(*PLAN, f"--largest={key}")
    assert message.startswith("--largest takes a key of the config that holds a positive integer")
    assert f"but {key!r} holds " in message


def test_what_plan_cannot_read_is_refused(refused):  # noqa: F811
    message = refused(*PLAN, "--budget=40Gb2")
    assert message.startswith("'40Gb2' is no amount of memory.")
    assert refused("plan").startswith("`metalearn plan` needs a config: --config=NAME, ")


@pytest.mark.slow
def test_planning_reads_a_dataset_without_putting_it_on_the_device():
    plain = build.to_json(maml_digits.get_config())
    build.splits(plain["dataset"])  # prepared and cached
    before = {id(array) for array in jax.live_arrays()}
    trainer, tasks = auto.abstract(plain)
    assert {id(array) for array in jax.live_arrays()} <= before
    assert isinstance(tasks.examples, jax.ShapeDtypeStruct) and tasks.examples.shape[0] == 20
    eta = jax.eval_shape(trainer.init, jax.random.key(0)).eta
    assert isinstance(jax.tree.leaves(eta)[0], jax.ShapeDtypeStruct)


def test_auto_takes_the_engine_of_the_plan_and_says_why(trained, planned):
    chosen = planned["rows"][planned["chosen"]]
    assert choice_of(trained) == {
        **{key: chosen[key] for key in ("engine", "engine_options", "chunk")},
        "why": planned["why"],
    }


@pytest.mark.slow
def test_a_resumed_run_keeps_its_engine_on_a_device_of_another_size(
    trained, tmp_path, capsys, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "test.json").unlink()
    monkeypatch.setattr(device_memory, "host_memory", lambda: 1)
    capsys.readouterr()
    assert call(*AUTO, f"--workdir={workdir}") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"engine: {choice_of(trained)['why']} (chosen when the run began)."
    assert choice_of(workdir) == choice_of(trained)


@pytest.mark.slow
def test_auto_on_a_device_that_nothing_fits_is_refused(refused, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(device_memory, "host_memory", lambda: 1)
    message = refused(*AUTO, f"--workdir={tmp_path / 'run'}")
    assert message.startswith("No exact engine fits 1 B. The leanest, ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_auto_chooses_for_the_budget_of_the_command_line(refused, tmp_path):  # noqa: F811
    message = refused(*AUTO, f"--workdir={tmp_path / 'run'}", "--budget=100B")
    assert message.startswith("No exact engine fits 100 B. The leanest, ")


def test_a_budget_for_an_engine_that_is_named_is_refused(refused, tmp_path):  # noqa: F811
    words = (*AUTO, f"--workdir={tmp_path / 'run'}", "--config.engine=reverse", "--budget=8GiB")
    assert refused(*words) == (
        "--budget is the memory that engine='auto' chooses an engine for, but the engine is "
        "'reverse'. Add --config.engine=auto, or leave --budget out."
    )


def test_a_run_whose_engine_was_chosen_is_evaluated_and_changed_configs_are_refused(
    trained,
    refused,  # noqa: F811
    capsys,
):
    assert call("eval", f"--workdir={trained}", "--tasks=4") == 0
    assert "loss" in capsys.readouterr().out
    assert call(*AUTO, f"--workdir={trained}", "--config.engine=reverse") == 2
    assert "\n  config.engine: 'auto' -> 'reverse'\n" in capsys.readouterr().err


def test_auto_with_an_option_of_an_engine_is_refused(refused, tmp_path):  # noqa: F811
    message = refused(*AUTO, f"--workdir={tmp_path}", "--config.engine_options.remat=step")
    assert message == (
        'engine="auto" chooses the options of the engine too, but engine_options.remat is set. '
        "Leave it unset, or name the engine."
    )
