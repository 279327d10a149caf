"""The benchmarks of FDS measure what they say: memory, noise, regret."""

import csv

import jax
import numpy as np
import pytest

from metalearn import Forward
from metalearn.datasets import TrainingRuns
from metalearn.experiments.benchmarks import horizons, noise, regret, tuners

PNG = b"\x89PNG"


def cells(text, first):
    """Return {row: numbers} of the Markdown table whose corner begins like this."""
    lines = text[text.index(f"| {first}") :].split("\n\n")[0].strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: [float(cell.replace(",", "")) for cell in found] for name, *found in rows}


@pytest.mark.slow
def test_memory_and_flops_of_the_engines_make_tables(capsys):
    horizons.main(["--T", "100"])
    text = capsys.readouterr().out
    memory, flops = cells(text, "temporaries"), cells(text, "FLOPs")
    assert list(flops) == list(horizons.ENGINES)
    assert memory[horizons.PLAIN] < memory['Reverse("nested")'] < memory['MixedFlow("nested")']
    assert memory["argument: batch indices"] == [pytest.approx(100 * 65 * 4 / 2**10, abs=0.1)]
    assert flops[horizons.PLAIN] == [1]
    assert 1 < flops['MixedFlow("nested")'][0] < flops['Reverse("nested")'][0]
    for engine in ("Reverse", "MixedFlow"):  # a forward loop of plain training costs 1
        once, twice = (flops[f'{engine}("{remat}")'][0] for remat in ("segments", "nested"))
        assert once == pytest.approx(twice + (-1 if engine == "Reverse" else 1), abs=0.2)
    assert memory['MixedFlow("segments")'] < memory['MixedFlow("nested")']


@pytest.mark.slow  # engines/test_engines.py has the memory of `Forward` in `make test`
def test_forward_mode_holds_no_more_at_a_longer_horizon_but_for_the_indices():
    algorithm, tasks = horizons.problem()
    short, long = (algorithm.stretched(horizon) for horizon in (100, 1000))
    found = [horizons.costs(each, tasks, ["Forward()"])["Forward()"] for each in (short, long)]
    rows = [horizons.indices(each, tasks) for each in (short, long)]
    assert rows[1] == 10 * rows[0]
    assert found[1].arguments - found[0].arguments == rows[1] - rows[0]
    assert found[1].temporaries - found[0].temporaries <= rows[1] - rows[0]


def test_times_are_against_plain_training_of_the_same_round(capsys, monkeypatch):
    taken = {name: [0.5, 3.0, 1.0] for name in horizons.ENGINES} | {horizons.PLAIN: [0.1, 1.0, 0.1]}
    monkeypatch.setattr(horizons, "seconds", lambda *_: taken)
    algorithm, tasks = horizons.problem()
    found = horizons.times(algorithm.stretched(1000), tasks, [3, 9], 3)
    assert "| plain training | 100.0 us | 100.0 us |" in found
    assert "| Forward() | 5.0 | 5.0 |" in found


def test_the_learning_rate_takes_the_windows_that_the_others_leave():
    algorithm, _ = horizons.problem()
    eta = horizons.with_tangents(algorithm.stretched(100), 17).init(jax.random.key(0))
    assert {name: x.size for name, x in eta.items()} == {
        "learning_rate": 15,
        "momentum": 1,
        "weight_decay": 1,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("noise")
    noise.main(["--seeds", "4", "--horizon", "20", "--W", "1", "5", "20", "7", f"--out={out}"])
    with (out / "noise.csv").open() as file:
        rows = {row["W"]: row for row in csv.DictReader(file)}
    return out, rows, dict(np.load(out / "noise.npz"))


@pytest.mark.slow
def test_the_noise_benchmark_writes_a_table_a_csv_and_a_picture(measured):
    out, rows, arrays = measured
    assert list(rows) == ["1", "5", "20", noise.GREEDY]  # 7 does not divide the horizon
    assert {name: x.shape for name, x in arrays.items()} == {"exact": (4, 20), "greedy": (4, 20)}
    assert "| 20 | " in (out / "noise.md").read_text()
    assert (out / "noise.png").read_bytes().startswith(PNG)
    assert float(rows["1"]["ratio"]) == 1


@pytest.mark.slow
def test_the_error_of_a_window_is_that_of_the_mean_over_it(measured):
    _, rows, arrays = measured
    exact = arrays["exact"]
    errors = []
    for i, each in enumerate(exact):
        others = np.delete(exact, i, 0).mean(0)
        errors.append(((each.mean() - others) ** 2).mean())
    by_hand = np.mean(errors) - exact.var(0, ddof=1).mean() / 3
    assert float(rows["20"]["mse"]) == pytest.approx(by_hand, rel=1e-9)
    assert float(rows["1"]["mse"]) == pytest.approx(exact.var(0, ddof=1).mean(), rel=1e-9)
    assert float(rows["20"]["variance"]) + float(rows["20"]["bias2"]) == pytest.approx(
        float(rows["20"]["ratio"])
    )


@pytest.mark.slow
def test_no_error_is_above_the_theorem(measured):
    _, rows, _ = measured
    for width in ("1", "5", "20"):
        assert float(rows[width]["ratio"]) <= float(rows[width]["theorem"]) * (1 + 1e-9)


def test_two_runs_are_too_few_to_tell_the_noise():
    with pytest.raises(ValueError, match="Only 2 runs are finite.*Raise --seeds"):
        noise.rows(np.ones((2, 4)), np.ones((2, 4)), [1])


def test_the_error_has_no_bias_of_its_own():
    rng = np.random.default_rng(0)
    truth = np.linspace(0, 1, 10)
    runs = [truth + 2 * rng.standard_normal((5, 10)) for _ in range(4000)]
    expected = 4 / 10 + truth.var()
    found = [noise.mse(noise.shared(run, 10), run) for run in runs]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 4000**0.5)
    assert abs(np.mean(found) - expected) < 0.1 * expected


