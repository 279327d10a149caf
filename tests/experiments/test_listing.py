"""`metalearn list`, and the reference of names and keys that it prints."""

import json

import jax
import pytest

from metalearn.experiments import build
from metalearn.experiments.build import reference
from metalearn.experiments.build.reference import (
    KINDS,
    Key,
    arguments_of,
    described,
    entries,
    markdown,
    summary_of,
)
from metalearn.experiments.cli.arguments import keys, packaged
from metalearn.experiments.configs import fds_digits
from tests.helpers.command_line import call


def names(kind):
    return [entry.name for entry in entries(kind)]


def test_every_name_that_a_config_may_use_is_listed_with_a_line():
    assert names("algorithms") == sorted(build.ALGORITHMS)
    assert names("engines") == sorted(build.ENGINES)
    assert names("datasets") == sorted(build.DATASETS)
    assert names("optimizers") == sorted(build.OPTIMIZERS)
    assert names("objectives") == sorted(build.OBJECTIVES)
    assert names("configs") == packaged()
    for library in build.LIBRARIES.values():
        assert {*library.networks} <= {*names("models")}
    for kind in KINDS:
        for entry in entries(kind):
            assert entry.summary and "\n" not in entry.summary, entry


def test_the_keys_of_a_name_have_type_default_and_meaning():
    (maml,) = described("maml")
    listed = {key.name: key for key in maml.keys}
    expected = Key("inner_steps", "integer", "1", "T, inner steps in training.")
    assert listed["inner_steps"] == expected
    assert listed["eval_steps"].default == "unset"
    assert listed["optimizer"][:3] == ("optimizer", "an optimizer and its keys", "sgd(0.4)")
    assert listed["adapted"].type == "text"  # though it may be a function in Python
    assert "model" not in listed
    (digits,) = described("digits")
    assert [key.name for key in digits.keys][:2] == ["ways", "shots"]
    assert "split" not in [key.name for key in digits.keys]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "objectives"])
def test_every_key_has_a_meaning(kind):
    lacking = [
        f"{name}: {key.name}"
        for name in names(kind)
        for entry in described(name)
        if entry.kind == kind
        for key in entry.keys
        if not key.meaning
    ]
    assert not lacking, "Say what they are under `Args:` of what builds them."


def test_what_a_config_cannot_hold_is_no_key():
    assert "mask" not in [key.name for key in described("adamw")[0].keys]
    assert "activation" not in [key.name for key in described("mlp")[0].keys]
    assert "sharding" not in [key.name for key in described("forward")[0].keys]


def test_the_keys_of_a_config_are_all_of_its_keys_with_its_values():
    (entry,) = described("fds_digits")
    assert [key.name for key in entry.keys] == list(keys(fds_digits.get_config()))
    listed = {key.name: key.default for key in entry.keys}
    assert listed["dataset.label_noise"] == "0.3" and listed["chunk"] == "unset"


def test_outer_rules_of_algorithms_are_all_listed():
    rules = {rule for cls in map(reference._algorithm_class, build.ALGORITHMS) for rule in dir(cls)}
    assert {"_sign_rule"} == {rule for rule in rules if rule.endswith("_rule")}
    assert names("outer optimizers") == ["fds_rule"]


def test_docstrings_are_read_in_sentences():
    def documented():
        """Do one thing, e.g. This one, as in
        the paper. Then another.

        Args:
          rate: of the steps; None:
            no steps. More.
          **options (dict): others.

        Returns:
          nothing: at all.
        """

    assert summary_of(documented) == "Do one thing, e.g. This one, as in the paper."
    expected = {"rate": "of the steps; None: no steps. More.", "options": "others."}
    assert arguments_of(documented) == expected


def test_a_page_has_a_table_of_keys_whose_cells_are_escaped():
    entry = reference.Entry("engines", "mine", "Mine.", (Key("a", "text", "x|y", "b | c."),))
    assert markdown([entry]).splitlines()[-1] == "| `a` | text | `x\\|y` | b \\| c. |"
    assert markdown(described("sgd")).startswith("### sgd\n\nReturn v <- momentum v")


# The command.


def test_the_list_looks_for_no_device(capsys, monkeypatch):
    def refused(*args):
        raise AssertionError("a device is looked for")

    monkeypatch.setattr(jax, "process_count", refused)
    monkeypatch.setattr(jax, "devices", refused)
    assert call("list") == 0
    shown = capsys.readouterr().out
    assert "\n  maml  " in shown and "\n\nengines\n" in shown
    assert "`metalearn list NAME` shows the keys of one" in shown


def test_a_name_is_listed_with_its_keys_and_a_kind_with_its_names(capsys):
    assert call("list", "maml", "engines") == 0
    maml, engines = capsys.readouterr().out.split("\n\n")
    assert maml.startswith("maml (algorithm): Model-agnostic meta-learning")
    assert "\n  inner_steps    integer " in maml
    assert "--config.algorithm.KEY=VALUE sets one." in maml
    assert [line.split()[0] for line in engines.splitlines()[1:]] == names("engines")


def test_a_list_as_json_is_json_alone(capsys):
    assert call("list", "sgd", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "sgd" and entry["keys"][0]["name"] == "learning_rate"


def test_an_unknown_name_is_refused_with_the_nearest_one(refused):
    message = refused("list", "mamml")
    assert message.startswith("Nothing in a config is called 'mamml'. Did you mean 'maml'?")
    assert "those of a kind: algorithms, engines, models" in message
