"""What the packaged MAML configs share; each sets what its experiment is about."""

import ml_collections
from ml_collections.config_dict import placeholder


def maml() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.engine = "mixed_flow"  # or "reverse", or "forward" for a small eta

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "maml"
    config.algorithm.objective = "cross_entropy"
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.4}  # the inner one
    config.algorithm.inner_steps = 1
    config.algorithm.eval_steps = 3
    config.algorithm.learned_rates = placeholder(float)  # Meta-SGD: their initial value
    config.algorithm.first_order = False
    config.algorithm.adapt = ""  # ANIL: "head"
    config.algorithm.batch_norm = "transductive"

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine"}
    config.tasks_per_step = 16
    config.chunk = placeholder(int)  # tasks unrolled at once; None: all of a step's

    config.log_every = 10
    config.eval_tasks = 400  # validation tasks, on the way
    config.test_tasks = 1000  # test tasks, once, at the end
    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    return config
