"""Whatever is written as JSON is JSON to the strictest reader, and comes back as it was."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from metalearn._utils import strict_json
from metalearn._utils.intervals import Estimate
from metalearn.algorithms.fds.pictures import read_steps
from metalearn.checkpoints.manager import ChangedConfigError, Checkpoints
from metalearn.experiments.commands import run
from metalearn.loggers import JsonlLogger, read_lines
from tests.helpers.checkpoints import saved


def strictly(text):
    """Read JSON as RFC 8259 has it."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


VALUES = {
    "nan": [math.nan, -math.inf, {"x": math.inf, "n": None, "t": True}],
    "text": ["NaN", "\\NaN", "\\\\Infinity", "-Infinity", "nan", "\\", ""],
    "numbers": [1, -0.0, 1e-320, 10**30, {"a": {"b": [1.5, []]}}],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_written_strictly_comes_back(value):
    text = strict_json.dumps(value)
    assert repr(strict_json.loads(text)) == repr(value)
    assert strict_json.dumps(strictly(text)) != "" and strict_json.loads(text.encode()) is not None


def test_the_text_of_numbers_that_are_not_finite():
    values = {"a": math.nan, "b": (math.inf, -math.inf), "c": np.float64("nan"), "d": "NaN"}
    expected = '{"a": "NaN", "b": ["Infinity", "-Infinity"], "c": "NaN", "d": "\\\\NaN"}'
    assert strict_json.dumps(values) == expected
    assert (
        strict_json.dumps({"b": 1, "a": 2}, sort_keys=True, indent=1) == '{\n "a": 2,\n "b": 1\n}'
    )


def test_the_bare_nan_of_older_files_is_read():
    assert repr(strict_json.loads('[NaN, Infinity, -Infinity, "NaN"]')) == "[nan, inf, -inf, nan]"


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\0\0", "{", "", "[" * 10**5, b'{"a": 1}}'])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        strict_json.loads(text)


def test_nothing_in_the_package_writes_json_by_itself():
    """But for what runs without the package, and then strictly."""
    found = []
    root = pathlib.Path(__file__).parents[2]
    folders = ("metalearn", "algorithms", "models", "datasets", "experiments")
    for path in [path for folder in folders for path in (root / folder).glob("**/*.py")]:
        lines = path.read_text().splitlines() if path.name != "strict_json.py" else ()
        found += [f"{path}: {line}" for line in lines if re.search(r"(?<!strict_)json\.dump", line)]
    alone = root / "experiments/benchmarks/pytorch_"
    assert len(found) == 4 and all(line.startswith(str(alone)) for line in found)
    assert all(re.search(r"json\.dumps\(\w+, allow_nan=False\)", line) for line in found)


def test_metrics_that_are_not_finite_are_strict_json_and_are_read_back(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0, {}, {})
    logger.log(1, {"loss": math.nan, "up": math.inf})
    logger.log(2, {"loss": -math.inf, "up": 1.0})
    rows = [strictly(line) for line in logger.path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": "NaN", "up": "Infinity"},
        {"step": 2, "loss": "-Infinity", "up": 1.0},
    ]
    assert repr([line.row for line in read_lines(logger.path)]) == (
        "[{'step': 1, 'loss': nan, 'up': inf}, {'step': 2, 'loss': -inf, 'up': 1.0}]"
    )
    (first, second) = read_steps(tmp_path)
    assert math.isnan(first["loss"]) and second["loss"] == -math.inf


def test_bare_nan_of_an_older_version_is_kept_and_made_strict_when_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    finite = '{"step":1,  "loss": 2.50}\n'
    path.write_text(finite + '{"step": 2, "loss": NaN, "x": -Infinity}\n{"step": 3, "loss": NaN}\n')
    JsonlLogger(path).start(2, {}, {})
    assert path.read_text() == finite + '{"step": 2, "loss": "NaN", "x": "-Infinity"}\n'


def test_lines_that_waited_are_strict_too(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0, {}, {"waiting": ['{"step": 1, "loss": NaN}\n', 5, "no JSON", "[]"]})
    assert [strictly(line) for line in logger.path.read_text().splitlines()] == [
        {"step": 1, "loss": "NaN"}
    ]


def test_the_score_of_a_single_task_has_no_interval_and_is_strict_json(tmp_path):
    run._write(tmp_path / "test.json", {"loss": Estimate(math.inf, math.nan, 1)})
    found = strictly((tmp_path / "test.json").read_text())
    assert found == {"loss": {"mean": "Infinity", "ci95": "NaN", "tasks": 1}}


def test_a_config_that_is_not_finite_is_the_same_when_a_run_goes_on(tmp_path):
    config = {"ratio": math.inf, "start": math.nan, "name": "NaN"}
    directory = saved(tmp_path / "run", steps=(1,), config=config)
    strictly((directory / "1" / "record" / "metadata").read_text())
    opened = Checkpoints(directory, config)
    opened.check_config()
    kept = opened.record()["config"]
    assert kept["ratio"] == math.inf and math.isnan(kept["start"]) and kept["name"] == "NaN"
    opened.close()
    with pytest.raises(ChangedConfigError, match=re.escape("config.ratio: 'Infinity' -> 10.0")):
        Checkpoints(directory, config | {"ratio": 10.0}).check_config()
