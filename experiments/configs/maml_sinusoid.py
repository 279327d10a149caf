"""MAML on sinusoid regression, 10 shots.

Reproduces   Finn et al. 2017 (arXiv:1703.03400), section 5.1 and figure 3: after
             adaptation the wave fits; before it, about its own variance.
Command      metalearn train --config=maml_sinusoid --workdir=runs/maml_sinusoid
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.engine = "mixed_flow"

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "maml"
    config.algorithm.objective = "squared_error"
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.01}
    config.algorithm.inner_steps = 1
    config.algorithm.eval_steps = 10
    config.algorithm.learned_rates = ml_collections.config_dict.placeholder(float)
    config.algorithm.first_order = False
    config.algorithm.adapt = ""
    config.algorithm.batch_norm = "transductive"

    config.model = ml_collections.ConfigDict()
    config.model.name = "mlp"
    config.model.library = "linen"
    config.model.hidden = (40, 40)

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "sinusoid"
    config.dataset.shots = 10
    config.dataset.queries = 10
    config.dataset.eval_queries = 100

    config.optimizer = {"name": "adam", "learning_rate": 1e-3, "schedule": "constant"}
    config.tasks_per_step = 25
    config.chunk = ml_collections.config_dict.placeholder(int)

    config.steps = 70_000
    config.log_every = 100
    config.checkpoint_every = 5000
    config.eval_every = 5000
    config.eval_tasks = 600
    config.test_tasks = 600

    config.wandb = {"mode": "auto", "project": "metalearn", "name": "", "group": ""}
    return config
