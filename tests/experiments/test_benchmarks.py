"""The benchmarks run, and what they write can be read."""

import csv

import pytest

from metalearn.experiments.benchmarks import approximations, engines
from tests.helpers.small_configs import small

NAMES = [engines.BASE, "MixedFlow()"]


@pytest.mark.slow
def test_the_engines_benchmark_writes_a_table_a_csv_and_a_picture(tmp_path, capsys):
    sizes = ["--T", "2", "3", "--batch", "2", "--length", "4", "--layers", "1", "--width", "8"]
    engines.main([*sizes, "--settings", *NAMES, "--seconds", "1", f"--out={tmp_path}"])
    with (tmp_path / "engines.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["T"], row["setting"]) for row in rows] == [(t, n) for t in "23" for n in NAMES]
    assert all(float(row["temporaries_mib"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert all(float(row["flops_of_b"]) == 1 for row in rows if row["setting"] == engines.BASE)
    assert all(float(row["flops_of_b"]) < 1 for row in rows if row["setting"] == NAMES[1])
    assert (tmp_path / "T.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "engines.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
def test_an_engine_that_refuses_a_task_is_left_out_and_says_why(tmp_path, capsys):
    sizes = ["--batch", "2", "--length", "4", "--layers", "1", "--width", "8", "--task", "weights"]
    names = ["MixedFlow()", "MixedFlow(inexact_reconstruct)"]
    engines.main([*sizes, "--settings", *names, f"--out={tmp_path}"])
    assert "MixedFlow(inexact_reconstruct) refuses: " in capsys.readouterr().out
    assert "| MixedFlow() |" in (tmp_path / "engines.md").read_text()


@pytest.mark.slow
def test_a_small_maml_takes_fewest_flops_in_reverse_mode_and_less_memory_nested(tmp_path):
    sizes = ["--task", "sinusoid", "--T", "8", "--batch", "10", "--width", "40"]
    names = ["plain reverse", engines.BASE, "MixedFlow()", "MixedFlow(nested)"]
    engines.main([*sizes, "--settings", *names, f"--out={tmp_path}"])
    with (tmp_path / "engines.csv").open() as file:
        rows = list(csv.DictReader(file))
    flops, memory = (
        {row["setting"]: float(row[column]) for row in rows}
        for column in ("flops_f_per_step", "temporaries_mib")
    )
    plain, _, default, nested = names
    assert flops[plain] < 0.95 * flops[default] and flops[nested] == flops[default]
    assert memory[nested] <= memory[engines.BASE] < memory[default]


def test_approximations_are_compared_by_the_differences_within_seeds():
    exact = [{"loss": 1.0, "seconds": 3.0}, {"loss": 5.0, "seconds": 5.0}]
    found = [{"loss": 1.2, "seconds": 9.0}, {"loss": 5.2, "seconds": 1.0}]
    line = approximations.row("SAMA()", found, exact, ("loss",))
    assert line == "| `SAMA()` | 3.200 +- 25.412 | 0.200 +- 0.000 | 5 |"
    assert approximations.row("exact", exact, exact, ("loss",)).endswith(" |  | 4 |")


@pytest.mark.slow
def test_the_approximations_benchmark_trains_with_each_and_names_those_that_refuse(
    monkeypatch, capsys
):
    """MAML: what the approximations would not see, they refuse when they are traced."""
    setting = approximations.Setting(lambda: small("maml_sinusoid"), 2, 2, ("loss",))
    monkeypatch.setitem(approximations.SETTINGS, "fds_digits", setting)
    approximations.main(["--config", "fds_digits", "--seeds=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("fds_digits: 2 outer steps of 2 tasks of 7 inner steps, 2 seeds, 2 ")
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["exact", "first order", "`ES(pairs=8)`", "none"]
    assert all("+-" in row[1] for row in rows)
    assert ["+-" in row[2] for row in rows] == [False, True, True, True]
    names = ["Truncated()", "Truncated(last=3)", "SAMA()", "Implicit()"]
    assert [line.partition(":")[0] for line in lines[-5:-1]] == names
