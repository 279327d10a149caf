"""MAML on Omniglot, 5-way 1-shot.

Reproduces   Finn et al. 2017 (arXiv:1703.03400), table 1: 98.7 +- 0.4%, after 60,000 outer
             steps of 32 tasks. Here: Vinyals' split with rotated classes, 4 blocks of 64
             filters with strides, batch statistics, 1 inner step (3 in evaluation).
Command      metalearn train --config=maml_omniglot --workdir=runs/maml_omniglot
             The dataset: python -m metalearn.datasets.prepare omniglot
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.engine = "reverse"  # one inner step of a small net: nothing to save

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "maml"
    config.algorithm.objective = "cross_entropy"
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.4}
    config.algorithm.inner_steps = 1
    config.algorithm.eval_steps = 3
    config.algorithm.learned_rates = ml_collections.config_dict.placeholder(float)
    config.algorithm.first_order = False
    config.algorithm.adapt = ""
    config.algorithm.batch_norm = "transductive"

    config.model = ml_collections.ConfigDict()
    config.model.name = "conv_net"
    config.model.library = "linen"
    config.model.filters = 64
    config.model.blocks = 4

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "omniglot"
    config.dataset.partition = "vinyals"  # or "maml": 1,200 characters to train, 423 to test
    config.dataset.rotations = True
    config.dataset.ways = 5
    config.dataset.shots = 1
    config.dataset.queries = 5
    config.dataset.eval_queries = 15

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"}
    config.tasks_per_step = 16
    config.chunk = 1  # tasks at once: 1 is fastest on a CPU; on a GPU take all, 16

    config.steps = 20_000
    config.log_every = 50
    config.checkpoint_every = 1000
    config.eval_every = 1000
    config.eval_tasks = 400  # on the validation classes, on the way
    config.test_tasks = 1000  # on the test classes, once, at the end

    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    return config
