"""Configs as JSON: what they set, what they refuse, and that nothing of them is run."""

import json
import re

import pytest

from metalearn.experiments import build
from metalearn.experiments.cli import arguments, json_config, values
from metalearn.experiments.commands import plan
from tests.helpers.command_line import SINUSOID, call

pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.fixture
def write(tmp_path):
    """A function that writes a value as mine.json and returns its path."""

    def written(value):
        path = tmp_path / "mine.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return written


def test_a_json_config_is_the_packaged_one_with_its_keys_set(write):
    given = {"config": "maml_digits", "seed": 1, "chunk": 2, "model": {"filters": 8}}
    given |= {"optimizer": {"learning_rate": 1, "clip": None}}
    plain = build.to_json(json_config.get_config(write(given)))
    expected = build.to_json(arguments._load(*arguments._config_file("maml_digits")))
    expected["seed"], expected["chunk"], expected["model"]["filters"] = 1, 2, 8
    expected["optimizer"]["learning_rate"] = 1.0
    assert plain == expected


def test_a_list_stands_for_a_tuple(write):
    config = json_config.get_config(write({"config": "maml_sinusoid", "model": {"hidden": [3]}}))
    assert config.model.hidden == (3,)


def test_the_config_of_a_run_has_tuples_and_no_choice_of_that_run(write):
    given = build.to_json(arguments._load(*arguments._config_file("maml_sinusoid")))
    given["mesh"]["rules"] = [["kernel$", "data"]]
    chosen = {"engine": "forward", "engine_options": {}, "chunk": 5, "why": "of a plan"}
    config = json_config.get_config(write({**given, "auto": chosen}))
    assert config.model.hidden == (40, 40) and config.mesh.rules == (("kernel$", "data"),)
    assert build.to_json(config) == given


@pytest.mark.parametrize("name", arguments.packaged())
def test_what_the_config_of_a_run_leaves_unset_keeps_the_type_of_its_values(name, write):
    config = arguments._load(*arguments._config_file(name))
    read = json_config.get_config(write(build.to_json(config)))
    unset = [key for key in arguments.keys(config) if build.sections._at(config, key) is None]
    assert {"segment", "mesh.tasks"} <= {*unset}
    for key in unset:
        section, _, last = key.rpartition(".")
        if section in ("algorithm.weighting", "dataset.corruption"):  # no arguments say its type
            continue
        before, after = (build.sections._at(each, section) for each in (config, read))
        assert after.get_type(last) is before.get_type(last), key


def test_an_unset_key_without_an_annotation_takes_any_value(write):
    config = build.to_json(arguments._load(*arguments._config_file("data_weights_digits")))
    config["algorithm"]["outer_loss"] = None
    read = json_config.get_config(write(config)).algorithm
    assert read.get_type("outer_loss") is object and read.get_type("tokens") is int


def test_a_key_that_a_run_left_unset_is_refused_by_its_type(write, refused, tmp_path):
    path = write(build.to_json(arguments._load(*arguments._config_file("maml_sinusoid"))))
    words = "train", f"--config={path}", "--config.optimizer.clip=abc", f"--workdir={tmp_path}/a"
    error = refused(*words)
    assert "config.optimizer.clip takes a number, such as 0.1, not 'abc'" in error


