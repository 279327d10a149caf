"""What the loggers write, read back from where they wrote it."""

import json
import os
import subprocess
import sys

import jax
import optax
import pytest

from metalearn import Reverse, Trainer
from metalearn._utils.intervals import Estimate
from metalearn.algorithms import MAML, squared_error
from metalearn.checkpoints.manager import Checkpoints
from metalearn.datasets import Sinusoid
from metalearn.loggers import ConsoleLogger, JsonlLogger, WandbLogger
from metalearn.models import Functions
from tests.helpers.selection import quick
from tests.helpers.wandb_runs import records_of

TABLE = {"loss": Estimate(1.25, 0.5, 600), "accuracy": Estimate(0.75, 0.125, 600)}


def test_jsonl_logger_appends_one_object_a_line_in_a_directory_it_makes(tmp_path):
    logger = JsonlLogger(tmp_path / "new" / "metrics.jsonl")
    logger.start(0, {}, {})
    logger.log(1, {"loss": 0.5})
    logger.log(2, {"loss": 0.25, "eval/loss": 1.0})
    logger.finish(TABLE)
    assert [json.loads(line) for line in logger.path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "eval/loss": 1.0},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', '{"step": 4, "loss": 1.0}'])
def test_jsonl_logger_drops_what_came_after_the_resumed_step_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "eval/loss": 2.5}\n'
    path.write_text(kept + '{"step": 3, "loss": 1.0}\n' + torn)
    logger = JsonlLogger(path)
    logger.start(2, {}, {})
    assert path.read_text() == kept
    logger.log(3, {"loss": 0.5})
    assert path.read_text() == kept + '{"step": 3, "loss": 0.5}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_logger_keeps_what_was_logged_inside_the_step_that_goes_on(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0, {}, {})
    logger.log(1, {"loss": 0.5})
    logger.log(2, {"run/inner_step": 100.0, "run/inner_loss": 3.0})
    kept, record = logger.path.read_text(), logger.record()
    logger.log(2, {"run/inner_step": 200.0, "run/inner_loss": 2.0})  # after the checkpoint
    logger.log(2, {"loss": 0.25})
    for _ in range(2):
        JsonlLogger(logger.path).start(1, {}, json.loads(json.dumps(record)))
        assert logger.path.read_text() == kept
    JsonlLogger(logger.path).start(1, {}, {"size": "all"})
    assert logger.path.read_text() == '{"step": 1, "loss": 0.5}\n'


