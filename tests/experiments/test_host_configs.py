"""Data on the host, precision, low-rank terms and what is learned, said by keys of a config."""

import jax
import jax.numpy as jnp
import optax
import pytest

from metalearn import Trainer
from metalearn.algorithms import MAML
from metalearn.datasets import HostFewShot, HostHeldOut, HostText, HostTrainingRuns
from metalearn.experiments import build
from metalearn.models import LoRA, Precision
from metalearn.optimizers.master_weights import MasterWeights
from metalearn.tasks import draw_episode, fetched
from tests.helpers.checkpoints import bits
from tests.helpers.refusals import refused
from tests.helpers.small_configs import skip_without, small

KEY = jax.random.key(0)


def built(name, **overrides):
    """(trainer, splits) of a packaged config at a small size."""
    config = small(name, **overrides)
    skip_without(config.dataset.name, config.dataset.get("tfds"))
    plain = build.to_json(config)
    splits = build.splits(plain["dataset"])
    return build.trainer(plain, splits), splits


def data_read(trainer, tasks):
    """The bits of the episode of a task, read from the host where it is there."""
    keys = jax.random.split(KEY, 1)
    return bits(draw_episode(fetched(tasks, keys, 0, trainer.algorithm), keys[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("maml_digits", HostFewShot), ("learning_rates_shakespeare", HostText)],
)
def test_the_tasks_of_a_config_may_stay_on_the_host_with_the_same_bits(name, kind):
    trainer, device = built(name)
    _, host = built(name, **{"dataset.on": "host"})
    assert all(isinstance(each, kind) for each in (host.train, host.validation, host.test))
    assert host.outputs == device.outputs and host.inputs == device.inputs
    for ours, theirs in ((host.train, device.train), (host.test, device.test)):
        assert data_read(trainer, ours) == data_read(trainer, theirs)


@pytest.mark.slow
def test_training_runs_of_a_config_may_stay_on_the_host_and_learn_the_same():
    etas = []
    for on in ("device", "host"):
        trainer, splits = built("fds_digits", **{"dataset.on": on, "engine": "reverse"})
        etas.append(trainer.fit(splits.train, 1, key=KEY, progress=False).eta)
    assert isinstance(splits.train, HostTrainingRuns)
    assert isinstance(splits.validation, HostHeldOut) and isinstance(splits.test, HostHeldOut)
    assert bits(etas[0]) == bits(etas[1])


def test_runs_of_learned_optimizers_may_stay_on_the_host():
    _, splits = built("learned_optimizer_digits", **{"dataset.on": "host"})
    assert isinstance(splits.train, HostTrainingRuns) and splits.outputs == 10
    assert isinstance(splits.test, HostTrainingRuns)


@pytest.mark.parametrize("name", ["maml_digits", "fds_digits", "learned_optimizer_digits"])
def test_another_place_than_device_and_host_is_refused(name):
    with refused("No place of a dataset (dataset.on) is called 'disk'. There are: device, host."):
        built(name, **{"dataset.on": "disk"})


def test_a_corrupted_text_on_the_host_is_refused():
    with pytest.raises(
        ValueError, match=r"dataset.on='host' is for a text in one clean piece, .*pieces=64"
    ):
        built("loss_weights_shakespeare", **{"dataset.on": "host"})


@pytest.mark.slow
def test_low_rank_terms_precision_and_master_weights_are_keys_of_a_config():
    trainer, splits = built(
        "maml_digits",
        **{
            "lora.rank": 2,
            "lora.paths": "kernel",
            "precision.params": "bfloat16",
            "precision.compute": "bfloat16",
            "precision.master_weights": True,
            "algorithm.adapted": "^lora",
            "algorithm.learned": "lora|base",
        },
    )
    model = trainer.algorithm.model
    assert isinstance(model, Precision) and isinstance(model.model, LoRA)
    assert model.params == model.compute == jnp.bfloat16 and model.model.rank == 2
    assert (trainer.algorithm.adapted, trainer.algorithm.learned) == ("^lora", "lora|base")
    state = trainer.init(KEY, splits.train)
    leaves = jax.tree.leaves(state.eta.params)
    assert leaves and all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert isinstance(state.optimizer, MasterWeights)
    inner = trainer.algorithm.optimizer.init(state.eta.params)
    assert isinstance(inner, MasterWeights)


def test_hyperparameters_of_an_optimizer_with_master_weights_are_learned_as_ever():
    trainer, splits = built("fds_digits", **{"precision.master_weights": True})
    values = {name: 0.1 for name in trainer.algorithm.hyperparameters}
    places = trainer.algorithm._places()
    options = {name: values[name] for name, place in places.items() if place == "optimizer"}
    made = trainer.algorithm.optimizer(**options)
    assert isinstance(made.init({"w": jnp.zeros(2, jnp.bfloat16)}), MasterWeights)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "maml_digits",
            {"precision.compute": "half"},
            "No floating-point type (precision.compute) is called 'half'. There are: bfloat16, "
            "float16, float32.",
        ),
        (
            "maml_digits",
            {"lora.paths": "kernel"},
            "lora.paths='kernel' chooses matrices for low-rank terms, but lora.rank is not set: "
            "there are none. Set it, such as --config.lora.rank=4, or leave both.",
        ),
        (
            "maml_digits",
            {"precision.master_weights": True, "algorithm.learned_rates": 0.1},
            "precision.master_weights=True lets the inner optimizer sum its updates in float32, "
            "but the algorithm 'maml' multiplies the updates of its inner optimizer by learned "
            "rates, which must be the last thing that happens to them. Leave it False, and "
            "parameters in float32 (precision.params).",
        ),
        (
            "learned_optimizer_digits",
            {"precision.master_weights": True},
            "precision.master_weights=True lets the inner optimizer sum its updates in float32, "
            "but the algorithm 'learned_optimizer' has no inner optimizer in its config. Leave it "
            "False, and parameters in float32 (precision.params).",
        ),
    ],
)
def test_keys_that_say_nothing_that_can_be_are_refused(name, overrides, message):
    with refused(message):
        built(name, **overrides)


def test_configs_without_these_keys_are_built_as_ever():
    plain = build.to_json(small("maml_digits"))
    for key in ("precision", "lora"):
        del plain[key]
    del plain["algorithm"]["learned"], plain["dataset"]["on"]
    splits = build.splits(plain["dataset"])
    trainer = build.trainer(plain, splits)
    assert isinstance(trainer, Trainer) and isinstance(trainer.algorithm, MAML)
    assert isinstance(trainer.algorithm.optimizer, optax.GradientTransformation)
    assert not isinstance(trainer.algorithm.model, LoRA | Precision)
