"""MAML on mini-ImageNet, 5-way 1-shot, from a folder of images that you have.

Reproduces   Finn et al. 2017 (arXiv:1703.03400), table 1: 48.70 +- 1.84% with the split of Ravi and
             Larochelle. Their network, 4 blocks of 32 filters with max-pooling, on images of 84 x
             84; 5 inner steps of 0.01, 10 in evaluation; 60,000 outer steps of 4 tasks with 15
             queries a class. Batch statistics, as theirs. 64 filters: --config.model.filters=64
Command      metalearn train --config=maml_mini_imagenet --workdir=runs/mini_imagenet
             The dataset: data/mini_imagenet/CLASS/IMAGE.jpg or data/mini_imagenet/train/CLASS/...,
             classes by their WordNet numbers; elsewhere: --config.dataset.folder=FOLDER
Takes        not measured; made for a GPU: days on 2 CPU cores
Expect       not measured
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.algorithm.optimizer.learning_rate = 0.01
    config.algorithm.inner_steps = 5
    config.algorithm.eval_steps = 10

    config.model = {"name": "conv_net", "library": "linen"}
    config.model.update({"filters": 32, "blocks": 4, "pool": True})

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "mini_imagenet"
    config.dataset.folder = "data/mini_imagenet"
    config.dataset.size = (84, 84)
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.ways = 5
    config.dataset.shots = 1
    config.dataset.queries = 15
    config.dataset.eval_queries = 15

    config.optimizer.schedule = "constant"
    config.tasks_per_step = 4

    config.steps = 60_000
    config.log_every = 50
    config.checkpoint_every = 1000
    config.checkpoint_best = "max eval/accuracy"
    config.eval_every = 1000
    return config
