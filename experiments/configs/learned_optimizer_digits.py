"""A learned optimizer for small networks on digits, trained with truncated unrolls.

Reproduces   the per-parameter MLP of Metz et al. 2022 (arXiv:2203.11860) on top of a learned
             Adam, as in Harrison et al. 2022 (arXiv:2209.11208): an MLP of 32 hidden units on
             scikit-learn's digits for T=200 steps, its mean training loss as the outer loss.
             Meta-training uses neither the images of the test runs, nor the fifth of the training
             split on which the runs of evaluations during training are.
Command      metalearn train --config=learned_optimizer_digits --workdir=runs/learned_optimizer
             python -m metalearn.experiments.benchmarks.learned_optimizer runs/learned_optimizer
Takes        4 to 6 minutes on 2 CPU cores, a minute or two of it compilation
Expect       0.085 mean training loss on test runs (0.085 +- 0.004 over 5 seeds), where Adam has
             0.128 and SGD with momentum 0.173, each at its best of 21 learning rates. Measured
             with --config.dataset.held_out=0
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.learned_optimizer()

    config.algorithm.inner_steps = 200  # T
    config.algorithm.batch = 64
    config.truncation.steps = 20  # K

    config.model = {"name": "mlp", "library": "linen", "hidden": (32,)}

    config.dataset.tfds = "digits"
    config.dataset.validation = 100  # validation examples of a run

    config.optimizer.learning_rate = 3e-3
    config.tasks_per_step = 8
    config.steps = 500
    config.checkpoint_every = 100
    config.log_every = 10
    config.test_tasks = 32  # runs from scratch, on images of the test split
    return config
