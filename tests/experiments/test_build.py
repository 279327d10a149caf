"""From a config to objects: every packaged config, and every name in every table."""

import inspect
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
import pytest
from PIL import Image

from metalearn import Reverse
from metalearn.datasets.cifar_few_shot import class_names
from metalearn.experiments import build
from metalearn.experiments.build import algorithms, datasets
from metalearn.experiments.cli import arguments
from tests.helpers.selection import quick
from tests.helpers.small_configs import module, skip_without, small

INPUTS = {
    "mlp": jax.ShapeDtypeStruct((1, 1), jnp.float32),
    "conv_net": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),
    "le_net": jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32),
    "res_net12": jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32),
    "wide_res_net": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
    "transformer": jax.ShapeDtypeStruct((1, 6), jnp.int32),
}
SIZES: dict[str, dict] = {
    "mlp": {"hidden": [4]},
    "conv_net": {"filters": 2, "blocks": 1},
    "le_net": {"convolution": "lax"},
    "res_net12": {"filters": [2, 2, 2, 2]},
    "wide_res_net": {"depth": 10},
    "transformer": {"width": 4, "layers": 2, "heads": 2},
}
TABLES = {
    "engine": build.ENGINES,
    "optimizer": build.OPTIMIZERS,
    "schedule": build.SCHEDULES,
    "objective": build.OBJECTIVES,
    "network": build.LIBRARIES["linen"].networks,
    "algorithm": build.ALGORITHMS,
    "model library": build.LIBRARIES,
    "dataset": build.DATASETS,
}


RUNS = {"text", "training_run", "optimizer_runs"}  # datasets of training runs


def splits(network, outputs=3) -> build.Splits:
    """The part of a dataset that a model is built from."""
    return build.Splits(None, None, None, INPUTS[network], outputs)  # type: ignore[arg-type]


def model(network, library):
    return build.model({"name": network, "library": library, **SIZES[network]}, splits(network))


def takes_a_step(config):
    plain = build.to_json(config)
    data = build.splits(plain["dataset"])
    trainer = build.trainer(plain, data)
    before = trainer.init(jax.random.key(plain["seed"]), data.train)
    after, metrics = trainer.step(before, data.train)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert int(after.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.eta, after.eta)
    assert any(jax.tree.leaves(moved))
    return trainer, data, after


# Digits take a step below, and test_pictures.py trains FDS.
@pytest.mark.parametrize("name", quick(arguments.packaged(), lambda name: name == "maml_sinusoid"))
def test_a_packaged_config_builds_and_takes_a_step(name):
    config = small(name)
    skip_without(config.dataset.name, config.dataset.get("tfds"))
    takes_a_step(config)


@pytest.mark.slow
@pytest.mark.parametrize("library", build.LIBRARIES)
def test_digits_train_and_evaluate_with_every_model_library(library):
    config = small("maml_digits", **{"model.library": library, "engine": "reverse"})
    trainer, data, state = takes_a_step(config)
    found = trainer.evaluate(state.eta, data.test, jax.random.key(1), 4)
    assert found["loss"].tasks == 4 and 0.0 <= found["accuracy"].mean <= 1.0


@pytest.mark.parametrize("name", arguments.packaged())
def test_a_config_file_opens_with_its_card(name):
    card = module(name).__doc__ or ""
    assert re.match(r"\S.*\.\n\n", card), "a first sentence that says what it is"
    assert re.search(r"^Reproduces +\w", card, re.MULTILINE)
    command = re.search(r"^Command +(.+(?:\n  .*)*)", card, re.MULTILINE)
    assert command and f"--config={name} " in command[1]
    assert re.search(r"^Takes +\w.*(core|CPU)", card, re.MULTILINE), "hardware and time"
    assert re.search(r"^Expect +(\d|not measured)", card, re.MULTILINE), "the score"


def test_a_config_becomes_plain_json_with_lists_for_tuples():
    plain = build.to_json(module("maml_sinusoid").get_config())
    assert plain["model"] == {"name": "mlp", "library": "linen", "hidden": [40, 40]}
    assert plain["chunk"] is None and plain["optimizer"]["learning_rate"] == 1e-3


def test_every_table_of_the_module_is_in_this_test():
    found = [v for name, v in vars(build).items() if name.isupper() and isinstance(v, Mapping)]
    ours = [table for what, table in TABLES.items() if what != "network"]  # one for each library
    assert sorted(map(id, found)) == sorted(map(id, ours))


