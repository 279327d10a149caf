"""A name that changes brings its own keys; what may be unset is unset; a key is found again."""

import json

import pytest

from metalearn.experiments import build
from metalearn.experiments.build import sections
from metalearn.experiments.cli import arguments, json_config
from metalearn.experiments.configs import fds_digits, maml_digits

PARTS = """
import dataclasses

import optax

from metalearn import Algorithm, Reverse
from metalearn.algorithms.objectives import Objective, squared_error


@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    model: object
    depth: int
    optimizer: object
    objective: Objective = squared_error
    inner_steps: int = 5
    rate: float = 1
    sizes: tuple[int, ...] = (3, 4)
    most: "int | None" = None
    schedule: object = optax.linear_schedule

    def init(self, key): ...
    def unroll(self, episode, key): ...


def my_optimizer(learning_rate, decay, nesterov=False):
    return optax.sgd(learning_rate, decay, nesterov)


def my_engine(remat="step", checks=3):
    return Reverse(remat)
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "parts_of_sections.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)


def renewed(config, *words):
    """A packaged config as a command line leaves it, but for the values that absl sets."""
    rest = arguments.expanded(
        ["metalearn", "train", f"--config={config}", *words], sections.renew, sections.nullable
    )
    return arguments.LOADED.pop(config), rest[2:]


def test_another_network_brings_its_keys_with_their_defaults():
    config, rest = renewed("maml_digits", "--config.model.name=mlp", "--config.model.hidden=(8,)")
    assert config.model.to_dict() == {"name": "conv_net", "library": "linen", "hidden": (40, 40)}
    assert rest == ["--config.model.name=mlp", "--config.model.hidden=(8,)"]  # absl sets these


def test_a_network_is_looked_up_in_the_library_of_the_command_line():
    words = ("--config.model.library=haiku", "--config.model.name=wide_res_net")
    config, _ = renewed("maml_digits", *words)
    assert {"depth", "width"} < {*config.model} and "filters" not in config.model


def test_a_key_that_both_names_have_keeps_its_value():
    config, _ = renewed("maml_digits", "--config.dataset.name=omniglot")
    assert config.dataset.ways == 5 and config.dataset.partition == "vinyals"
    config, _ = renewed("maml_digits", "--config.dataset.name=sinusoid")
    assert {*config.dataset} == {"name", "shots", "queries", "eval_queries"}


def test_another_optimizer_brings_its_keys_inside_and_outside():
    words = ("--config.optimizer.name=optax.lamb", "--config.algorithm.optimizer.name=adamw")
    config, _ = renewed("maml_digits", *words)
    assert config.optimizer.learning_rate == 1e-3 and config.optimizer.schedule == "cosine"
    assert config.optimizer.eps == 1e-6 and config.optimizer.clip is None
    assert config.algorithm.optimizer.learning_rate == 0.4
    assert config.algorithm.optimizer.weight_decay == 1e-4


def test_a_key_without_a_default_comes_where_it_is_set():
    words = ("--config.optimizer.name=adam", "--config.optimizer.learning_rate=0.1")
    config, _ = renewed("fds_digits", *words)
    assert config.optimizer.get_type("learning_rate") is float
    assert {"share", "guarded"}.isdisjoint(config.optimizer)


def test_a_name_of_ones_own_brings_the_arguments_of_its_signature(parts):
    words = ("--config.algorithm.name=parts_of_sections:Mine", "--config.algorithm.depth=3")
    config, _ = renewed("maml_digits", *words)
    own = config.algorithm
    assert own.to_dict() == {
        "name": "maml",
        "depth": None,  # until absl sets it
        "optimizer": {"name": "sgd", "learning_rate": 0.4, "eps_root": None},
        "objective": "cross_entropy",  # of the config before
        "inner_steps": 1,
        "rate": 1.0,
        "sizes": (3, 4),
        "most": None,
    }
    kinds = [own.get_type(key) for key in ("depth", "rate", "most")]
    assert kinds == [int, float, int]


def test_an_optimizer_of_ones_own_has_the_types_of_the_values_it_is_given(parts):
    words = ("--config.optimizer.name=parts_of_sections:my_optimizer",)
    config, _ = renewed("maml_digits", *words, "--config.optimizer.decay=0.5")
    assert config.optimizer.get_type("decay") is float and config.optimizer.nesterov is False


def test_another_engine_unsets_the_options_that_it_does_not_take(parts):
    config, _ = renewed("fds_digits", "--config.engine=forward")
    assert fds_digits.get_config().engine_options.remat == "nested"
    assert not build.set_options(config.engine_options)
    config, _ = renewed("fds_digits", "--config.engine=reverse")
    assert config.engine_options.remat == "nested"
    config, _ = renewed("fds_digits", "--config.engine=auto")
    assert not build.set_options(config.engine_options)
    config, _ = renewed("fds_digits", "--config.engine=parts_of_sections:my_engine")
    assert build.set_options(config.engine_options) == {"remat": "nested", "checks": 3}


def test_a_name_that_stays_changes_no_key():
    config, _ = renewed("maml_digits", "--config.model.name=conv_net")
    assert config == maml_digits.get_config()


def test_a_json_config_changes_a_name_and_its_keys(tmp_path):
    path = tmp_path / "mine.json"
    given = {"config": "maml_digits", "model": {"name": "mlp", "hidden": [8]}}
    path.write_text(json.dumps({**given, "optimizer": {"name": "rmsprop", "decay": 0.5}}))
    plain = build.to_json(json_config.get_config(str(path)))
    assert plain["model"] == {"name": "mlp", "library": "linen", "hidden": [8]}
    assert plain["optimizer"]["decay"] == 0.5 and plain["optimizer"]["momentum"] is None


def test_a_json_config_sets_the_keys_of_an_own_algorithm_where_allowed(parts, tmp_path):
    path = tmp_path / "mine.json"
    own = {"name": "parts_of_sections:Mine", "depth": 2, "most": 7, "sizes": [1]}
    path.write_text(json.dumps({"config": "maml_digits", "algorithm": own}))
    plain = build.to_json(json_config.get_config(str(path), allow_imports=True))
    learner = build.algorithm(plain["algorithm"], "a model")
    assert (learner.depth, learner.most, learner.sizes) == (2, 7, (1,))


@pytest.mark.parametrize("text", ["None", "null", ""])
def test_a_key_that_may_be_unset_is_set_to_none(text):
    words = (f"--config.algorithm.eval_steps={text}", f"--config.optimizer.clip={text}")
    config, rest = renewed("maml_digits", *words, f"--config.wandb.name={text}")
    assert config.algorithm.eval_steps is None and config.optimizer.clip is None
    assert rest == [f"--config.wandb.name={text}"]  # a text that is not unset by any word


def test_null_in_a_json_config_unsets_what_may_be_unset(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"config": "maml_digits", "algorithm": {"eval_steps": null}}')
    assert json_config.get_config(str(path)).algorithm.eval_steps is None
    path.write_text('{"config": "maml_digits", "algorithm": {"inner_steps": null}}')
    with pytest.raises(
        ValueError, match="config.algorithm.inner_steps takes an integer, such as 3"
    ):
        json_config.get_config(str(path))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "'algorithm.optimizer.learning_rate' or 'optimizer.learning_rate'"),
        ("filters", "'model.filters'"),
        ("model.way", "'dataset.ways'"),
        ("optimizer.ways", "'dataset.ways'"),
    ],
)
def test_a_key_that_is_not_there_is_found_again_by_its_last_part(key, meant):
    with pytest.raises(ValueError, match=rf"has no key '{key}'\. Did you mean {meant}\?"):
        renewed("maml_digits", f"--config.{key}=1")


def test_a_key_of_a_json_config_is_found_again_by_its_last_part(tmp_path):
    (tmp_path / "mine.json").write_text('{"config": "maml_digits", "filters": 3}')
    with pytest.raises(ValueError, match="has no key 'filters'. Did you mean 'model.filters'?"):
        json_config.get_config(str(tmp_path / "mine.json"))


def test_none_may_follow_its_key_after_a_space():
    config, rest = renewed(
        "maml_digits", "--config.algorithm.eval_steps", "None", "--config.seed=1"
    )
    assert config.algorithm.eval_steps is None and rest == ["--config.seed=1"]
