"""MAML on scikit-learn's digits, 5-way 1-shot: the embedded default.

Reproduces   nothing published: a real few-shot problem that is there offline. The
             digits 0, 1, 6, 8, 9 and their quarter turns train, 3, 4, 7 are held out.
Command      make train        (or: metalearn train --config=maml_digits --workdir=...)
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.engine = "mixed_flow"  # or "reverse", or "forward" for a small eta

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
    config.model.filters = 32
    config.model.blocks = 3

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "digits"
    config.dataset.rotations = True
    config.dataset.ways = 5
    config.dataset.shots = 1
    config.dataset.queries = 5
    config.dataset.eval_queries = 15

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"}
    config.tasks_per_step = 16
    config.chunk = ml_collections.config_dict.placeholder(int)  # tasks at once; None: all

    config.steps = 2000
    config.log_every = 10
    config.checkpoint_every = 500
    config.eval_every = 500
    config.eval_tasks = 400  # on the validation classes, on the way
    config.test_tasks = 1000  # on the test classes, once, at the end

    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    return config
