"""Sweeps: what is searched, that trials are followed, pruned, resumed, and compared."""

import fcntl
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments
from metalearn.experiments.commands.report import report
from metalearn.experiments.configs import maml_digits
from metalearn.experiments.sweep import loop, processes
from metalearn.experiments.sweep.figures import TrialLog, parallel
from metalearn.experiments.sweep.loop import Loop, UnknownMetricError
from metalearn.experiments.sweep.page import importances, logs, report_of, table
from metalearn.experiments.sweep.processes import Share
from metalearn.experiments.sweep.space import Parameter, parameter, space
from metalearn.experiments.sweep.study import (
    Settings,
    Study,
    check_sampler,
    library,
    metric_of,
    read_settings,
    write_settings,
)
from metalearn.training.outer_loop import Interrupted
from tests.helpers import fake_trial
from tests.helpers.command_line import SINUSOID, call

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

RATE = parameter("optimizer.learning_rate", "log(1e-4,0.5)")
CHOICE = parameter("tasks_per_step", "[4,8]")
BASE = Settings(("--config=maml_digits",), (RATE,), "eval/loss", "min")
HERE = pathlib.Path(fake_trial.__file__).parents[2]


@pytest.fixture
def fake(monkeypatch):
    """Let trials be quick processes that only look like runs."""
    monkeypatch.setattr(processes, "MODULE", "tests.helpers.fake_trial")
    monkeypatch.setattr(loop, "POLL", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def run(workdir, settings=BASE, trials=3, jobs=1, say=lambda text: None):
    """Run a sweep of quick trials; return its study."""
    workdir.mkdir(exist_ok=True)
    write_settings(workdir, settings)
    study = Study(workdir, settings, fake_trial.EVALUATIONS)
    Loop(study, trials, jobs, say).run()
    return study


def fix(monkeypatch, *rates):
    """Let the trials have these rates of the outer optimizer."""
    key, samplers = "optimizer.learning_rate", library().samplers

    def sampler(self, number):
        return samplers.PartialFixedSampler({key: rates[number]}, samplers.RandomSampler(0))

    monkeypatch.setattr(Study, "_sampler", sampler)


def rates(study):
    return [trial.params["optimizer.learning_rate"] for trial in study.trials()]


def ends(study):
    return [trial.user_attrs["ended"] for trial in study.trials()]


# What is searched.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log(1e-4,1e-1)", Parameter("k", "log", 1e-4, 0.1)),
        (" uniform( -1 , 1 ) ", Parameter("k", "uniform", -1.0, 1.0)),
        ("int(1,5)", Parameter("k", "int", 1.0, 5.0)),
        ("[4, 8]", Parameter("k", "choice", choices=("4", "8"))),
        ("choice(mlp,conv_net)", Parameter("k", "choice", choices=("mlp", "conv_net"))),
        ("[(32,),(64, 64)]", Parameter("k", "choice", choices=("(32,)", "(64, 64)"))),
    ],
)
def test_ranges_and_choices_are_read_as_they_are_spelled(text, expected):
    assert parameter("k", text) == expected
    assert parameter("k", expected.option().partition("=")[2]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1", "--sweep.k=0.1 says no values to search. Write log(1e-4,1e-1), uniform"),
        ("unifrom(0,1)", "says no values to search. Did you mean 'uniform'? Write"),
        ("log(1,2,3)", "--sweep.k=log(1,2,3) is a range from one number to another: log(1e-4,1e-1"),
        ("int(a,b)", "is a range from one number to another: int(1,8)."),
        ("uniform(0,inf)", "has a bound that is not finite. Write two numbers: uniform("),
        ("int(1,2.5)", "is a range of integers, so both bounds are: int(1,8)."),
        ("log(1e-1,1e-4)", "is reversed: its first bound is the larger. log(1e-4,1e-1)?"),
        ("uniform(2,2)", "is empty: there is nothing between equal bounds. Set the one value with"),
        ("log(0,1)", "takes the logarithm of 0, which is not above 0. Begin above it, or write"),
        ("log(-1,1)", "takes the logarithm of -1, which is not above 0."),
        ("[]", "--sweep.k=[] has no value to choose. Write some: --sweep.k=[a,b,c]."),
        ("[1,2,1]", "has 1 twice. Write each choice once."),
    ],
)
def test_values_that_cannot_be_searched_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parameter("k", text)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optimizer.learning_rat", "log(1e-4,1e-1)", "the config has no such key. Did you mean "),
        ("optimizer", "[adam]", "--sweep.optimizer: the config has no such key."),
        ("seed", "int(0,3)", "seed is swept, and set by --config.seed=1 too. Leave one of them"),
        (
            "tasks_per_step",
            "log(4,16)",
            "tasks_per_step is an integer. Write int(4,16), or cho",
        ),
        (
            "engine",
            "uniform(0,1)",
            "engine takes text, which has no range. Write choices:",
        ),
        ("model.filters", "[32,many]", "config.model.filters takes an integer, such as 3, not"),
        ("steps", "[10,None]", "config.steps takes an integer, such as 3, not 'None'."),
    ],
)
def test_a_key_that_cannot_be_searched_is_refused(key, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        space({key: text}, maml_digits.get_config(), {"seed": "1"}, sections.nullable)


def test_what_a_key_takes_can_be_searched():
    swept = {"chunk": "[None,4]", "optimizer.clip": "int(1,4)", "model.name": "[mlp,conv_net]"}
    read = space(swept, maml_digits.get_config(), {}, sections.nullable)
    assert [each.key for each in read] == [*swept]


def test_a_sweep_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"A sweep needs at least one key to search, such as"):
        space({}, maml_digits.get_config(), {}, sections.nullable)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss", "--metric=loss: trials are compared by an evaluation on validation tasks"),
        ("test/loss", "and test tasks are for the one that is chosen."),
        ("eval/loss_ci95", "trials are compared by an evaluation on validation tasks"),
        ("best eval/loss", 'a direction is "max" or "min", as in "max eval/loss".'),
        ("eval/score", '--metric=eval/score does not say what is better. Write "max eval/score"'),
    ],
)
def test_a_metric_that_trials_cannot_be_compared_by_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        metric_of(text)


