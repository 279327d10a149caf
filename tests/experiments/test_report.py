"""Reports: what a page says of runs, that it requests nothing, and what cannot be reported."""

import json
import re
import shutil

import numpy as np
import pytest

from metalearn.experiments.commands.report import command_of, cost_of, report
from metalearn.experiments.report.figures import curve_figure, curves_figure, metrics_of
from metalearn.experiments.report.run_logs import (
    curves,
    differing,
    labels,
    log_of,
    read_run,
)
from tests.helpers.command_line import SINUSOID, call

# ml-collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with different rates of the outer optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    for rate in ("0.01", "0.02"):
        words = f"--workdir={folder / rate}", "--noprogress"
        assert call(*SINUSOID, f"--config.optimizer.learning_rate={rate}", *words) == 0
    return [folder / "0.01", folder / "0.02"]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "two.html"
    assert report(runs, out) == out
    return out.read_text()


def cells(text):
    """Return the tables of a page, as rows of texts."""
    tables = re.findall(r"<table>(.*?)</table>", text)
    rows = [re.findall(r"<tr>(.*?)</tr>", table) for table in tables]
    return [[re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in each] for each in rows]


@pytest.mark.slow
def test_every_run_ends_with_its_learning_curves_drawn(runs):
    for workdir in runs:
        assert (workdir / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_requests_nothing_and_runs_no_script(runs):
    page = report(runs[:1], costs=False).read_text()
    assert not re.findall(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) >= 3 and set(sources) == {"data:image/png;base64,"}
    assert 'name="viewport"' in page


@pytest.mark.slow
def test_a_page_names_runs_by_what_differs_and_has_their_scores(page, runs):
    overview, differences, costs = cells(page)
    names = ["learning_rate=0.01", "learning_rate=0.02"]
    assert [row[0] for row in overview[1:]] == names
    assert differences == [["key", *names], ["optimizer.learning_rate", "0.01", "0.02"]]
    score = json.loads((runs[1] / "test.json").read_text())["loss"]
    assert overview[0][-1] == "test loss"
    assert overview[2][-1] == f"{score['mean']:.4f} +- {score['ci95']:.4f}"
    assert [row[1] for row in costs[1:]] == ["Reverse()"] * 2
    memory, ratio = costs[1][2:4]
    assert re.fullmatch(r"[\d.]+ [KM]iB", memory) and float(ratio.rstrip("x")) > 1


@pytest.mark.slow
def test_a_page_shows_what_was_learned_though_the_run_did_not_draw_it(page, runs):
    assert "<h2>What was learned</h2>" in page
    assert "learning_rate=0.01: adaptation" in page and "learning_rate=0.02: functions" in page
    assert (runs[0] / "pictures" / "adaptation.png").exists()


@pytest.mark.slow
def test_a_page_says_how_to_run_it_again(page, runs):
    assert f"metalearn train --config={runs[0] / 'config.json'} --workdir=runs/again" in page
    assert "&quot;tasks_per_step&quot;: 2" in page and "metalearn 0." in page


def test_the_command_of_a_run_with_code_of_ones_own_may_import_it(runs):
    run = read_run(runs[0])
    assert "--allow-imports" not in command_of(run)
    own = {**run.config, "model": {"name": "mine:net"}}
    assert command_of(run._replace(config=own)).endswith(" --allow-imports")


def test_one_run_has_its_page_in_its_workdir_with_pictures_beside_it(runs):
    out = report(runs[:1], costs=False)
    assert out == runs[0] / "report.html"
    assert (runs[0] / "report" / "loss.png").exists()
    text = out.read_text()
    assert "What differs" not in text and "not counted: not asked for" in text


@pytest.mark.slow
def test_the_command_writes_the_page_and_its_own_command_trains_the_run_again(runs, capsys):
    out = runs[0].parent / "report.html"
    assert call("report", runs[0], f"--out={out}") == 0
    assert capsys.readouterr().out.split() == [str(out)]
    commands = re.findall(r"<pre>metalearn (.*config.json \S+)</pre>", out.read_text())
    train, config, _ = commands[0].split()
    assert call(train, config, f"--workdir={runs[0].parent / 'again'}", "--noprogress") == 0
    again = read_run(runs[0].parent / "again")
    assert again.config == read_run(runs[0]).config
    first = read_run(runs[0]).train["loss"]
    np.testing.assert_array_equal(again.train["loss"].values, first.values)


# What is read of a run.


def write_rows(workdir, rows):
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def rows(steps, **options):
    return [{"step": step, "loss": 1.0 / step, **options} for step in steps]


def test_curves_have_intervals_where_those_were_logged():
    logged = [{"step": 5, "eval/loss": 2.0, "eval/loss_ci95": 0.5}, {"step": 9, "eval/loss": "NaN"}]
    curve = curves(logged)["loss"]
    np.testing.assert_array_equal(curve.steps, [5, 9])
    np.testing.assert_array_equal(curve.values, [2.0, np.nan])
    np.testing.assert_array_equal(curve.intervals, [0.5, np.nan])
    assert curves(rows([1, 2]))["loss"].intervals is None


def test_the_time_of_a_run_is_that_of_all_its_processes(tmp_path):
    times = [1.0, 5.0, 2.0, 3.0]  # a process of 5 seconds, and one of 3 that resumed it
    steps = zip(rows(range(1, 5)), times, strict=True)
    write_rows(tmp_path, [{**row, "time/seconds": seconds} for row, seconds in steps])
    assert log_of(tmp_path, {}, {}).seconds == 8.0


def test_only_metrics_that_vary_are_drawn_those_that_are_evaluated_first(tmp_path):
    steps = [{**row, "zeta": row["loss"] ** 2, "same": 1.0} for row in rows([1, 2])]
    evaluated = [{"step": n, "eval/loss": 2.0, "eval/accuracy": n / 2} for n in (1, 2)]
    write_rows(tmp_path, steps + evaluated)
    run = log_of(tmp_path, {}, {})
    assert metrics_of([run]) == ["loss", "accuracy", "zeta"]
    assert [ax.get_ylabel() for ax in curves_figure(run).axes] == ["loss", "accuracy"]


def test_after_a_single_inner_step_the_inner_loss_is_drawn_once(tmp_path):
    steps = [
        {**r, "inner_loss_first": r["loss"], "inner_loss_last": r["loss"]} for r in rows([1, 2])
    ]
    write_rows(tmp_path, steps)
    assert "inner_loss_last" not in metrics_of([log_of(tmp_path, {}, {})])
    steps[1]["inner_loss_last"] = 0.1
    write_rows(tmp_path, steps)
    assert "inner_loss_last" in metrics_of([log_of(tmp_path, {}, {})])


def test_a_figure_has_a_line_of_each_run_and_split(tmp_path):
    evaluated = [{"step": n, "eval/loss": 2.0, "eval/loss_ci95": 0.5} for n in (1, 2)]
    write_rows(tmp_path, rows([1, 2]) + evaluated)
    run = log_of(tmp_path, {}, {})
    (ax,) = curve_figure("loss", [run, run], ["a", "b"]).axes
    names = [line.get_label() for line in ax.lines]
    assert names == ["a: train", "a: validation", "b: train", "b: validation"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1.0, 0.5])


