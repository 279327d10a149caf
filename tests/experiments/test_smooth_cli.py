"""`metalearn smooth`: its table, JSON and picture, the settings it searches, and the warning."""

import ast
import contextlib
import io
import json

import jax
import numpy as np
import pytest

from metalearn import ES, MixedFlow, Trainer
from metalearn.diagnostics import perturbed_runs
from metalearn.diagnostics.perturbed_runs import PerturbedRuns, ThreeRuns
from metalearn.diagnostics.smoothness import three_runs
from metalearn.experiments import build
from metalearn.experiments.benchmarks import settings
from metalearn.experiments.benchmarks import smoothness as benchmark
from metalearn.experiments.cli.arguments import packaged
from metalearn.experiments.commands import run, smooth
from metalearn.experiments.commands.smooth import Trial, changed, frontier, levers, value_at
from metalearn.experiments.sweep.space import Parameter
from metalearn.models.transformer import Architecture
from tests.helpers.command_line import call
from tests.helpers.small_configs import module, skip_without, small

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

SMALL = (
    *("--config=fds_digits", "--config.model.hidden=(3,)", "--config.algorithm.inner_steps=14"),
    *("--config.algorithm.batch=4", "--config.dataset.validation=8"),
)


ENGINE = MixedFlow()


def plain(name, **changes):
    config = module(name).get_config()
    config.update_from_flattened_dict(changes)
    return build.to_json(config)


@pytest.mark.slow
def test_json_picture_and_search_of_a_small_config(tmp_path):
    words = *SMALL, "--json", "--search", "--trials=1", f"--workdir={tmp_path / 'trials'}"
    for _ in range(2):  # the second time the trial is there
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert call("smooth", *words, f"--out={tmp_path / 'smooth.png'}") == 0
    result = json.loads(printed.getvalue())
    assert result["inner_steps"] == 14 and len(result["tangents"]) == 14
    assert result["worth"] in ("useful", "doubtful", "useless") and result["verdict"]
    directions = [each["direction"] for each in result["predictions"]]
    assert directions == ["meta-gradient", "outer step", "random 1"]
    assert [trial["settings"] == {} for trial in result["trials"]] == [True, False]
    assert any(trial["best"] for trial in result["trials"])
    assert (tmp_path / "smooth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged())
def test_every_packaged_config_has_a_smoothness(name, monkeypatch):
    """Its programs are traced; test_json_picture_and_search_of_a_small_config runs them."""
    config = small(name)
    skip_without(config.dataset.name, config.dataset.get("tfds"))
    monkeypatch.setattr(perturbed_runs, "_once", jax.eval_shape)
    trainer, state, tasks = smooth.built(build.to_json(config))
    runs = PerturbedRuns.create(trainer, state, tasks)
    pulled = runs.pull_back([jax.random.key(0)])
    norms = {pulled.cotangents.shape, *(part.shape for part in runs.tangents(state.eta)[1:])}
    assert norms == {(runs.horizon,)} and pulled.slopes.shape == (3,)
    ends = runs.three(jax.random.key(0), 0.1)
    assert ends.metasmoothness.shape == () and ends.losses.shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--config.segment=5",)], ids=["one program", "segments"])
def test_the_table_ends_with_the_verdict(options, capsys):
    assert call("smooth", *SMALL, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("One task of 14 inner steps, outer loss ")
    assert lines[2].split()[0] == "direction" and lines[3].startswith("meta-gradient")
    assert lines[-1].split(":")[0] in ("Useful", "Doubtful", "Useless")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("fds_digits", ["hyperparameters.learning_rate.start", "batch", "model.hidden"]),
        ("loss_weights_shakespeare", ["eps_root", "learning_rate", "dataset.batch", "width"]),
        ("learning_rates_shakespeare", ["eps_root", "initial", "dataset.batch", "model.width"]),
        (
            "data_weights_digits",
            ["optimizer.learning_rate", "decay_steps", "algorithm.batch", "model.hidden"],
        ),
        ("maml_digits", ["optimizer.learning_rate", "model.filters"]),
    ],
)
def test_a_search_has_those_settings_that_a_config_has(name, keys):
    config = plain(name)
    space = levers(config)
    assert len(space) == len(keys)
    for each, key in zip(space, keys, strict=True):
        assert each.key.endswith(key)
        assert each.kind == "choice" or each.low < each.high
        now = value_at(config, each.key)
        if each.choices:
            first = ast.literal_eval(each.choices[0])
            assert first == (tuple(now) if isinstance(now, list) else now)


def test_a_config_without_such_settings_is_refused():
    bare = {"algorithm": {"name": "mine"}, "dataset": {}}
    with pytest.raises(ValueError, match="and this config has none of them set. Leave --search"):
        levers(bare)


def test_changes_are_of_a_copy():
    config = plain("fds_digits")
    other = changed(config, {"model.hidden": (128,), "algorithm.batch": 256})
    assert other["model"]["hidden"] == (128,) and other["algorithm"]["batch"] == 256
    assert config == plain("fds_digits")


def test_the_frontier_holds_what_no_other_trial_beats_in_both():
    trials = [Trial({"a": i}, *pair) for i, pair in enumerate([(0.9, 2.0), (0.5, 1.0), (0.4, 1.5)])]
    failed = Trial({"a": 4}, float("nan"), float("nan"))
    assert frontier([*trials, failed, *trials]) == trials[:2]


