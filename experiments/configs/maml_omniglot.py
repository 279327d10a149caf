"""MAML on Omniglot, 5-way 1-shot.

Reproduces   Finn et al. 2017 (arXiv:1703.03400), table 1: 98.7 +- 0.4%, after 60,000 outer
             steps of 32 tasks. Here: Vinyals' split with rotated classes, 4 blocks of 64
             filters with strides, batch statistics, 1 inner step (3 in evaluation).
Command      metalearn train --config=maml_omniglot --workdir=runs/maml_omniglot
             The dataset: python -m metalearn.datasets.prepare omniglot
Takes        6 minutes on 2 CPU cores, for 4,000 outer steps of 16 tasks
Expect       0.955 test accuracy (0.955 +- 0.003, seed 0, 1,000 tasks of held-out characters); see
             docs/results.md. The paper's length is --config.steps=60000 --config.tasks_per_step=32
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.engine = "reverse"  # one inner step of a small network needs little memory

    config.model = {"name": "conv_net", "library": "linen", "filters": 64, "blocks": 4}

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "omniglot"
    config.dataset.partition = "vinyals"  # or "maml": 1,100 + 100 characters, 423 to test
    config.dataset.rotations = True
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.ways = 5
    config.dataset.shots = 1
    config.dataset.queries = 5
    config.dataset.eval_queries = 15

    config.steps = 4000
    config.log_every = 50
    config.checkpoint_every = 500
    config.eval_every = 500
    return config