BAD = {
    "NULs after a power loss": b"\0" * 400,
    "half a line": b'{"step": 2, "lo',
    "invalid UTF-8": b'{"step": 2, "l\xff": 1.0}',
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "2", "loss": 1.0}',
    "a step that is true": b'{"step": true, "loss": 1.0}',
    "no step but null": b'{"step": null}',
    "a list": b"[2, 1.0]",
    "nothing": b"",
    "two lines in one": b'{"step": 2, "loss": 1.0}{"step": 3, "loss": 1.0}',
    "nested without end": b"[" * 100_000,
    "NULs before a line": b'\0\0\0{"step": 2, "loss": 1.0}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_jsonl_logger_sets_a_bad_line_aside_names_it_and_goes_on(bad, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    first, second = b'{"step": 1, "loss": 3.0}\n', b'{"step": 2,  "loss": 2.0}\n'
    path.write_bytes(first + bad + b"\n" + second + b'{"step": 3, "loss": 1.0}\n')
    logger = JsonlLogger(path)
    logger.start(2, {}, {})
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: line 2 cannot be read (")
    assert said.endswith("): moved to metrics.jsonl.bad. The run goes on.\n")
    assert path.read_bytes() == first + second
    assert path.with_name("metrics.jsonl.bad").read_bytes() == bad + b"\n"
    logger.log(3, {"loss": 0.5})
    again = JsonlLogger(path)
    again.back_to(3)
    assert path.read_bytes() == first + second + b'{"step": 3, "loss": 0.5}\n'
    assert capsys.readouterr().out == ""


def test_many_bad_lines_are_counted_and_kept_with_those_of_before(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        path.write_bytes(b"\0\n" * 8 + b'{"step": 1}\n')
        JsonlLogger(path).start(1, {}, {})
        assert f"{path}: lines 1, 2, 3, 4, 5 and 3 more cannot be" in capsys.readouterr().out
    assert path.read_bytes() == b'{"step": 1}\n'
    assert path.with_name("metrics.jsonl.bad").read_bytes() == b"\0\n" * 16


@pytest.mark.parametrize("record", [{"waiting": 5}, {"waiting": [None, "no"]}, {"waiting": {}}])
def test_jsonl_logger_drops_what_a_damaged_record_says_was_waiting(record, tmp_path):
    JsonlLogger(tmp_path / "metrics.jsonl").start(2, {}, record)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_jsonl_logger_begins_anew_where_nothing_was_checkpointed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n')
    JsonlLogger(path).start(0, {}, {})
    assert path.read_text() == ""


@pytest.fixture
def full_disk():
    """A function that fills the disk, as far as this process can tell, or makes room again."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]) if full else before)

    yield fill
    fill(False)


def test_lines_that_a_full_disk_refuses_wait_and_are_written_later(tmp_path, full_disk, capsys):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0, {}, {})
    rows = [{"step": step, "loss": 0.5 * step} for step in range(1, 6)]
    for row in rows:
        full_disk(2 <= row["step"] <= 4)
        logger.log(row["step"], {"loss": row["loss"]})
        kept = logger.path.read_text().splitlines()
        expected = rows[: row["step"]] if row["step"] in (1, 5) else rows[:1]
        assert [json.loads(line) for line in kept] == expected
    assert capsys.readouterr().out.count("its lines wait in memory") == 1


def test_lines_that_wait_are_taken_back_kept_in_the_record_and_missed(tmp_path, full_disk, capsys):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0, {}, {})
    logger.log(1, {"loss": 1.0})
    full_disk(True)
    for step in (2, 3):
        logger.log(step, {"loss": 10.0 * step})
    logger.back_to(2)
    record = logger.record()
    logger.finish()
    assert f"{logger.path} lacks its last 1 lines: the disk is full." in capsys.readouterr().out
    full_disk(False)
    again = JsonlLogger(logger.path)
    again.start(2, {}, json.loads(json.dumps(record)))
    rows = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 20.0}]


STEP = {
    "loss": 1.23456,
    "inner_loss_first": 2.0,
    "inner_loss_last": 0.5,
    "inner_finite": 1.0,
    "inner_steps_finite": 3.0,
    "inner_update_norm": 0.1,
    "accuracy": 0.75,
    "tasks_left_out": 0.0,
    "meta_grad_norm": 0.25,
    "meta_update_norm": 0.001,
    "time/seconds": 3.0,
    "time/steps_per_second": 4.0,
    "time/tasks_per_second": 64.123,
}


def rows(capsys):
    return capsys.readouterr().out.splitlines()


def test_console_rows_name_their_split_and_the_table_is_of_the_test_split(capsys):
    logger = ConsoleLogger()
    logger.start(0, {}, {})
    logger.log(5, {"loss": 1.23456})
    logger.log(15, {"eval/loss": 2.0, "eval/loss_ci95": 0.123})
    logger.finish(TABLE)
    assert rows(capsys) == [
        "train       step      5  loss 1.235",
        "validation  step     15  loss 2 +- 0.12",
        "test        loss  1.2500 +- 0.5000  (95% interval, 600 tasks)",
        "test        accuracy  0.7500 +- 0.1250  (95% interval, 600 tasks)",
    ]


def test_console_rows_can_be_thinned_but_evaluations_are_all_printed(capsys):
    logger = ConsoleLogger(every=10)
    for step in (5, 10):
        logger.log(step, {"loss": 1.0})
    logger.log(15, {"eval/loss": 2.0})
    assert [row.split()[:3] for row in rows(capsys)] == [
        ["train", "step", "10"],
        ["validation", "step", "15"],
    ]


def test_a_console_row_shows_what_a_person_reads_in_the_order_of_importance(capsys):
    ConsoleLogger().log(1, STEP)
    ConsoleLogger().log(2, {"loss": 0.5, "meta_grad_norm": 0.25})
    assert rows(capsys) == [
        "train       step      1  loss 1.235  accuracy 0.75  inner_loss 2 -> 0.5  64.1 tasks/s",
        "train       step      2  loss 0.5  meta_grad_norm 0.25",
    ]


@pytest.mark.parametrize(
    ("name", "silent", "speaks"),
    [("inner_finite", 1.0, 0.5), ("tasks_left_out", 0.0, 2.0), ("step_skipped", 0.0, 1.0)],
)
def test_a_console_row_names_what_went_wrong_before_all_but_the_loss(name, silent, speaks, capsys):
    ConsoleLogger().log(1, {**STEP, name: silent})
    ConsoleLogger().log(1, {**STEP, name: speaks})
    well, badly = rows(capsys)
    assert name not in well
    assert f"loss 1.235  {name} {speaks:.4g}  accuracy" in badly


def test_the_inner_loss_after_the_only_inner_step_is_not_repeated(capsys):
    ConsoleLogger().log(1, {**STEP, "inner_loss_last": STEP["inner_loss_first"]})
    (row,) = rows(capsys)
    assert "  inner_loss 2  " in row


def test_a_console_row_fits_100_columns_whatever_is_logged(capsys):
    many = {f"a_metric_with_a_long_name_{i}": 1 / 3 for i in range(20)}
    ConsoleLogger().log(1, {**STEP, **many})
    ConsoleLogger().log(1, {f"eval/{name}": value for name, value in many.items()})
    assert all(60 < len(row) <= 100 for row in rows(capsys))


def test_a_split_is_in_colour_in_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ConsoleLogger().log(1, {"loss": 1.0})
    (row,) = rows(capsys)
    assert row == "\x1b[36mtrain     \x1b[0m  step      1  loss 1"


def test_console_logger_prints_nothing_where_there_is_no_table(capsys):
    ConsoleLogger().finish()
    assert capsys.readouterr().out == ""


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """The environment of somebody who never logged in to W&B, with a home of their own."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
    return home


@pytest.fixture
def wandb(nobody):
    """W&B, its background process ended afterwards."""
    import wandb

    yield wandb
    wandb.teardown()


def without_underscores(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith("_")}


def test_an_offline_wandb_run_holds_the_config_the_scalars_by_step_and_the_table(wandb, tmp_path):
    model = Functions(lambda key: jax.random.normal(key), lambda params, x: params * x)
    trainer = Trainer(MAML(model, squared_error, optax.sgd(0.01)), Reverse(), tasks_per_step=2)
    tasks, key = Sinusoid(shots=2, queries=2), jax.random.key(0)
    config = {"seed": 0, "model": {"hidden": [40, 40]}}
    logger = WandbLogger(mode="offline", name="a name", group="a group", directory=tmp_path / "run")
    rows = JsonlLogger(tmp_path / "metrics.jsonl")
    checkpoints = Checkpoints(tmp_path / "checkpoints", config, every=4)
    state = trainer.fit(
        tasks,
        5,
        key=key,
        loggers=[logger, rows],
        checkpoints=checkpoints,
        held_out=tasks,
        eval_every=4,
        eval_tasks=4,
        log_every=2,
        progress=False,
    )
    found = trainer.evaluate(state.eta, tasks, key, 4)
    logger.finish(found)
    _, kept = checkpoints.restore(state)
    checkpoints.close()

    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    records = records_of(run)
    (started,) = (record["run"] for record in records if record["type"] == "run")
    assert without_underscores(started["config"]["update"]) == config
    assert started["project"] == "metalearn"
    assert kept["WandbLogger"] == {"wandb_id": started["run_id"], "wandb_step": 5}
    assert (started["display_name"], started["run_group"]) == ("a name", "a group")

    expected: dict[int, dict] = {}
    for line in rows.path.read_text().splitlines():
        row = json.loads(line)
        expected.setdefault(row.pop("step"), {}).update(row)
    history = [record["history"] for record in records if record["type"] == "history"]
    scalars = {
        row["step"]["num"]: {
            name: value
            for name, value in without_underscores(row["item"]).items()
            if not name.startswith("test.")
        }
        for row in history
    }
    assert sorted(scalars) == [2, 4, 5]
    assert {"eval/loss", "eval/loss_ci95", "loss", "meta_grad_norm"} <= scalars[4].keys()
    assert scalars == expected

    assert history[-1]["item"]["test._type"] == "table-file"
    (table,) = (json.loads(file.read_text()) for file in run.glob("files/media/table/*.json"))
    assert table["columns"] == ["metric", "mean", "ci95", "tasks"]
    assert table["data"] == [[name, *estimate] for name, estimate in found.items()]
    summary: dict = {}
    for record in records:
        summary |= record.get("summary", {}).get("update", {})
    assert summary["test/loss"] == found["loss"].mean


def test_wandb_shows_what_was_logged_last_inside_a_step(wandb, tmp_path):
    logger = WandbLogger(mode="offline", directory=tmp_path)
    logger.start(0, {}, {})
    for inner_step in (100.0, 200.0):
        logger.log(1, {"run/inner_step": inner_step, "run/inner_loss": 3.0})
    logger.abandon()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    updates = [
        record["summary"]["update"] for record in records_of(run) if record["type"] == "summary"
    ]
    steps = [update["run/inner_step"] for update in updates if "run/inner_step" in update]
    assert steps[:2] == [100.0, 200.0]


def test_a_resumed_wandb_run_keeps_its_id(wandb, tmp_path):
    logger = WandbLogger(mode="offline", directory=tmp_path)
    logger.start(2, {}, {"wandb_id": "kept"})
    assert logger.record() == {"wandb_id": "kept", "wandb_step": 2}
    logger.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-kept.wandb"))


@pytest.mark.slow
def test_where_the_wandb_server_does_not_answer_the_run_is_logged_offline(
    wandb, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "4")
    logger = WandbLogger(mode="online", directory=tmp_path)
    logger.start(0, {"seed": 0}, {})
    logger.log(1, {"loss": 0.5})
    logger.finish(TABLE)
    said = capsys.readouterr().out
    assert "W&B does not answer" in said
    (run,) = tmp_path.glob("wandb/offline-run-*")
    history = [row["history"] for row in records_of(run) if row["type"] == "history"]
    assert history[0]["item"]["loss"] == 0.5


@pytest.mark.parametrize(
    ("fails", "code"), quick([(False, 0), (True, 1)], lambda fails, code: fails)
)
def test_a_run_that_failed_is_marked_as_such(wandb, tmp_path, fails, code):
    logger = WandbLogger(mode="offline", directory=tmp_path)
    logger.start(0, {}, {})
    logger.log(1, {"loss": 0.5})
    logger.abandon() if fails else logger.finish()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (end,) = [record["exit"] for record in records_of(run) if record["type"] == "exit"]
    assert end["exit_code"] == code


def test_a_disabled_wandb_run_writes_nothing(wandb, tmp_path):
    logger = WandbLogger(mode="disabled", directory=tmp_path / "run")
    logger.start(0, {"seed": 0}, {})
    logger.log(1, {"loss": 1.0})
    logger.finish(TABLE)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


ANSWER_NOTHING = """
import sys
from metalearn.loggers import WandbLogger

logger = WandbLogger(directory=sys.argv[1])
logger.start(0, {}, {})
logger.log(1, {"loss": 1.0})
logger.finish()
"""


@pytest.mark.slow
def test_auto_mode_is_offline_for_somebody_not_logged_in_and_asks_nothing(nobody, tmp_path):
    command = [sys.executable, "-c", ANSWER_NOTHING, str(tmp_path / "run")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert any(record["type"] == "history" for record in records_of(run))


WITHOUT = """
import sys

class NoWandb:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "wandb", "W&B is imported"

sys.meta_path.insert(0, NoWandb())
from metalearn.experiments import main  # all that the commands need
from metalearn.loggers import WandbLogger

for logger in (WandbLogger(mode="disabled", directory=sys.argv[1]), WandbLogger()):
    logger.start(1, {"seed": 0}, {"wandb_id": "before", "wandb_step": 1})
    logger.log(2, {"loss": 1.0})
    logger.show({"curve": "curve.png"})
    logger.back_to(1)
    assert logger.record() == {"wandb_id": "before", "wandb_step": 1}
    logger.finish({})
    logger.abandon()
for mode in ("auto", "online", "offline"):
    WandbLogger(mode=mode)
try:
    WandbLogger(mode="onlin")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_run_without_wandb_does_not_import_it_and_keeps_its_id_for_later(nobody, tmp_path):
    """Nor do the other commands, or what says that a mode is none."""
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "run")]
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("W&B's mode is 'onlin'.") and not (tmp_path / "run").exists()


def test_auto_mode_does_what_the_environment_says(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbLogger(directory=tmp_path / "run")
    logger.start(0, {}, {})
    logger.log(1, {"loss": 1.0})
    logger.finish()
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_an_unknown_wandb_mode_is_refused_with_those_there_are():
    expected = r"^W&B's mode is 'ofline'. It can be: auto, online, offline, disabled\.$"
    with pytest.raises(ValueError, match=expected):
        WandbLogger(mode="ofline")


def test_a_wandb_logger_that_never_started_has_nothing_to_record_or_finish():
    logger = WandbLogger(mode="online")
    logger.finish(TABLE)
    assert logger.record() == {}


@pytest.mark.slow
def test_online_mode_without_a_login_is_refused_and_asks_nothing(nobody, tmp_path):
    script = ANSWER_NOTHING.replace("directory", "mode='online', directory")
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "Run `wandb login` once, or use the mode 'offline'" in done.stderr