@pytest.mark.parametrize(
    ("changes", "trials", "message"),
    [
        ({"sampler": "grid"}, None, "log(0.0001,0.5) has infinitely many values. List some, "),
        ({"sampler": "grid", "space": (CHOICE,)}, 5, "tries all 2 combinations, not --trials=5."),
        ({"sampler": "grid", "space": (Parameter("k", "int", 0, 1e5),)}, None, "1,000 at most."),
        ({"sampler": "gird"}, None, "No sampler is called 'gird'. Did you mean 'grid'?"),
        ({"pruner": "hyperbond"}, None, "No pruner is called 'hyperbond'. Did you mean "),
        ({"pruner": "hyperband"}, None, "a run of this config has 2: at least 3 are needed."),
    ],
)
def test_a_sampler_or_pruner_that_does_not_fit_is_refused(changes, trials, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sampler(BASE._replace(**changes), trials, evaluations=2)


def test_a_sweep_has_twenty_trials_or_a_whole_grid():
    assert check_sampler(BASE, None, 4) == 20
    grid = BASE._replace(sampler="grid", space=(CHOICE, parameter("seed", "int(0,2)")))
    assert check_sampler(grid, None, 4) == check_sampler(grid, 6, 4) == 6


# Suggestions.


def suggested(workdir, trials, settings=BASE, reopen=()):
    """Return the rates of trials that are told a value each; opened anew before some of them."""
    workdir.mkdir()
    study = Study(workdir, settings, 4)
    for number in range(trials):
        if number in reopen:
            study = Study(workdir, settings, 4)
        trial = study.ask()
        study.tell(trial, trial.params["optimizer.learning_rate"], "COMPLETE")
    return rates(study)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_suggests_the_same_however_often_the_sweep_is_resumed(sampler, tmp_path):
    settings = BASE._replace(sampler=sampler)
    expected = suggested(tmp_path / "a", 13, settings)  # TPE models from the eleventh on
    assert suggested(tmp_path / "b", 13, settings, reopen=(2, 5, 11, 12)) == expected
    assert len(set(expected)) == 13
    other = suggested(tmp_path / "c", 2, settings._replace(seed=1))
    assert not {*other} & {*expected}


def test_a_grid_tries_each_combination_once(fake, tmp_path):
    rates_ = parameter("optimizer.learning_rate", "[0.1,0.01]")
    settings = BASE._replace(sampler="grid", space=(rates_, CHOICE))
    study = run(tmp_path, settings, trials=4, jobs=2)
    tried = [tuple(trial.params.values()) for trial in study.trials()]
    assert sorted(tried) == [("0.01", "4"), ("0.01", "8"), ("0.1", "4"), ("0.1", "8")]
    assert study.best().params["optimizer.learning_rate"] == "0.01"


# Trials.


def test_trials_are_compared_by_their_last_evaluation(fake, tmp_path):
    lines = []
    study = run(tmp_path / "sweep", trials=4, jobs=2, say=lines.append)
    assert ends(study) == ["done"] * 4
    distances = [abs(fake_trial.math.log10(rate) + 2) for rate in rates(study)]
    assert study.best().number == distances.index(min(distances))
    assert study.best().value == pytest.approx(min(distances) + 1 / 4)
    assert sum(" begins " in line for line in lines) == 4
    assert re.search(r"trial 00\d  done  eval/loss [\d.]+  \(the best so far\)", "\n".join(lines))
    rate = rates(study)[study.best().number]
    command = f"metalearn train --config=maml_digits --config.optimizer.learning_rate={rate!r} "
    assert study.best_command().startswith(command)


def test_a_sweep_that_has_ended_trains_nothing_and_more_trials_are_added(fake, tmp_path):
    first = rates(run(tmp_path, trials=2))
    lines = []
    assert rates(run(tmp_path, trials=2, say=lines.append)) == first and not lines
    assert rates(run(tmp_path, trials=3))[:2] == first


def test_a_trial_that_is_behind_is_pruned_and_the_others_are_not(fake, tmp_path, monkeypatch):
    # Hyperband puts the trials 0 and 4 into a bracket that prunes from the first evaluation on,
    # and the others into one that prunes from the third.
    fix(monkeypatch, 0.01, 0.01, 0.4, 0.01, 0.3)
    monkeypatch.setenv("FAKE_WAITS", '{"0.4": 3, "0.3": 1}')
    study = run(tmp_path, BASE._replace(pruner="hyperband"), trials=5)
    assert ends(study) == ["done", "done", "pruned", "done", "pruned"]
    rows = [loop.evaluations(study.folder(n) / "metrics.jsonl") for n in range(5)]
    assert [len(each) for each in rows] == [4, 4, 3, 4, 1]
    assert study.trials()[2].value == rows[2][-1]["eval/loss"]
    assert study.best().number in (0, 1, 3)


def test_a_trial_that_diverges_is_worst_and_one_that_fails_is_not_counted(
    fake, tmp_path, monkeypatch
):
    wide = BASE._replace(space=(parameter("optimizer.learning_rate", "log(1e-6,1)"),))
    fix(monkeypatch, 0.95, 0.01, 2e-6)
    lines = []
    study = run(tmp_path, wide, say=lines.append)
    assert ends(study) == ["diverged", "done", "failed"]
    assert [trial.state.name for trial in study.trials()] == ["PRUNED", "COMPLETE", "FAIL"]
    assert study.trials()[2].user_attrs["why"] == "the rate is too small."
    assert any("trial 002  failed  the rate is too small." in line for line in lines)
    assert [line.split()[:2] for line in table(study)[1:3]] == [
        ["001", "done"],
        ["000", "diverged"],
    ]


def test_trials_that_log_evaluations_alone_have_their_outer_steps(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG_EVERY", "0")
    study = run(tmp_path, trials=1)
    assert study.trials()[0].user_attrs["steps"] == fake_trial.EVALUATIONS


def test_a_sweep_whose_first_trials_all_fail_stops_and_says_why(fake, tmp_path):
    settings = BASE._replace(space=(parameter("optimizer.learning_rate", "log(1e-7,1e-6)"),))
    with pytest.raises(
        ValueError, match=r"The first 3 trials failed, .* Trial 000: the rate is too"
    ):
        run(tmp_path, settings, trials=9)


def test_a_metric_that_runs_do_not_log_is_refused_with_those_that_they_do(fake, tmp_path):
    with pytest.raises(
        UnknownMetricError, match=r"log no 'eval/auc'\. Their evaluations have: eval/"
    ):
        run(tmp_path, BASE._replace(metric="eval/auc", direction="max"))


def test_a_sweep_that_is_asked_to_stop_resumes_its_trials(fake, tmp_path, monkeypatch):
    expected = rates(run(tmp_path / "whole", trials=3))
    monkeypatch.setenv("FAKE_PACE", "0.3")
    lines = []

    def say(text):
        lines.append(text)
        if text.startswith("trial 001  begins"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"the trials that run \(000, 001\) save and end now"):
        run(tmp_path / "cut", jobs=2, say=say)
    monkeypatch.setenv("FAKE_PACE", "0.01")
    study = run(tmp_path / "cut", trials=3, jobs=2)
    assert rates(study) == expected and ends(study) == ["done"] * 3
    numbers = [len(trial.intermediate_values) for trial in study.trials()]
    assert numbers == [fake_trial.EVALUATIONS] * 3


def test_a_journal_whose_last_line_was_cut_off_by_a_kill_is_mended(fake, tmp_path):
    first = rates(run(tmp_path, trials=2))
    journal = tmp_path / "sweep.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    journal.with_name("sweep.journal.lock").symlink_to(journal)  # of the process that was killed
    assert rates(run(tmp_path, trials=3))[:2] == first


def test_a_trial_waits_until_the_process_of_a_killed_sweep_has_saved(tmp_path):
    lines = []
    processes.wait_until_free(tmp_path, lines.append)  # none has ever been there
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        start = time.monotonic()
        processes.wait_until_free(tmp_path, lines.append)
        assert time.monotonic() - start > 0.2
        timer.join()
    assert len(lines) == 1 and "waiting for the process of the sweep before" in lines[0]


def test_a_grid_that_was_begun_is_completed_when_the_sweep_is_resumed(tmp_path):
    settings = BASE._replace(sampler="grid", space=(CHOICE, parameter("seed", "int(0,2)")))
    empty = Study(tmp_path, settings._replace(sampler="random"), 4)
    empty.optuna.enqueue_trial({"tasks_per_step": "8", "seed": 1})  # and then it was killed
    trials = Study(tmp_path, settings, 4).trials(waiting=True)
    points = {tuple(trial.system_attrs["fixed_params"].values()) for trial in trials}
    assert len(trials) == len(points) == 6


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "sweep.journal").write_text("not JSON\nat all\n")
    with pytest.raises(ValueError, match=r"sweep\.journal is no journal of a sweep, or is damaged"):
        Study(tmp_path, BASE, 4)


# The workdir.


def test_settings_come_back_from_their_file(tmp_path):
    settings = BASE._replace(space=(RATE, CHOICE, Parameter("seed", "int", 0, 10**9)), seed=3)
    write_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings


def test_the_workdir_of_another_sweep_is_refused_with_the_difference(tmp_path):
    write_settings(tmp_path, BASE)
    write_settings(tmp_path, BASE)
    message = r"holds another sweep: its sampler is tpe, not random; its seed is 0, not 1\. The"
    with pytest.raises(ValueError, match=message):
        write_settings(tmp_path, BASE._replace(sampler="random", seed=1))


def test_a_command_that_makes_another_config_than_before_is_refused(tmp_path):
    config = {"steps": 10, "model": {"hidden": (4, 4)}}
    write_settings(tmp_path, BASE, config)
    write_settings(tmp_path, BASE, config)
    assert read_settings(tmp_path) == BASE
    with pytest.raises(ValueError, match=r"command made another config: config.steps: 10 -> 20\."):
        write_settings(tmp_path, BASE, {**config, "steps": 20})


def test_trials_have_the_group_of_the_config_or_that_of_the_sweep(tmp_path):
    workdir = tmp_path / "mine"
    workdir.mkdir()
    write_settings(workdir, BASE)
    study = Study(workdir, BASE, 4)
    group, name = "--config.wandb.group=mine", "--config.wandb.name=mine-003"
    assert Loop(study, 1, 1, print, {"group": "", "name": ""})._group(3) == [group, name]
    assert Loop(study, 1, 1, print, {"group": "paper", "name": ""})._group(3) == [name]


def test_the_workdir_of_a_run_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"holds a run, and a sweep has a workdir of its own"):
        write_settings(tmp_path, BASE)


