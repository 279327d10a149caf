"""R2-D2 with a residual network of 12 layers on FC100, 5-way 5-shot.

Reproduces   Lee et al. 2019 (arXiv:1904.03758), table 2: 55.3 +- 0.6% by ridge regression on this
             network (MetaOptNet-RR). Theirs trains with 15 shots, and SGD with Nesterov's momentum
             whose rate falls in steps; with DropBlock, augmentation and label smoothing, which are
             not here. Tasks to train on have 5 shots here, and the rate falls by a cosine
Command      metalearn train --config=r2d2_fc100 --workdir=runs/fc100
             The dataset: tfds build cifar100 --file_format=array_record
             4 blocks of 64 filters: --config.model.name=conv_net
Takes        not measured; made for a GPU: days on 2 CPU cores
Expect       not measured
"""

import ml_collections

from metalearn.experiments.configs import protonet_cifar_fs


def get_config() -> ml_collections.ConfigDict:
    config = protonet_cifar_fs.get_config()
    config.algorithm.update({"name": "r2d2", "penalty": 1.0, "scale": 10.0})

    config.model = {"name": "res_net12", "library": "linen"}
    config.model.filters = (64, 160, 320, 640)

    config.dataset.name = "fc100"

    config.optimizer.update({"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})
    config.optimizer.update({"nesterov": True, "weight_decay": 5e-4, "schedule": "cosine"})
    config.tasks_per_step = 8

    config.steps = 60_000
    return config