def _asks(what):
    """A function that builds something of which only the name of a `what` is wrong."""
    mlp = {"name": "mlp", "library": "linen"}
    sgd = {"name": "sgd", "learning_rate": 0.1}
    maml = {"name": "maml", "optimizer": sgd}
    return {
        "engine": lambda name: build.engine(name),
        "optimizer": lambda name: build.optimizer({**sgd, "name": name}),
        "schedule": lambda name: build.outer_optimizer({**sgd, "schedule": name}, 10),
        "objective": lambda name: build.algorithm({**maml, "objective": name}, None),
        "network": lambda name: build.model({**mlp, "name": name}, splits("mlp")),
        "algorithm": lambda name: build.algorithm({**maml, "name": name}, None),
        "model library": lambda name: build.model({**mlp, "library": name}, splits("mlp")),
        "dataset": lambda name: build.splits({"name": name}),
    }[what]


@pytest.mark.parametrize("what", TABLES)
def test_a_name_in_no_table_is_refused_with_those_there_are(what):
    known = ", ".join(sorted(TABLES[what]))
    expected = f"No {what} is called 'x_y'. There are: {known}."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        _asks(what)("x_y")


@pytest.mark.parametrize("name", build.ENGINES)
def test_every_engine_builds(name):
    assert isinstance(build.engine(name), build.ENGINES[name])


def test_an_engine_is_built_with_its_options():
    assert build.engine("reverse", {"remat": "step"}) == Reverse(remat="step")


@pytest.mark.parametrize("schedule", build.SCHEDULES)
@pytest.mark.parametrize("name", build.OPTIMIZERS)
def test_every_optimizer_moves_against_the_gradient_on_every_schedule(name, schedule):
    config = {"name": name, "learning_rate": 0.5, "schedule": schedule}
    optimizer = build.outer_optimizer(config, steps=10)
    moved = jnp.ones(2)
    state = optimizer.init(moved)
    for _ in range(2):  # the first step of ADOPT moves nothing
        updates, state = optimizer.update(jnp.array([1.0, -1.0]), state, moved)
        moved = optax.apply_updates(moved, updates)
    assert moved[0] < 1.0 < moved[1]


def test_the_cosine_schedule_ends_at_zero_after_the_outer_steps_and_the_constant_one_stays():
    assert build.SCHEDULES["constant"](0.5, 10) == 0.5
    rate = build.SCHEDULES["cosine"](0.5, 10)
    assert [round(float(rate(step)), 6) for step in (0, 5, 10)] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("name", build.OBJECTIVES)
def test_every_objective_goes_with_every_algorithm(name):
    own = {"loss_weights", "fds", "learned_optimizer", "data_weights", "data_rater"}
    for algorithm in build.ALGORITHMS.keys() - own:  # they have their own
        config = {"name": algorithm, "objective": name}
        if "optimizer" in inspect.signature(build.ALGORITHMS[algorithm]).parameters:
            rate = 1 if algorithm == "learning_rates" else 0.1  # it learns the rates
            config["optimizer"] = {"name": "sgd", "learning_rate": rate}
        made = build.algorithm(config, model("mlp", "linen"), outputs=3)
        assert made.objective is build.OBJECTIVES[name]


@pytest.mark.parametrize("library", build.LIBRARIES)
@pytest.mark.parametrize("network", TABLES["network"])
def test_every_network_of_every_library_fits_its_dataset(network, library):
    made = model(network, library)
    batch = jax.ShapeDtypeStruct((5, *INPUTS[network].shape[1:]), INPUTS[network].dtype)

    def outputs(x):
        params, state = made.init(jax.random.key(0))
        return made.apply(params, state, x, train=True, key=jax.random.key(1))[0]

    per_token = (6,) if network == "transformer" else ()
    assert jax.eval_shape(outputs, batch).shape == (5, *per_token, 3)


def mini_imagenet(root):
    """Make a folder of the classes of mini-ImageNet with four images each; return it."""
    for split in ("train", "validation", "test"):
        for name in class_names("mini_imagenet", split):
            (root / name).mkdir()
            for i in range(4):
                Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


