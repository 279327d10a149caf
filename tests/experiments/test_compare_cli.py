"""`metalearn compare`, and training with `engine="auto"` within a tolerance."""

import contextlib
import io
import json

import pytest

from metalearn import Implicit, Reverse, Truncated
from metalearn.diagnostics import comparison
from metalearn.experiments import build
from metalearn.experiments.commands import plan as auto
from tests.helpers.command_line import call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

SMALL = (
    *("--config=fds_digits", "--config.model.hidden=(3,)", "--config.algorithm.inner_steps=14"),
    *("--config.algorithm.batch=4", "--config.dataset.validation=8", "--config.health=False"),
)
ENGINES = [Reverse(), Truncated(7), Truncated(20), Implicit("cg", variables="params")]


@pytest.fixture(scope="module", autouse=True)
def fewer_candidates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "candidates", lambda steps: ENGINES)
        yield


@pytest.fixture(scope="module")
def compared():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call("compare", *SMALL, "--json", "--x64") == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
def test_the_json_has_a_row_for_each_engine_as_a_config_names_it(compared):
    names = [(row["engine"], row["engine_options"]) for row in compared["rows"]]
    assert names == [
        ("reverse", {}),
        ("truncated", {"last": 7}),
        ("truncated", {"last": 20}),
        ("implicit", {"solver": "cg", "variables": "params"}),
    ]
    for name, options in names:
        assert build.engine(name, options) in ENGINES
    assert compared["inner_steps"] == 14 and compared["exact"] == "MixedFlow()"


@pytest.mark.slow
def test_in_float64_exact_engines_agree_to_rounding_and_others_do_not(compared):
    assert compared["dtype"] == "float64"
    errors = [row["relative_error"] for row in compared["rows"]]
    # FDS hands its hyperparameters to the optimizer in float32, whatever theta is.
    assert errors[0] < 1e-6 and errors[2] < 1e-6 and errors[1] > 1e-3 and errors[3] > 1e-3
    assert compared["rows"][3]["doubts"][0].startswith("theta_T is no fixed point")
    assert all(row["cost"]["peak"] > 0 and row["refusal"] is None for row in compared["rows"])


@pytest.mark.slow
def test_the_table_is_sorted_by_error_and_ends_with_the_choice(capsys):
    assert call("compare", *SMALL, "--tolerance=0.001") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "One outer step of 1 task of 14 inner steps, against MixedFlow() in "
    )
    assert lines[2].split() == ["engine", "rel.", "error", "cosine", "memory", "FLOPs", "time"]
    errors = [float(line.split()[-7]) for line in lines[3:7]]
    assert errors == sorted(errors) and errors[1] < 1e-3 < errors[2]
    assert any("theta_T is no fixed point" in line for line in lines)
    assert lines[-2].startswith("Chosen: ") and "error of 0.001 or less" in lines[-2]
    assert lines[-1].strip() in (
        "--config.engine=reverse",
        "--config.engine=truncated --config.engine_options.last=20",
    )


@pytest.mark.slow
def test_auto_trains_with_the_fastest_engine_within_the_tolerance(tmp_path, capsys):
    words = (
        *("train", *SMALL, "--config.engine=auto", "--config.steps=1", "--config.test_tasks=2"),
        *("--config.checkpoint_every=1", "--config.pictures=()", "--noprogress"),
        *("--config.wandb.mode=disabled", f"--workdir={tmp_path / 'run'}"),
    )
    assert call(*words, "--tolerance=10") == 0
    (record,) = (tmp_path / "run" / "checkpoints").glob("1/record/metadata")
    chosen = json.loads(record.read_text())["config"]["auto"]
    assert build.engine(chosen["engine"], chosen["engine_options"]) in ENGINES
    assert "with a relative error of 10 or less" in chosen["why"]
    assert f"engine: {chosen['why']}." in capsys.readouterr().out
    assert call(*words) == 0
    assert "(chosen when the run began)" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan"])
def test_a_tolerance_that_is_none_is_refused(tolerance, tmp_path, capsys):
    words = "train", *SMALL, "--config.engine=auto", f"--workdir={tmp_path}"
    assert call(*words, f"--tolerance={tolerance}") == 2
    assert "tolerance=" in capsys.readouterr().err


def test_a_tolerance_without_auto_is_refused(tmp_path):
    config = {"engine": "reverse", "engine_options": {}}
    with pytest.raises(ValueError, match="--tolerance is the error within which engine='auto'"):
        auto.settled(config, tmp_path, tolerance=0.1)