# Sharing the machine.


def test_jobs_share_the_cores_and_the_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    assert [Share(job, 2).cores() for job in range(2)] == [[0, 2], [1, 3]]
    assert [Share(job, 6).cores() for job in range(6)] == [[0], [1], [2], [3], [0], [1]]
    assert Share(0, 1).cores() == [] and Share(0, 1).environment(["0"]) == {}
    first, second, third = (Share(job, 3).environment(["0", "1"]) for job in range(3))
    assert first["OMP_NUM_THREADS"] == "2" and second["OMP_NUM_THREADS"] == "1"
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (first, second, third)] == ["0", "1", "0"]
    assert first["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.45"
    assert "CUDA_VISIBLE_DEVICES" not in Share(0, 2).environment([])


# The report.


@pytest.fixture
def swept(fake, tmp_path):
    """The study of a sweep of six trials over two keys."""
    return run(tmp_path / "sweep", BASE._replace(space=(RATE, CHOICE)), trials=6, jobs=2)


@pytest.mark.slow
def test_the_page_of_a_sweep_has_its_best_trial_its_figures_and_all_trials(swept):
    page = report_of(swept.workdir).read_text()
    assert not re.findall(r"https?://|<script|<link|@import|url\(", page)
    best = swept.best()
    assert f"Best: trial {best.number:03d}, eval/loss {best.value:.4g}" in page
    assert f"--config.optimizer.learning_rate={best.params['optimizer.learning_rate']!r}" in page
    assert re.findall(r"<td>(\d{3})</td>", page)[0] == f"{best.number:03d}"
    assert len(re.findall(r"<td>\d{3}</td><td>done</td>", page)) == 6
    names = {path.stem for path in (swept.workdir / "report").glob("*.png")}
    figures = {"history", "evaluations", "parallel", "importance"}
    assert names == figures | {"by_optimizer.learning_rate", "by_tasks_per_step"}
    assert importances(swept)["optimizer.learning_rate"] > 0.5  # the value is a function of it


def test_the_command_reports_a_sweep(swept, capsys):
    assert call("report", swept.workdir) == 0
    assert capsys.readouterr().out.split() == [str(swept.workdir / "report.html")]
    with pytest.raises(
        ValueError, match=r"is a sweep, which has a page of its own: `metalearn rep"
    ):
        report([swept.workdir, swept.folder(0)])


def test_a_sweep_without_an_evaluation_is_not_reported(tmp_path):
    write_settings(tmp_path, BASE)
    Study(tmp_path, BASE, 4)
    with pytest.raises(ValueError, match=r"No trial of the sweep in .* has been evaluated yet"):
        report_of(tmp_path)
    with pytest.raises(ValueError, match=r"There is no sweep in .*nowhere: it has no sweep\.json"):
        report_of(tmp_path / "nowhere")


def test_lines_of_parallel_coordinates_end_at_their_values():
    points = ((0, 1.0, 1e-4), (1, 3.0, 0.5))
    done = [
        TrialLog(number, "done", value, {"optimizer.learning_rate": rate}, [], [])
        for number, value, rate in points
    ]
    lines = parallel(done, [RATE], "m", "max").axes[0].lines[:2]
    assert [[*line.get_ydata()] for line in lines] == [[0.0, 0.0], [1.0, 1.0]]  # the best on top


# The command.


def words_of(workdir, *more):
    return ("sweep", *SINUSOID[1:], f"--workdir={workdir}", *more)


@pytest.mark.slow
def test_a_sweep_trains_its_trials_and_tests_none(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    rate = "--sweep.optimizer.learning_rate=log(1e-4,1e-2)"
    assert call(*words_of(workdir, rate, "--trials=1")) == 0
    shown = capsys.readouterr().out
    assert "searches  --sweep.optimizer.learning_rate=log(0.0001,0.01)" in shown
    assert "min eval/loss, the last of 2" in shown and "\nBest: trial 000, eval/loss " in shown
    trial = workdir / "trials" / "000"
    assert not (trial / "test.json").exists()
    config = json.loads((trial / "config.json").read_text())
    assert 1e-4 < config["optimizer"]["learning_rate"] < 1e-2
    assert config["wandb"]["group"] == "sweep" and config["wandb"]["name"] == "sweep-000"
    assert "metalearn eval --workdir=" in shown and (workdir / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "A sweep needs at least one key to search"),
        (("--sweep.seed=[1]", "--sweep.seed=[2]"), "--sweep.seed is there twice."),
        (
            ("--sweep.seed=[1]", "--config.eval_every=0"),
            "eval_every=0 with steps=2 makes none.",
        ),
        (("--sweep.seed=[1]", "--trials=0"), "`metalearn sweep(trials=0)`: it is an integer, 1 or"),
        (("--sweep.seed", "[1,x]"), "config.seed takes an integer, such as 3, not 'x'."),
        (("--sweep.seed=[1]", "--metric=accuracy"), "--metric=accuracy: trials are compared by"),
    ],
)
def test_a_wrong_command_is_refused_and_leaves_nothing(refused, tmp_path, words, message):
    assert message in refused(*words_of(tmp_path / "sweep", *words))
    assert not (tmp_path / "sweep").exists()


