"""ProtoNet on CIFAR-FS, 5-way 5-shot, with 4 blocks of 64 filters.

Reproduces   Snell et al. 2017 (arXiv:1703.05175) as Bertinetto et al. 2019 (arXiv:1805.08136) ran
             it on this division of CIFAR-100: 72.0 +- 0.6%. Tasks to train on have 5 classes too,
             where the former take 20 to 60; batch statistics of support and query set apart
Command      metalearn train --config=protonet_cifar_fs --workdir=runs/cifar_fs
             The dataset: tfds build cifar100 --file_format=array_record
             1 shot: --config.dataset.shots=1
             A residual network of 12 layers: --config.model.name=res_net12
Takes        not measured; made for a GPU: hours on 2 CPU cores
Expect       not measured
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.engine = "reverse"  # there are no inner steps
    config.algorithm = {"name": "protonet", "objective": "cross_entropy"}
    config.algorithm.batch_norm = "transductive"

    config.model = {"name": "conv_net", "library": "linen"}
    config.model.update({"filters": 64, "blocks": 4, "pool": True})
    config.model.convolution = "lax"  # no task adapts a kernel

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "cifar_fs"
    config.dataset.data_dir = placeholder(str)
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.ways = 5
    config.dataset.shots = 5
    config.dataset.queries = 15
    config.dataset.eval_queries = 15

    config.tasks_per_step = 4

    config.steps = 20_000
    config.log_every = 50
    config.checkpoint_every = 1000
    config.checkpoint_best = "max eval/accuracy"
    config.eval_every = 1000
    return config
