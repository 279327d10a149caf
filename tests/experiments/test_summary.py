"""The lines that open and close a run."""

import sys

import pytest

from metalearn.experiments import build
from metalearn.experiments.build.registry import ENGINES
from metalearn.experiments.commands import summary
from metalearn.experiments.configs import fds_digits, maml_digits
from tests.helpers.command_line import SINUSOID, call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.fixture(scope="module")
def digits():
    config = build.to_json(maml_digits.get_config())
    splits = build.splits(config["dataset"])
    return config, build.trainer(config, splits), splits


def lines(capsys):
    return {line[:11].strip(): line[11:].strip() for line in capsys.readouterr().out.splitlines()}


def test_a_run_opens_with_what_is_trained_with_what_and_where(digits, tmp_path, capsys):
    summary.opening(*digits, tmp_path, "metalearn train --config=maml_digits")
    said = lines(capsys)
    assert said["algorithm"] == "MAML, 1 inner step"
    assert said["engine"] == "MixedFlow()"
    assert said["model"] == "conv_net of linen, 19,173 parameters"
    assert said["eta"] == "19,173 meta-parameters"
    assert said["data"] == "digits (5-way 1-shot): train, validation and test tasks"
    assert said["devices"].startswith("1 x ")
    assert said["workdir"] == str(tmp_path)
    assert said["W&B"] == "auto: online where you are logged in, else offline"
    assert said["resume"] == "metalearn train --config=maml_digits"


def test_a_run_from_python_names_no_command_and_an_engine_of_auto_says_so(digits, tmp_path, capsys):
    config, trainer, splits = digits
    config = {**config, "auto": {"engine": next(iter(ENGINES))}}
    summary.opening(config, trainer, splits, tmp_path, None)
    said = lines(capsys)
    assert said["engine"] == "MixedFlow(), chosen by auto"
    assert "resume" not in said


def test_a_run_ends_with_the_commands_that_its_algorithm_has(digits, tmp_path, capsys):
    summary.closing(digits[1], tmp_path)
    assert list(lines(capsys)) == ["Next", "evaluate", "export", "report", "in Python", "draw"]
    config = build.to_json(fds_digits.get_config())
    trainer = build.trainer(config, build.splits(config["dataset"]))
    summary.closing(trainer, tmp_path)
    said = lines(capsys)
    assert said["export"] == f"metalearn export --workdir={tmp_path}"
    assert said["draw"] == f"metalearn draw --workdir={tmp_path}"


def test_in_a_terminal_the_same_lines_are_in_colour(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    summary.show("A title", {"engine": "MixedFlow()"})
    said = capsys.readouterr().out
    assert "\x1b[36mengine\x1b[0m" in said and "MixedFlow()" in said


def test_train_prints_the_command_that_resumes_it_and_what_to_do_next(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert call(*SINUSOID, workdir, "--noprogress") == 0
    said = lines(capsys)
    assert said["resume"].split() == ["metalearn", *SINUSOID, workdir, "--noprogress"]
    assert said["evaluate"] == f"metalearn eval {workdir} --tasks=2000"
