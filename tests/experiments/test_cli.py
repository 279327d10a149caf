"""The command line: what a user types, what comes back, and how soon."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from metalearn.experiments import build, main
from metalearn.experiments.cli import arguments
from metalearn.experiments.main import COMMANDS
from metalearn.loggers import JsonlLogger
from tests.helpers.command_line import SINUSOID, call
from tests.helpers.selection import quick

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

RUN = (*SINUSOID, "--noprogress", "--config.checkpoint_best=min eval/loss")
DIGITS = ("train", "--config=maml_digits", "--config.wandb.mode=disabled")


def process(*words: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "metalearn", *map(str, words)]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "sinusoid"
    assert call(*RUN, f"--workdir={workdir}") == 0
    return workdir


@pytest.mark.parametrize("words", [(), ("help",), ("--help",), ("-h",)])
def test_help_lists_the_commands_and_the_packaged_configs(words, capsys):
    assert call(*words) == 0
    shown = capsys.readouterr().out
    assert "metalearn train --config=" in shown and "metalearn eval " in shown
    assert re.search(rf"Commands: {', '.join(sorted(COMMANDS))}\.", shown)
    assert re.search(rf"Packaged configs: {', '.join(arguments.packaged())}\.", shown)


def test_an_unknown_command_is_refused_with_the_nearest_one(refused):
    there_are = (
        "There are: adapt, attribute, compare, doctor, draw, eval, export, list, plan, report, "
        "smooth, sweep, train."
    )
    expected = f"No command is called 'trian'. Did you mean 'train'? {there_are}"
    assert refused("trian") == expected


def test_an_unknown_config_is_refused_with_the_packaged_ones(refused, tmp_path):
    packaged = ", ".join(arguments.packaged())
    message = refused("train", "--config=maml_digit", f"--workdir={tmp_path}")
    assert message == (
        f"No config is called 'maml_digit'. Did you mean 'maml_digits'? There are: {packaged}."
    )


def test_a_config_file_that_is_not_there_is_refused(refused, tmp_path):
    message = refused("train", "--config=nowhere/mine.py", f"--workdir={tmp_path}")
    assert message == (
        "There is no config file nowhere/mine.py. A name without `.py` finds a packaged config: "
        f"{', '.join(arguments.packaged())}."
    )


def test_an_unknown_key_is_refused_with_the_nearest_one(refused, tmp_path):
    wrong = "--config.optimizer.learning_rat=0.1"
    message = refused(*DIGITS, f"--workdir={tmp_path}", wrong)
    assert message.startswith(
        "The config has no key 'optimizer.learning_rat'. "
        "Did you mean 'optimizer.learning_rate'? There are: algorithm.adapted, "
    )
    assert "dataset.ways" in message and message.endswith(".")


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        ("fds_digits", "algorithm.horizon", "algorithm.inner_steps"),
        ("fds_digits", "algorithm.eval_horizon", "algorithm.eval_steps"),
        ("loss_weights_shakespeare", "dataset.steps", "dataset.inner_steps"),
        ("maml_digits", "algorithm.adapt", "algorithm.adapted"),
    ],
)
def test_a_key_that_was_renamed_is_refused_with_its_new_name(refused, tmp_path, config, old, new):
    message = refused("train", f"--config={config}", f"--workdir={tmp_path}", f"--config.{old}=3")
    assert message.startswith(f"The config has no key {old!r}. It is called {new!r} now. There are")


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--config.dataset=digits", "dataset"),  # not a leaf
        ("-config.engin=reverse", "engin"),
        ("--noconfig.algorithm.first_orde", "algorithm.first_orde"),
    ],
)
def test_a_key_that_is_no_leaf_of_the_config_is_refused_however_it_is_set(
    refused, tmp_path, word, key
):
    message = refused(*DIGITS, f"--workdir={tmp_path}", word)
    assert message.startswith(f"The config has no key {key!r}.")


def test_an_unknown_engine_is_refused_with_those_there_are(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--config.engine=revers")
    known = ", ".join(sorted(build.ENGINES))
    assert message == f"No engine is called 'revers'. Did you mean 'reverse'? There are: {known}."


def test_an_unknown_dataset_is_refused_with_those_there_are(refused, tmp_path):
    message = refused(*DIGITS, f"--workdir={tmp_path}", "--config.dataset.name=celeb_a")
    known = ", ".join(sorted(build.DATASETS))
    assert message == f"No dataset is called 'celeb_a'. There are: {known}."


def test_a_command_without_a_workdir_is_refused(refused):
    expected = "Say where the run lives, or is to live: --workdir=runs/my_run."
    assert refused(*DIGITS) == expected
    assert refused("eval") == expected


def test_training_without_a_config_is_refused_with_the_packaged_ones(refused, tmp_path):
    assert refused("train", f"--workdir={tmp_path}") == (
        "`metalearn train` needs a config: --config=NAME, --config=FILE.py or "
        f"--config=FILE.json. Packaged: {', '.join(arguments.packaged())}."
    )


@pytest.mark.parametrize("wrong", ["steps=many", "steps=1.5", "optimizer.learning_rate=fast"])
def test_a_value_of_the_wrong_type_is_refused_by_key(refused, tmp_path, wrong):
    message = refused(*DIGITS, f"--workdir={tmp_path}", f"--config.{wrong}")
    key, _, value = wrong.partition("=")
    assert message.startswith(f"config.{key} takes a")
    assert message.endswith(f", not {value!r}.")


def test_an_unknown_flag_is_refused_with_the_nearest_one(refused, tmp_path):
    message = refused(*DIGITS, f"--workdr={tmp_path}")
    assert message == "Unknown command line flag 'workdr'. Did you mean: workdir ?"


def test_an_unknown_wandb_mode_is_refused_with_those_there_are(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--config.wandb.mode=of")
    assert message == "W&B's mode is 'of'. It can be: auto, online, offline, disabled."


def test_an_engine_that_cannot_serve_the_problem_says_so_in_a_paragraph(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--config.engine=forward", "--noprogress")
    assert message.startswith("`Forward()` pushes one tangent per meta-parameter, but `eta` has ")
    assert "1,761 of them" in message and "Use `MixedFlow()`" in message
    assert "\n" not in message


def test_more_ways_than_there_are_classes_are_refused_in_a_paragraph(refused, tmp_path):
    message = refused(*DIGITS, f"--workdir={tmp_path}", "--config.dataset.ways=50")
    assert message.startswith("In the train split: `FewShot` got ways=50, but the index has 20 ")
    assert "\n" not in message


@pytest.mark.slow
def test_a_loss_that_diverges_is_reported_in_a_paragraph(refused, tmp_path):
    wrong = "--config.algorithm.optimizer.learning_rate=1e30"
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--noprogress", wrong)
    assert re.match(r"`loss` became (nan|inf) at outer step 1, ", message)
    assert "\n" not in message
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 1


def test_traceback_flag_shows_where_an_error_was_raised(tmp_path):
    wrong = "--config.dataset.name=mnist"
    with pytest.raises(ValueError, match="No dataset is called 'mnist'"):
        call(*DIGITS, f"--workdir={tmp_path}", wrong, "--traceback")


def test_a_config_file_of_ones_own_is_read_and_overridden(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from metalearn.experiments.configs import maml_sinusoid\n\n\n"
        "def get_config(seed='0'):\n"
        "    config = maml_sinusoid.get_config()\n"
        "    config.seed = int(seed)\n"
        "    return config\n"
    )
    options = [word for word in SINUSOID if not word.startswith(("train", "--config="))]
    workdir = tmp_path / "run"
    words = (f"--config={mine}:7", *options, "--config.model.hidden=(3, 5)", "--noprogress")
    words = (*words, "--config.eval_every=0")
    assert call("train", *words, f"--workdir={workdir}") == 0
    (record,) = (workdir / "checkpoints").glob("2/record/metadata")
    config = json.loads(record.read_text())["config"]
    assert config["seed"] == 7 and config["steps"] == 2 and config["model"]["hidden"] == [3, 5]


def test_training_leaves_the_score_on_test_tasks_and_the_metrics(finished):
    score = json.loads((finished / "test.json").read_text())
    assert score["loss"]["tasks"] == 4 and score["loss"]["ci95"] > 0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert [row["step"] for row in rows if "eval/loss" in row] == [1, 2]


def test_eval_prints_the_metrics_of_a_run_with_their_intervals(finished, capsys):
    assert call("eval", f"--workdir={finished}", "--tasks=4") == 0
    first, loss = capsys.readouterr().out.splitlines()
    assert first == f"{finished}, outer step 2, on test tasks:"
    score = json.loads((finished / "test.json").read_text())["loss"]
    interval = f"{score['mean']:.4f} +- {score['ci95']:.4f}"
    assert loss.split() == ["test", "loss", *interval.split(), "(95%", "interval,", "4", "tasks)"]


def test_eval_where_no_run_is_says_so(refused, tmp_path):
    workdir = tmp_path / "nothing"
    assert refused("eval", f"--workdir={workdir}") == (
        f"There is no run in {workdir}: no {workdir / 'checkpoints'}. Train one with "
        f"`metalearn train --config=NAME --workdir={workdir}`."
    )
    assert not workdir.exists()


def test_eval_of_a_run_without_a_checkpoint_says_so(refused, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    expected = f"The run in {tmp_path} has no checkpoint yet. Train it further."
    assert refused("eval", f"--workdir={tmp_path}") == expected


def test_a_finished_run_says_so_and_only_evaluates(finished, capsys):
    files = ("test.json", "metrics.jsonl")
    before = [(finished / name).read_bytes() for name in files]
    checkpoint = finished / "checkpoints" / "2"
    written = checkpoint.stat().st_mtime_ns
    assert call(*RUN, f"--workdir={finished}") == 0
    shown = capsys.readouterr()
    expected = f"The run in {finished} has taken its 2 outer steps: evaluating it.\n"
    assert shown.out.startswith(expected) and "eval/loss" not in shown.out
    assert [(finished / name).read_bytes() for name in files] == before
    assert checkpoint.stat().st_mtime_ns == written


def test_another_config_in_the_workdir_of_a_run_is_refused_with_the_difference(refused, finished):
    message = refused(*RUN, f"--workdir={finished}", "--config.seed=1")
    assert message.startswith(f"The run in {finished / 'checkpoints'} was started with another ")
    assert "\n  config.seed: 0 -> 1\n" in message


@pytest.mark.slow
def test_a_run_is_trained_for_longer_and_judged_by_its_best_where_asked(
    finished, refused, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    words = (*RUN, f"--workdir={tmp_path}")
    capsys.readouterr()
    assert refused(*words, "--config.steps=3").count("\n  config.") == 1
    assert call(*words, "--config.steps=3", "--allow-config-change") == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(losses) == [1, 2, 3]
    mode = "batch statistics and dropout in inner steps; batch statistics without dropout for queri"
    assert f"  mode       {mode}" in capsys.readouterr().out
    assert call("eval", f"--workdir={tmp_path}", "--tasks=4", "--best") == 0
    lowest = min(losses, key=losses.get)
    assert capsys.readouterr().out.startswith(f"{tmp_path}, outer step {lowest}, on test tasks:")
    score = (tmp_path / "test.json").read_text()
    adam = ("--config.optimizer.name=adamw", "--config.steps=4", "--allow-config-change")
    assert "holds other arrays than this run has" in refused(*words, *adam)
    assert (tmp_path / "test.json").read_text() == score  # of the steps that are there


@pytest.mark.parametrize(
    "number", quick([signal.SIGTERM, signal.SIGINT], lambda number: number == signal.SIGTERM)
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(number, tmp_path, monkeypatch, capsys):
    words = (*SINUSOID, "--noprogress", f"--workdir={tmp_path}", "--config.eval_every=0")
    words = (*words, "--config.steps=5")
    (tmp_path / "test.json").write_text("{}")  # as of a run of fewer steps
    signals = iter([number])  # a second one would end this process
    with monkeypatch.context() as patch:
        patch.setattr(JsonlLogger, "log", lambda *_: [signal.raise_signal(n) for n in signals])
        assert call(*words) == 75
    said = rf"{number.name} after outer step [1-4] of 5\. It is saved, and the same command goes on"
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "test.json").exists()
    assert call(*words) == 0
    assert (tmp_path / "test.json").exists()


def test_a_best_that_nothing_judges_is_refused(refused, tmp_path):
    words = ("--config.checkpoint_best=max eval/accuracy", "--config.eval_every=0")
    assert refused(*DIGITS, f"--workdir={tmp_path / 'run'}", *words) == (
        "checkpoint_best='max eval/accuracy' is judged by evaluations in training, and eval_every "
        "is 0. Set it, to outer steps from one to the next."
    )


@pytest.mark.slow
def test_a_process_with_a_mistake_ends_with_status_2_and_a_message_alone(tmp_path):
    done = process("train", "--config=maml_digits", f"--workdir={tmp_path}", "--config.step=1")
    assert done.returncode == 2 and done.stdout == ""
    message = "\nmetalearn: The config has no key 'step'. Did you mean 'steps'? There are: "
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 3


@pytest.mark.slow
def test_an_unprepared_omniglot_is_refused_at_once_with_the_command_that_prepares_it(tmp_path):
    nowhere = tmp_path / "tfds"
    nowhere.mkdir()
    began = time.monotonic()
    done = process(
        *("train", "--config=maml_omniglot", f"--workdir={tmp_path / 'run'}"),
        TFDS_DATA_DIR=str(nowhere),
    )
    assert time.monotonic() - began < 30
    assert done.returncode == 2 and "Traceback" not in done.stderr
    command = f"python -m metalearn.datasets.prepare omniglot --data-dir={nowhere}"
    assert f"The dataset 'omniglot' is not prepared: there is no {nowhere}" in done.stderr
    assert command in done.stderr


def test_a_config_may_follow_after_a_space(refused):
    message = refused("train", "--config", "maml_digits", "--config.stepz=1", "--workdir=w")
    assert message.startswith("The config has no key 'stepz'. Did you mean 'steps'?")


def test_a_word_that_is_no_option_is_refused(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "config.steps=1")
    assert message.startswith("'config.steps=1' is not an option: those begin with two dashes")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_a_command_shows_its_options_and_no_others(word, capsys):
    assert call("train", "--config=maml_digits", word) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("metalearn train: Train the config in the workdir, resuming what is")
    options = re.findall(r"^  --([a-z-]+)", shown, re.MULTILINE)
    assert {"config", "workdir", "noprogress", "allow-config-change", "traceback"} < {*options}
    assert {"tasks", "out", "best", "json", "largest"}.isdisjoint(options)
    assert call("eval", word) == 0
    options = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert {"workdir", "tasks", "best"} < {*options} and "config" not in options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--tasks=3"), "--tasks is an option of `metalearn eval`, not of `metalearn tra"),
        (("plan", "--noprogress"), "--progress is an option of `metalearn train`, not of `metale"),
        (
            ("eval", "--config.seed=3"),
            "--config is an option of `metalearn plan`, `metalearn compare`, `metalearn smooth`, "
            "`metalearn train`, `metalearn sweep` and `metalearn attribute`, not of "
            "`metalearn eval`. That has: --workdir, --tasks, ",
        ),
        (("draw", "--allow_config_change"), "--allow-config-change is an option of `metalearn tr"),
    ],
)
def test_an_option_of_another_command_is_refused_by_name(refused, words, message):
    assert refused(*words).startswith(message)


def test_every_option_is_of_a_command():
    flags = main._flags()
    assert {*main.OPTIONS} < {flag.name for flag in flags}
    assert {command for commands in main.OPTIONS.values() for command in commands} <= {*COMMANDS}
    assert len(flags) == len(list(main.flags.FLAGS.get_flags_for_module(main.__name__)))


@pytest.mark.slow
def test_engine_options_are_set_from_the_command_line(refused, tmp_path):
    words = (*SINUSOID, f"--workdir={tmp_path}", "--noprogress", "--config.eval_every=0")
    message = refused(*words, "--config.engine_options.chunk=2")
    assert call(*words, "--config.engine_options.remat=step") == 0
    known = ["remat", "segment", "budget", "peel"]
    assert message == (
        f"The engine 'reverse' has no option 'chunk'. It has: {known}. What a config has set for "
        "another engine is cleared by --config.engine_options.KEY= with nothing behind it."
    )
    assert call(*words, "--config.engine_options.remat=", "--allow-config-change") == 0


def test_the_split_with_too_few_classes_is_named(refused, tmp_path):
    message = refused(*DIGITS, f"--workdir={tmp_path}", "--config.dataset.ways=10")
    assert message.startswith("In the validation split: `FewShot` got ways=10")
