"""Weights of training examples on scikit-learn's digits, of which 30% have a wrong label.

Reproduces   the method of MAGIC (arXiv:2504.16430) and of metagradient descent
             (arXiv:2503.13751) at a size for a laptop: an MLP is trained for 200 steps on 900 of
             1,170 digits. The derivative of its loss on the 270 others, whose labels are right,
             with respect to a weight for each training example moves these weights between 0 and
             2. Each outer step draws another split, theta_0 and order. 130 further training
             images are held out for evaluations during training.
Command      metalearn train --config=data_weights_digits --workdir=runs/data_weights
             The scores of one run: metalearn attribute --config=data_weights_digits
Takes        22 s of CPU time on 2 cores, compilation included
Expect       0.95 test accuracy (0.945 +- 0.003, loss 0.203 +- 0.002; seed 0, ten final runs). With
             weights of one, the loss of the first outer step is 0.66
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "data_weights"
    config.algorithm.examples = 1170  # rows of the dataset: each has a weight
    config.algorithm.inner_steps = 200  # T
    # Large batches and a falling rate are what is smooth here; see docs/smoothness.md.
    config.algorithm.batch = 400
    config.algorithm.optimizer = {"name": "sgd", "learning_rate": 0.04, "momentum": 0.9}
    # The rate falls linearly to zero over so many steps; None: it is constant.
    config.algorithm.optimizer.decay_steps = 200
    config.algorithm.objective = "cross_entropy"
    config.algorithm.tokens = placeholder(int)  # weights of an example's tokens; None: one for all
    config.algorithm.bounds = (0.0, 2.0)  # of the weights

    config.model = {"name": "mlp", "library": "linen", "hidden": (64,)}

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "training_run"
    config.dataset.tfds = "digits"
    config.dataset.data_dir = placeholder(str)
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.validation = 270  # examples, drawn anew for each outer step
    config.dataset.held_out = 0.1  # share of the training split, for evaluations during training
    config.dataset.final_on_held_out = False  # whose examples have no weights
    config.dataset.label_noise = 0.3  # share of wrong labels in the inner loop
    config.dataset.noise_seed = 0

    config.optimizer.update({"name": "adam", "learning_rate": 0.2, "schedule": "constant"})
    config.tasks_per_step = 1

    config.steps = 10
    config.log_every = 1
    config.eval_every = 0
    config.checkpoint_every = 5
    config.test_tasks = 10  # runs from scratch on all the training data
    config.pictures = ("weights",)
    return config
