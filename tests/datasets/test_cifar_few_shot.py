"""CIFAR-FS and FC100: disjoint splits of CIFAR-100, read where a part of it is prepared."""

import itertools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalearn import Trainer
from metalearn.algorithms import ProtoNet
from metalearn.datasets import DatasetNotPreparedError, FewShot, cifar_fs, fc100
from metalearn.datasets.cifar_few_shot import class_names
from metalearn.experiments import build
from metalearn.models import Linen, train_flag
from metalearn.models.linen_networks import ResNet12
from tests.helpers.small_configs import small

SPLITS = ("train", "validation", "test")
# A part of CIFAR-100, beside the datasets that are there in full.
SUBSET = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "nowhere")).parent / "tfds_subset"
with_subset = pytest.mark.skipif(
    not (SUBSET / "cifar100").is_dir(), reason="no part of CIFAR-100 is prepared"
)


@pytest.mark.parametrize(("dataset", "sizes"), [("cifar_fs", (64, 16, 20)), ("fc100", (12, 4, 4))])
def test_the_splits_are_disjoint_and_complete(dataset, sizes):
    names = [class_names(dataset, split) for split in SPLITS]
    assert tuple(map(len, names)) == sizes
    together = set(itertools.chain(*names))
    assert len(together) == sum(sizes)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="No split is called 'val'"):
        cifar_fs("val")


def test_a_missing_dataset_is_refused_with_the_command_that_prepares_it(tmp_path):
    with pytest.raises(DatasetNotPreparedError, match="cifar100"):
        fc100(data_dir=str(tmp_path))


@with_subset
@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "sizes"), [(cifar_fs, (64, 16, 20)), (fc100, (60, 20, 20))], ids=["cifar_fs", "fc100"]
)
def test_every_class_of_a_split_is_read_with_all_of_its_images(read, sizes):
    indices = [read(split, data_dir=str(SUBSET)) for split in SPLITS]
    assert tuple(len(index.counts) for index in indices) == sizes
    for index in indices:
        assert index.examples.shape[2:] == (32, 32, 3) and index.examples.dtype == np.uint8
        assert (index.counts == 60).all()  # 50 and 10 of the part; 500 and 100 of CIFAR-100


@with_subset
@pytest.mark.slow
def test_a_residual_network_takes_a_step_on_the_images():
    tasks = FewShot.create(cifar_fs(data_dir=str(SUBSET)), ways=2, shots=1, queries=1)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = Linen(ResNet12(None, filters=(8, 8, 8, 8)), image, train_flag)
    trainer = Trainer(ProtoNet(model, 2), optimizer=optax.adam(1e-3), tasks_per_step=1)
    _, metrics = trainer.step(trainer.init(jax.random.key(0)), tasks)
    assert all(np.isfinite(value) for value in metrics.values())


@with_subset
@pytest.mark.slow
@pytest.mark.parametrize("name", ["protonet_cifar_fs", "r2d2_fc100"])
def test_a_packaged_config_takes_a_step_on_the_images(name):
    """With the network of the literature, narrower; no number of the part is a result."""
    config = small(name, **{"dataset.data_dir": str(SUBSET), "dataset.shots": 1})
    plain = build.to_json(config)
    splits = build.splits(plain["dataset"])
    assert splits.inputs.shape == (1, 32, 32, 3)
    trainer = build.trainer(plain, splits)
    state, metrics = trainer.step(trainer.init(jax.random.key(0), splits.train), splits.train)
    assert int(state.step) == 1 and all(np.isfinite(value) for value in metrics.values())
    accuracy = trainer.evaluate(state.eta, splits.test, jax.random.key(1), 2)["accuracy"]
    assert 0 <= accuracy.mean <= 1


def test_configs_name_them():
    assert {"cifar_fs", "fc100"} <= set(build.DATASETS)
