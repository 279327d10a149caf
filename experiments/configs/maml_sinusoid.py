"""MAML on sinusoid regression, 10 shots.

Reproduces   Finn et al. 2017 (arXiv:1703.03400), section 5.1 and figure 3: after
             adaptation the error is small; before it, about the variance of a wave.
Command      metalearn train --config=maml_sinusoid --workdir=runs/maml_sinusoid
Takes        a minute on 2 CPU cores
Expect       0.11 mean squared error on test waves after 10 steps (0.114 +- 0.011, seed 0,
             1,000 tasks); see docs/results.md
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.algorithm.objective = "squared_error"
    config.algorithm.optimizer.learning_rate = 0.01
    config.algorithm.eval_steps = 10

    config.model = {"name": "mlp", "library": "linen", "hidden": (40, 40)}

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "sinusoid"
    config.dataset.shots = 10
    config.dataset.queries = 10
    config.dataset.eval_queries = 100

    config.optimizer.schedule = "constant"
    config.tasks_per_step = 25

    config.steps = 70_000
    config.log_every = 100
    config.checkpoint_every = 5000
    config.eval_every = 5000
    return config