@pytest.mark.slow
def test_the_greedy_hypergradient_is_that_of_a_run_that_ends_there(measured):
    _, _, arrays = measured
    exact, greedy = arrays["exact"], arrays["greedy"]
    np.testing.assert_allclose(exact[:, -1], greedy[:, -1], rtol=1e-3)
    assert (abs(greedy[:, 0] / exact[:, 0] - 1) > 0.1).all()


@pytest.mark.slow
def test_hypergradients_of_steps_add_up_to_that_of_one_rate_for_all():
    inputs = jax.random.normal(jax.random.key(1), (60, 64))
    tasks = TrainingRuns.create(inputs, (inputs[:, 0] > 0).astype(int), validation=20)
    given = {"dataset": "digits", "validation": 20, "label_noise": 0.0, "horizon": 6, "batch": 8}
    algorithm, _ = noise.problem({**given, "lr": 0.1, "momentum": 0.9})

    @jax.jit
    def run(key):
        sample_key, unroll_key, batch_key = jax.random.split(key, 3)
        episode = tasks.sample(sample_key)
        unroll, batches = (
            algorithm.unroll(episode, unroll_key),
            algorithm.batches(episode, batch_key),
        )
        engines = Forward(), Forward(inexact_decay=0.0)
        exact, near = (e.value_and_grad(unroll, algorithm.init(key), batches)[1] for e in engines)
        return noise.hypergradients(algorithm, tasks, key), exact[noise.NAME], near[noise.NAME]

    (each, greedy), exact, near = run(jax.random.key(2))
    np.testing.assert_allclose(each.sum(), exact[0], rtol=1e-4)
    np.testing.assert_allclose(greedy[-1], near[0], rtol=1e-4)


# Tuners.


@pytest.mark.slow
def test_tuners_share_a_problem_and_a_budget_and_make_a_table_and_a_picture(tmp_path, capsys):
    names = ["FDS", "random search", "cosine, best of 5 peaks"]
    given = ["--box", "log", "--tuner", *names, "--seeds", "2", "--horizon", "20"]
    rows = tuners.main([*given, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert [line.split("|")[2].strip() for line in text.splitlines()[-3:]] == names
    ends = [row for row in rows if row.last]
    assert [(row.tuner, row.seed) for row in ends] == [(n, s) for n in names for s in (0, 1)]
    for row in ends[:4]:
        assert 0.9 < row.spent <= 1.0 + 1e-9
    assert regret.draw(tmp_path) == [tmp_path / "regret_log.png"]
    assert (tmp_path / "regret_log.png").read_bytes()[:4] == PNG


@pytest.mark.slow
def test_regret_is_of_the_last_answer_that_had_cost_no_more(tmp_path):
    header = "box,tuner,seed,spent,seconds,loss,accuracy,last"
    lines = ["a,x,0,1,0,0.9,0,False", "a,x,0,2,0,0.5,0,True", "a,y,0,1.5,0,0.4,0,True"]
    (tmp_path / "tuners.csv").write_text("\n".join([header, *lines]))
    found = regret.lines(regret.read(tmp_path), "a")
    np.testing.assert_allclose(found["x"][0], [1, 2])
    np.testing.assert_allclose(found["x"][1], [0.5, 0.1])
    np.testing.assert_allclose(found["y"][1], [regret.FLOOR])
    regret.main([str(tmp_path), "--wandb", "offline"])
    assert (tmp_path / "regret_a.png").read_bytes().startswith(PNG)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/regret_a_*.png"))


@pytest.mark.slow
def test_seeds_of_the_tuning_problem_differ_in_their_data():
    one, other = (tuners.problem("log", seed, 20) for seed in (0, 1))
    assert (one.final.test_targets != other.final.test_targets).any()
    assert one.algorithm is other.algorithm