def grey_images(root):
    """Make a folder of four classes with four images each; return it."""
    for name in "abcd":
        (root / name).mkdir()
        for i in range(4):
            Image.new("L", (4, 4), 10 * i).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "name", quick(sorted(build.DATASETS.keys() - RUNS), lambda name: name != "omniglot")
)
def test_every_dataset_has_three_splits_that_fit_what_it_says_of_them(name, tmp_path):
    config = {"name": name, "shots": 1, "queries": 2, "eval_queries": 3}
    if name != "sinusoid":
        config["ways"] = 4
    if name == "image_folder":
        config |= dict.fromkeys(("train", "validation", "test"), str(grey_images(tmp_path)))
    elif name == "mini_imagenet":
        config |= {"folder": str(mini_imagenet(tmp_path)), "size": (4, 4)}
    else:
        skip_without(name)
        if name not in ("sinusoid", "cifar_fs", "fc100"):
            config["rotations"] = True
    data = build.splits(config)
    keys = jax.random.key(0), jax.random.key(0), jax.random.key(0)
    tasks = data.train, data.validation, data.test
    episodes = [jax.eval_shape(t.sample, key) for t, key in zip(tasks, keys, strict=True)]
    per_query = 1 if name == "sinusoid" else 4
    for episode, queries in zip(episodes, (2, 3, 3), strict=True):
        inputs, targets = episode.query
        assert inputs.shape == (queries * per_query, *data.inputs.shape[1:])
        assert targets.shape[0] == queries * per_query
    assert data.outputs == (1 if name == "sinusoid" else 4)


def test_training_runs_tell_the_inner_loop_wrong_labels_and_judge_by_right_ones():
    config = build.to_json(
        small("fds_digits", **{"dataset.validation": 20, "dataset.held_out": 0.0})
    )
    config = config["dataset"]
    data = build.splits(config)
    assert data.inputs.shape == (1, 8, 8, 1) and data.outputs == 10
    support, query = data.train.sample(jax.random.key(0))
    assert query[2].shape == (20,) and support[2].shape == (1280,)
    assert 0.25 < (support[1] != query[1]).mean() < 0.35
    final = data.test.sample(jax.random.key(0))
    assert final.support[2].shape == (1300,) and final.query[2].shape == (497,)
    assert (final.support[1] == support[1]).all()


def fds_config(**options):
    return {**build.to_json(small("fds_digits"))["algorithm"], **options}


def test_fds_is_built_with_what_is_learned_and_what_stays():
    made = build.algorithm(fds_config(augment="jitter"), model("mlp", "linen"))
    assert made.hyperparameters["learning_rate"].windows == 7
    assert made.augment is algorithms.AUGMENTATIONS["jitter"]
    windows = {"low": 0.0, "high": 1.0, "windows": [0, 3, 7], "start": [0.1, 0.2]}
    config = fds_config(hyperparameters={"momentum": windows})
    config["optimizer"] = {"name": "sgd", "learning_rate": 0.5}
    made = build.algorithm(config, model("mlp", "linen"))
    assert made.hyperparameters["momentum"].windows == (0, 3, 7)
    assert made.optimizer.keywords == {"learning_rate": 0.5}


@pytest.mark.parametrize(
    ("options", "table", "what"),
    [
        ({"optimizer": {"name": "x_y"}}, build.OPTIMIZERS, "optimizer"),
        ({"objective": "x_y"}, build.OBJECTIVES, "objective"),
        ({"augment": "x_y"}, algorithms.AUGMENTATIONS, "augmentation"),
    ],
)
def test_the_parts_of_fds_are_refused_by_name(options, table, what):
    known = ", ".join(sorted(table))
    with pytest.raises(ValueError, match=f"^No {what} is called 'x_y'. There are: {known}.$"):
        build.algorithm(fds_config(**options), None)


def test_the_outer_optimizer_of_fds_keeps_hyperparameters_in_their_ranges():
    learner = build.algorithm(fds_config(), model("mlp", "linen"))
    eta = learner.init(jax.random.key(0))
    far = {"name": "sgd", "learning_rate": 1e6, "schedule": "constant"}
    for config in (far, {"name": "fds_rule", "share": 9.0, "schedule": "linear", "guarded": False}):
        optimizer = build.outer_optimizer(config, 10, learner)
        down = jax.tree.map(jnp.ones_like, eta)
        state, value = optimizer.init(eta), jnp.asarray(1.0)
        updates, _ = optimizer.update(down, state, eta, value=value)
        lowest = {name: h.bounds()[0] for name, h in learner.hyperparameters.items()}
        for name, x in optax.apply_updates(eta, updates).items():
            assert jnp.allclose(x, lowest[name], rtol=1e-4)


