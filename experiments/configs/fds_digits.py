"""FDS on scikit-learn's digits: schedules of SGD's hyperparameters, with 30% wrong labels.

Reproduces   the method of Micaelli & Storkey 2021 (arXiv:2007.07869) at a size for a laptop: a
             small MLP is trained for 1,000 steps; seven windows of the learning rate, one of
             momentum and one of weight decay are learned from the middle of their ranges.
             A tenth of the training images is held out for evaluations during training.
Command      metalearn train --config=fds_digits --workdir=runs/fds
Takes        half a minute on 2 CPU cores, compilation included
Expect       0.94 test accuracy (0.944 +- 0.003, loss 0.537 +- 0.006; seed 0, ten final runs)
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.fds()

    config.algorithm.inner_steps = 1000
    config.algorithm.eval_steps = placeholder(int)  # the final run; None: `inner_steps`
    config.algorithm.batch = 64
    config.algorithm.hyperparameters = {
        "learning_rate": {"low": 1e-4, "high": 1.0, "start": 0.01, "windows": 7, "space": "log"},
        "momentum": {"low": 0.0, "high": 1.0, "start": 0.5, "windows": 1, "space": "logit"},
        "weight_decay": {"low": 1e-5, "high": 0.1, "start": 1e-3, "windows": 1, "space": "log"},
    }

    config.model = {"name": "mlp", "library": "linen", "hidden": (64,)}

    config.dataset.tfds = "digits"
    config.dataset.validation = 400  # examples, drawn anew for each outer step
    config.dataset.label_noise = 0.3  # share of wrong labels in the inner loop

    config.steps = 10
    config.checkpoint_every = 5
    config.test_tasks = 10  # runs from scratch on all the training data
    config.pictures = ("schedules", "tangents")
    return config