def test_configs_differ_in_dotted_keys_and_equal_runs_are_named_by_their_workdirs(tmp_path):
    one, two = {"model": {"width": 1}, "seed": 0}, {"model": {"width": 2}, "seed": 0, "more": True}
    assert differing([one, two]) == ["model.width", "more"]
    made = []
    for name, config in (("a", one), ("b", two), ("c", one)):
        write_rows(tmp_path / name, rows([1, 2]))
        made.append(log_of(tmp_path / name, config, {}))
    assert labels(made[:2]) == ["width=1", "width=2, more=True"]
    assert labels(made) == ["a", "width=2, more=True", "c"]


def test_a_cost_that_cannot_be_counted_says_why(runs):
    config = read_run(runs[0]).config
    lost = {**config, "dataset": {"name": "text", "tfds": "not_there"}}
    assert cost_of(lost).peak is None and cost_of(lost).problem


# What cannot be reported.


def test_no_workdir_is_refused():
    with pytest.raises(ValueError, match=r"name their workdirs, `metalearn report runs/one runs"):
        report([])


def test_a_folder_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere\. A report takes workdirs"):
        report([tmp_path / "nowhere"])


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_an_empty_or_foreign_folder_is_refused(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"There is no run of `metalearn train` in .* Train one: "):
        report([tmp_path])


def test_a_run_that_has_logged_nothing_is_refused(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"has logged no outer step in metrics\.jsonl, so there is"
    ):
        report([tmp_path / "run"])


def test_an_unfinished_run_is_reported_as_far_as_it_got(runs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs[0], workdir)
    (workdir / "test.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text(f"{lines[0]}\n")
    overview, *_ = cells(report([workdir], costs=False).read_text())
    assert dict(zip(*overview, strict=True))["outer steps"] == "1 of 2"