def test_a_search_of_few_choices_tries_each_of_them_once(monkeypatch, tmp_path):
    tried = []

    def trial(config, settings, say):
        tried.append(settings.get("batch"))
        return Trial(settings, 0.5, 1.0)

    monkeypatch.setattr(smooth, "_tried", trial)
    space = [Parameter("batch", "choice", choices=("1", "2"))]
    options = smooth.Options(as_json=True, trials=6, workdir=tmp_path)
    trials = smooth.search({}, space, options)
    assert len(trials) == 7 and tried[0] is None and sorted(tried[1:]) == [1, 2]
    assert len(smooth.search({}, space, options._replace(trials=8))) == 9
    assert tried[3:] == [None]  # those of the workdir are known


@pytest.mark.parametrize("option", ["--trials=3", "--workdir=somewhere"])
def test_an_option_of_a_search_without_it_is_refused(option, capsys):
    assert call("smooth", *SMALL, option) == 2
    assert (
        f"{option.partition('=')[0]} is of `metalearn smooth --search`" in capsys.readouterr().err
    )


def measured(monkeypatch, value):
    """Let three runs have a metasmoothness; return how often they were run."""
    calls = []

    def three(runs, draw, step):
        calls.append(runs.horizon)
        return ThreeRuns(np.float32(value), np.ones(3))

    monkeypatch.setattr(PerturbedRuns, "three", three)
    return calls


def small_run(engine=ENGINE, **changes):
    """Return (config, trainer, state, tasks) of a run whose inner optimizer is Adam."""
    adam = {"name": "adam", "learning_rate": 0.01, "eps_root": 1e-8}
    steps = changes.pop("steps", 12)
    config = plain("maml_sinusoid")
    config["algorithm"] |= {"optimizer": adam, "inner_steps": steps} | changes
    splits = build.splits(config["dataset"])
    learner = build.trainer(config, splits).algorithm
    trainer = Trainer(learner, engine, tasks_per_step=1)
    return config, trainer, trainer.init(jax.random.key(0)), splits.train


def test_a_run_is_warned_where_the_meta_gradient_predicts_nothing(monkeypatch):
    calls = measured(monkeypatch, 0.3)
    message = smooth.warning(*small_run())
    assert "The metasmoothness of the first task is 0.30, of at most 1" in message
    assert "`metalearn smooth` says over which steps it holds" in message
    measured(monkeypatch, 0.6)
    assert smooth.warning(*small_run()) == "" and calls == [12]


def test_nothing_is_measured_of_short_loops_estimates_and_optimizers_without_a_root(monkeypatch):
    calls = measured(monkeypatch, 0.0)
    assert smooth.warning(*small_run(steps=9)) == ""
    assert smooth.warning(*small_run(engine=ES())) == ""
    assert smooth.warning(*small_run(optimizer={"name": "sgd", "learning_rate": 0.01})) == ""
    assert calls == []
    assert run.smooth is smooth


def test_of_the_packaged_configs_those_with_adam_inside_are_measured():
    those = [name for name in packaged() if smooth.divides_by_root(optimizer_of(name))]
    adam = ["data_rater_shakespeare", "learning_rates_shakespeare", "loss_weights_shakespeare"]
    assert those == adam


def optimizer_of(name):
    return plain(name)["algorithm"].get("optimizer")


@pytest.fixture
def small_benchmark(monkeypatch):
    skip_without("text")
    sizes = {"EXAMPLES": 16, "EPOCHS": 2, "QUERIES": 2, "LENGTH": 8, "AT_ONCE": 7}
    decoder = Architecture(benchmark.CHARACTERS, 8, 1, heads=1)
    for name, value in {**sizes, "DECODER": decoder}.items():
        monkeypatch.setattr(benchmark, name, value)
    return benchmark


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_setting_and_the_verdict(small_benchmark, capsys):
    small_benchmark.main(["--eps-root", "1e-8", "1e-4", "--retrainings", "4", "--seeds", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| 0.")]
    assert [row[1] for row in rows] == ["1e-08", "1e-04", "1e-08", "1e-05"]
    assert all(" +- " in cell for row in rows for cell in row[2:])  # over two seeds
    assert sum(line.startswith("seed ") for line in lines) == 8
    assert any(line.startswith("rank correlation of metasmoothness and LDS") for line in lines)
    assert any(line.startswith("rate 0.02, eps_root 1e-08: ") for line in lines)


@pytest.mark.slow
def test_the_metasmoothness_of_the_benchmark_is_that_of_three_runs(small_benchmark):
    episode = small_benchmark.episode_of(small_benchmark.windows(), 0.02, 1e-8)
    result = small_benchmark.row(episode, 4, 0)
    runs = three_runs(*small_benchmark.trainer_of(episode, 0))
    assert abs(result.metasmoothness - runs.metasmoothness) < 0.01
    assert abs(result.query - runs.losses[0]) < 1e-4 and result.metasmoothness < 0.99


def test_settings_are_read_as_the_command_line_spells_them():
    words = ["model.hidden=(128,)", "algorithm.batch=200", "algorithm.optimizer.decay_steps=None"]
    assert settings.setting(words) == {
        "model.hidden": (128,),
        "algorithm.batch": 200,
        "algorithm.optimizer.decay_steps": None,
    }


@pytest.mark.slow
def test_a_smoother_setting_is_compared_with_the_config_as_it_is(monkeypatch, capsys):
    config = small("data_weights_digits", steps=1)
    monkeypatch.setattr(settings, "config_of", lambda name: build.to_json(config))
    words = ["--try", "algorithm.optimizer.decay_steps=7", "--seeds", "0", "1", "--tasks", "2"]
    settings.main(["data_weights_digits", *words])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| as it is | ") and rows[1].endswith("|  |")
    assert rows[2].startswith("| algorithm.optimizer.decay_steps=7 | ")
    cells = rows[2].strip("| ").split(" | ")
    assert len(cells) == 4 and all(" +- " in cell for cell in cells[2:])