def test_sweep_options_are_of_the_sweep_alone(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--sweep.seed=[1,2]")
    assert message.startswith(
        "--sweep is an option of `metalearn sweep`, not of `metalearn train`."
    )


def test_a_missing_optuna_is_named_with_the_way_to_get_it(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    message = refused(*words_of(tmp_path, "--sweep.seed=[1,2]"))
    assert "takes its suggestions from Optuna, which is not installed: `pip install opt" in message


def test_options_of_the_trials_are_passed_on_and_no_others():
    argv = ["metalearn", "sweep", "--config", "mine.json", "--trials", "3", "--noconfig.health"]
    argv += ["--config.seed", "1", "--allow-imports", "--jobs=2", "--nocompilation-cache"]
    expected = ["--config", "mine.json", "--noconfig.health", "--config.seed", "1"]
    assert arguments.of_trials(argv) == [*expected, "--allow_imports", "--nocompilation_cache"]


def commands_of_the_page():
    text = (HERE / "docs" / "sweeps.md").read_text().replace("\\\n", " ").replace("\n        ", " ")
    commands = [shlex.split(line) for line in re.findall(r"^    (metalearn sweep .*)$", text, re.M)]
    assert len(commands) == 2
    return commands


@pytest.mark.parametrize("argv", commands_of_the_page(), ids=["grid", "search"])
def test_the_commands_of_the_page_begin_sweeps(argv, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Loop, "run", lambda self: None)  # the trials
    assert call(*argv[1:]) == 2  # for there is nothing to report
    captured = capsys.readouterr()
    assert captured.out.startswith("metalearn sweep\n  searches  --sweep.optimizer.learning_rate=")
    assert "No trial of the sweep in runs/" in captured.err


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_resumes_its_trials_to_the_same_values(tmp_path):
    words = words_of("WORKDIR", "--sweep.optimizer.learning_rate=log(1e-4,1e-2)", "--trials=2")
    longer = ("--config.steps=6000", "--config.eval_every=2000", "--config.checkpoint_every=100")
    words = (*words, *longer, "--config.log_every=100", "--jobs=2")

    def begin(workdir):
        command = [sys.executable, "-m", "metalearn", *words]
        command = [word.replace("WORKDIR", str(workdir)) for word in command]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def lines(workdir):
        paths = [workdir / "trials" / name / "metrics.jsonl" for name in ("000", "001")]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]

    assert begin(tmp_path / "whole").wait(500) == 0
    process = begin(tmp_path / "cut")
    deadline = time.monotonic() + 300
    while min(lines(tmp_path / "cut")) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(20)  # its trials stop and save by themselves
    left = lines(tmp_path / "cut")
    time.sleep(3)
    assert lines(tmp_path / "cut") == left and max(left) < 60
    assert begin(tmp_path / "cut").wait(500) == 0
    folders = tmp_path / "whole", tmp_path / "cut"
    whole, cut = (Study(folder, read_settings(folder)) for folder in folders)
    assert rates(whole) == rates(cut)
    assert [trial.values for trial in whole.trials()] == [trial.values for trial in cut.trials()]
    assert logs(whole) == logs(cut)