def text_config(**options):
    return build.to_json(small("loss_weights_shakespeare", **options))


def test_a_text_trains_for_the_steps_of_training_and_is_evaluated_for_more():
    skip_without("text")
    lengths = {"dataset.inner_steps": 2, "dataset.eval_steps": 7, "dataset.eval_queries": 3}
    plain = text_config(**lengths)
    data = build.splits(plain["dataset"])
    key = jax.random.key(0)
    assert data.inputs.shape == (1, 8) and data.outputs == 256
    assert (data.train.train.tokens == data.test.train.tokens).all()
    for tasks, steps, queries in ((data.train, 2, 4), (data.validation, 7, 5), (data.test, 7, 5)):
        support, query = jax.eval_shape(tasks.sample, key)
        assert support.inputs.shape == (steps, 2, 8) and query.inputs.shape == (queries, 8)


@pytest.mark.parametrize("name", algorithms.WEIGHTINGS)
def test_every_weighting_builds_with_its_options(name):
    options = {"domains": 5} if name == "domain" else {"hidden": [3, 2]}
    made = algorithms.build_weighting({"name": name, "sources": None, **options})
    assert made == algorithms.WEIGHTINGS[name](
        **({"domains": 5} if name == "domain" else {"hidden": (3, 2)})
    )


@pytest.mark.parametrize(
    ("key", "table", "what"),
    [
        ("weighting", algorithms.WEIGHTINGS, "weighting"),
        ("squash", algorithms.SQUASHES, "squash"),
        ("normalize", algorithms.NORMALIZATIONS, "normalization"),
    ],
)
def test_the_parts_of_a_loss_weight_are_refused_by_name(key, table, what):
    config = text_config()["algorithm"]
    config[key] = {"name": "x_y"} if key == "weighting" else "x_y"
    known = ", ".join(sorted(table))
    with pytest.raises(ValueError, match=f"^No {what} is called 'x_y'. There are: {known}.$"):
        build.algorithm(config, None)


def test_an_option_that_a_weighting_has_not_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match="The weighting 'domain' has no option 'hidden'. It has:"):
        algorithms.build_weighting({"name": "domain", "domains": 2, "hidden": [3]})


def test_a_corrupted_share_of_zero_is_clean_text():
    config = {"share": 0.0, "kinds": ["random"], "probability": 0.5, "seed": 0}
    assert datasets.build_corruption(config) is None
    assert datasets.build_corruption({**config, "share": 0.2}).kinds == ("random",)


def test_a_model_and_an_optimizer_need_no_more_than_their_names():
    sized = splits("mlp")
    assert build.model({"name": "mlp", "hidden": [4]}, sized) == model("mlp", "linen")
    outer = build.outer_optimizer({"name": "sgd", "learning_rate": 0.5}, steps=3)
    updates, _ = outer.update(jnp.ones(()), outer.init(jnp.ones(())))
    assert updates == -0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 5}, "'stpes', which nothing reads. Did you mean 'steps'"),
        ({"isolat": True}, "Did you mean 'isolate'"),
        ({"faults": {"nonfinit": "skip"}}, "section faults has no option 'nonfinit'"),
        ({"wandb": {"projct": "mine"}}, "section wandb has no option 'projct'"),
    ],
)
def test_keys_of_a_config_file_that_nothing_reads_are_refused(change, message):
    plain = build.to_json(module("maml_sinusoid").get_config())
    build.check_keys({**plain, "notes_of_my_own": 1})
    with pytest.raises(ValueError, match=re.escape(message)):
        build.check_keys({**plain, **change})


def test_keys_of_sections_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match="section truncation has no option 'step'"):
        build.truncation({"steps": None, "step": 1})
    plain = build.to_json(module("maml_sinusoid").get_config())
    with pytest.raises(ValueError, match="'task'. Did you mean 'tasks'"):
        build.layout({**plain, "mesh": {"task": 1}})


def test_commands_that_try_every_engine_know_the_name_of_the_one_that_is_set():
    opened = build.with_open_engine({"engine": "auto", "engine_options": {"last": 2}})
    assert opened == {"engine": "mixed_flow", "engine_options": {}}
    with pytest.raises(ValueError, match="No engine is called 'revers'"):
        build.with_open_engine({"engine": "revers"})