def test_an_engine_that_is_named_is_not_what_was_chosen_before(tmp_path):
    config = {"engine": "reverse", "auto": {"engine": "forward"}, "seed": 0}
    assert plan.settled(config, tmp_path) == {"engine": "reverse", "seed": 0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": 1}, 'names no packaged config. Begin it with {"config": "NAME'),
        ({"config": 3}, "names no packaged config."),
        ({"config": "maml_digit"}, "No packaged config is called 'maml_digit'. Did you mean "),
        ({"config": "mine/evil.py"}, "No packaged config is called 'mine/evil.py'."),
        ({"config": "../configs/maml_digits"}, "No packaged config is called '../configs/"),
        ({"config": "_common"}, "No packaged config is called '_common'."),
        ({"config": "maml_digits", "sead": 1}, "The config has no key 'sead'. Did you mean 'seed'"),
        (
            {"config": "maml_digits", "model": {"filter": 1}},
            "The config has no key 'model.filter'. Did you mean 'filters'? There are: model.",
        ),
        (
            {"config": "fds_digits", "algorithm": {"horizon": 9}},
            "The config has no key 'algorithm.horizon'. It is called 'inner_steps' now. There are",
        ),
        ({"config": "maml_digits", "model": 3}, "config.model holds keys of its own, so it takes "),
        (
            {"config": "maml_digits", "model": {"filters": "32"}},
            "config.model.filters takes an integer, such as 3, not '32'.",
        ),
        ({"config": "maml_digits", "seed": True}, "config.seed takes an integer, such as 3, not T"),
        ({"config": "maml_digits", "seed": 1.0}, "config.seed takes an integer, such as 3, not 1."),
        ({"config": "maml_digits", "seed": None}, "config.seed takes an integer, such as 3, not N"),
        ({"config": "maml_digits", "seed": {}}, "config.seed takes an integer, such as 3, not {}."),
        ({"config": "maml_digits", "health": 1}, "config.health takes true or false, not 1."),
        ({"config": "maml_digits", "engine": ["reverse"]}, "config.engine takes text, not ['rev"),
        (
            {"config": "maml_sinusoid", "model": {"hidden": 3}},
            'config.model.hidden takes a tuple, such as (32, 32) or ("a", "b"), in quotes ',
        ),
        (
            {"config": "maml_digits", "optimizer": {"learning_rate": 10**400}},
            "config.optimizer.learning_rate is larger than any floating-point number.",
        ),
        ("[1, 2]", "holds list, but a config is an object"),
        ("{", "is not JSON of a config: "),
        ('{"config": "maml_digits", "seed": 1, "seed": 2}', "'seed' is set twice."),
        ("[" * 100_000, "is not JSON of a config: "),
        ("\x00\xff", "is not JSON of a config: "),
        ('{"config": "maml_digits", "mesh": {"rules": ' + "[" * 500 + "]" * 500 + "}}", "64 deep"),
        ('{"config": "maml_digits", "model": ' + '{"a": ' * 500 + "1" + "}" * 501, "64 deep"),
        ('{"config": "maml_digits", "seed": NaN}', "NaN is no JSON, which has finite numbers alo"),
        ('{"config": "maml_digits", "optimizer": {"clip": -Infinity}}', "-Infinity is no JSON"),
        ('{"config": "maml_digits", "optimizer": {"clip": 1e999}}', "config.optimizer.clip is inf"),
        ('{"config": "maml_digits", "seed": ' + "9" * 5000 + "}", "is not JSON of a config: "),
        ({"config": "maml_digits", "seed": 10**400}, "config.seed is 1000"),
        ('{"config": "maml_digits", "model": {"filters": 1, "filters": 2}}', "'filters' is set tw"),
        ('"' + "a" * 2**24 + '"', "is longer than 16,777,216 bytes"),
        ({"config": "maml_digits", "mesh": {"rules": [["(a+)+$", "model"]]}}, "repeats a group"),
        ({"config": "maml_digits", "mesh": {"rules": [["kernel", ["model"]]]}}, "an axis of the"),
        ({"config": "maml_digits", "mesh": {"rules": [["kernel", 5]]}}, "an axis of the mesh of"),
        ({"config": "maml_digits", "mesh": {"rules": [["a", "model", "model"]]}}, "of its own, or"),
        ({"config": "maml_digits", "mesh": {"rules": {"a": 1}}}, "config.mesh.rules takes a tuple"),
        (
            {"config": "maml_digits", "algorithm": {"adapted": "(a+)+$"}},
            "repeats a group, which can",
        ),
    ],
    ids=lambda part: str(part)[:60],  # one of them is 16 MiB long
)
def test_a_json_config_that_cannot_be_is_refused(write, given, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        plain = build.to_json(json_config.get_config(write(given)))
        build.layout(plain)
        build.algorithm(plain["algorithm"], None)
    assert len(str(caught.value)) < 1500


def test_a_json_config_may_begin_with_a_byte_order_mark_and_is_utf_8(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"config": "maml_digits", "seed": 3}')
    assert json_config.get_config(str(path)).seed == 3
    path.write_bytes('{"config": "maml_digits", "seed": 3}'.encode("utf-16"))
    with pytest.raises(ValueError, match="is not JSON of a config: .*'utf-8' codec can't decode"):
        json_config.get_config(str(path))


def test_a_file_of_a_hundred_megabytes_is_not_read(tmp_path):
    path = tmp_path / "mine.json"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(ValueError, match="is longer than 16,777,216 bytes"):
        json_config.get_config(str(path))


def test_a_json_config_that_is_not_there_is_refused(refused, tmp_path):
    path = tmp_path / "nothing.json"
    message = refused("train", f"--config={path}", f"--workdir={tmp_path}")
    assert message == f"There is no config file {path}."


def test_a_json_config_runs_no_python_file_even_where_one_is_named(refused, tmp_path):
    marker, evil = tmp_path / "ran", tmp_path / "evil.py"
    evil.write_text(f"open({str(marker)!r}, 'w')\n")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"config": str(evil)}))
    message = refused("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert message.startswith(f"No packaged config is called {str(evil)!r}.")
    assert not marker.exists()


@pytest.mark.slow
def test_the_command_line_is_set_on_top_of_a_json_config(write, tmp_path):
    mine = write({"config": "maml_sinusoid", "seed": 7, "model": {"hidden": [3, 5]}, "steps": 9})
    options = [word for word in SINUSOID if not word.startswith(("train", "--config="))]
    workdir = tmp_path / "run"
    words = ("train", f"--config={mine}", *options, "--noprogress", f"--workdir={workdir}")
    assert call(*words) == 0
    (record,) = (workdir / "checkpoints").glob("2/record/metadata")
    config = json.loads(record.read_text())["config"]
    assert config["seed"] == 7 and config["steps"] == 2 and config["model"]["hidden"] == [3, 5]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n", "has no function `get_config`. Write one that returns a ConfigDict"),
        ("def get_config():\n    return None\n", "returned NoneType, but a config is an "),
    ],
)
def test_a_config_file_without_a_config_is_refused(refused, tmp_path, source, expected):
    mine = tmp_path / "mine.py"
    mine.write_text(source)
    assert expected in refused("train", f"--config={mine}", f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--config.seed=abc", "config.seed takes an integer, such as 3, not 'abc'."),
        ("--config.seed=1.5", "config.seed takes an integer, such as 3, not '1.5'."),
        ("--config.seed=", "config.seed takes an integer, such as 3, not ''."),
        ("--config.steps=None", "config.steps takes an integer, such as 3, not 'None'."),
        ("--config.health=maybe", "config.health takes true or false, not 'maybe'."),
        (
            "--config.optimizer.learning_rate=fast",
            "config.optimizer.learning_rate takes a number, such as 0.1, not 'fast'.",
        ),
        ("--config.optimizer.clip=x", "config.optimizer.clip takes a number, such as 0.1, not 'x'"),
        (
            "--config.model.hidden=(3, ",
            'config.model.hidden takes a tuple, such as (32, 32) or ("a", "b"), in quotes ',
        ),
        ("--config.model.hidden=abc", "`MLP(hidden=('abc',))`: a width is an integer, 1 or more"),
        ("--config.steps=-1", "config.steps is -1, but it is 0 or more."),
        ("--config.tasks_per_step=0", "An outer step takes at least one task, not 0."),
        ("--config.tasks_per_step=-1", "An outer step takes at least one task, not -1."),
        ("--config.tasks_per_step=1000000000", "config.tasks_per_step is 1000000000, but integer"),
        ("--config.chunk=0", "tasks_per_step=2 does not divide into chunks of 0. Chunks that fit"),
        ("--config.chunk=-1", "tasks_per_step=2 does not divide into chunks of -1."),
        ("--config.chunk=1000000000", "tasks_per_step=2 does not divide into chunks of 10000000"),
        ("--config.mesh.model=0", "`mesh(model=0)`: it is an integer, 1 or more."),
        ("--config.mesh.tangents=-1", "`mesh(tangents=-1)`: it is an integer, 1 or more."),
        ("--config.mesh.tasks=0", "`mesh(tasks=0)`: it is an integer, 1 or more."),
        ("--config.mesh.tasks=1000000000", "A mesh of tasks=1000000000 x data=1 x model=1 x tang"),
        ("--config.eval_tasks=1000000000", "config.eval_tasks is 1000000000, but integers go up "),
        ("--config.test_tasks=1000000000", "config.test_tasks is 1000000000, but integers go up "),
        (
            "--config.algorithm.adapted=(a+)+$",
            "`MAML(adapted='(a+)+$')`: it repeats a group, which",
        ),
        ("--config.test_tasks=0", "config.test_tasks is 0, but it is 1 or more."),
        ("--config.tasks_per_step=1000000000000", "config.tasks_per_step is 1000000000000, but i"),
        (
            "--config.optimizer.learning_rate=nan",
            "config.optimizer.learning_rate is nan, but a run keeps its config as JSON",
        ),
    ],
)
def test_a_value_on_the_command_line_is_refused_by_key_value_and_type(
    refused,
    tmp_path,
    word,
    expected,
):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--noprogress", word)
    assert message.startswith(expected) and "\n" not in message


def test_a_value_may_follow_its_key_after_a_space(refused, tmp_path):
    message = refused(*SINUSOID, f"--workdir={tmp_path}", "--config.seed", "abc")
    assert message == "config.seed takes an integer, such as 3, not 'abc'."


@pytest.mark.parametrize(
    ("text", "kind"),
    [("3", int), ("-3", int), ("0x10", int), ("1e-3", float), ("3", float), ("true", bool)]
    + [("(3, 5)", tuple), ("3", tuple), ("anything at all", str), ("[3]", tuple)],
)
def test_what_ml_collections_reads_passes(text, kind):
    values.check_text("key", text, kind)


def test_a_seed_may_be_larger_than_a_count():
    values.check({"seed": 2**40, "engine_options": {"budget": 2**40}})
    with pytest.raises(ValueError, match="config.seed is 9223372036854775808, but integers go up"):
        values.check({"seed": 2**63})
