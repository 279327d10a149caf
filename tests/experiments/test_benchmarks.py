"""The benchmarks run, and what they write can be read."""

import csv

import jax
import numpy as np
import pytest

from metalearn import Truncated
from metalearn.experiments import build
from metalearn.experiments.benchmarks import (
    approximations,
    convolution,
    engines,
    forward_estimates,
)
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


@pytest.mark.parametrize(("kept", "count"), [("stable", 40), ("stationary", 40_000)])
def test_a_trajectory_of_few_modes_is_continued_exactly(kept, count):
    times = np.arange(20)[:, None]

    def at(t):
        return np.array([1.0, -2.0]) + np.array([3.0, 0.5]) * 0.9**t + np.array([1.0, 1.0]) * 0.5**t

    continued = forward_estimates.continued(at(times), count, 4, 1e-10, kept)
    np.testing.assert_allclose(continued, at(19 + count), rtol=1e-6)


@pytest.mark.slow
def test_forward_estimates_are_compared_with_the_exact_and_the_truncated_hypergradients(
    x64, capsys
):
    algorithm, episode = forward_estimates.bowl(0)
    key = jax.random.key(0)
    eta, batches = algorithm.init(key), algorithm.batches(episode, key)[:40]
    unroll = algorithm.unroll(episode, key)
    shares = jax.jit(lambda eta: forward_estimates.shares(unroll, eta, batches))(eta)
    path = jax.jit(lambda eta: forward_estimates.trajectory(unroll, eta, batches))(eta)
    last = forward_estimates.through(Truncated(7))(unroll, eta, batches)
    np.testing.assert_allclose(shares.sum(0), path[-1], rtol=1e-9)
    np.testing.assert_allclose(shares[-7:].sum(0), last, rtol=1e-9)
    ends = jax.jit(lambda eta: forward_estimates.terms(unroll, eta, batches))(eta)
    np.testing.assert_allclose(ends[-1], shares[-1], rtol=1e-9)  # one step, by either
    forward_estimates.main(["--problem", "quadratic", "--seeds", "1", "--steps", "250"])
    table = capsys.readouterr().out
    assert "| quadratic | FLOPs | error |" in table and "stable modes of 125 steps" in table


def test_approximations_are_compared_by_the_differences_within_seeds():
    exact = [{"loss": 1.0, "seconds": 3.0}, {"loss": 5.0, "seconds": 5.0}]
    found = [{"loss": 1.2, "seconds": 9.0}, {"loss": 5.2, "seconds": 1.0}]
    line = approximations.row("SAMA()", found, exact, ("loss",))
    assert line == "| `SAMA()` | 3.200 +- 25.412 | 0.200 +- 0.000 | 5.0 |"
    assert approximations.row("exact", exact, exact, ("loss",)).endswith(" |  | 4.0 |")


def test_an_estimate_of_few_pairs_is_left_out_where_eta_is_large():
    config = build.to_json(small("maml_sinusoid"))
    trainer = build.trainer(config, build.splits(config["dataset"]))
    names = list(approximations.contenders(trainer, 1, 10_001))
    assert "ES(pairs=8)" not in names
    assert [*names, "ES(pairs=8)"] == list(approximations.contenders(trainer, 1, 10_000))


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


@pytest.mark.slow
def test_a_metric_learner_needs_half_the_memory_without_patches():
    measured = convolution.metric_learner(rounds=1, filters=16)
    assert measured["lax"][1] < 0.6 * measured["patches"][1]
    assert all(seconds > 0 for seconds, _ in measured.values())
