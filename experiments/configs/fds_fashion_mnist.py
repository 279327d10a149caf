"""FDS on Fashion-MNIST: the schedule of SGD for LeNet, through 2,000 steps.

Reproduces   the method of Micaelli & Storkey 2021 (arXiv:2007.07869) on real images at a size for
             a CPU: seven windows of the learning rate, of momentum and of weight decay, 5% of the
             training images a fresh validation split for each outer step, and 5% held out from
             all of them for evaluations during training.
Command      metalearn train --config=fds_fashion_mnist --workdir=runs/fds_fashion
             The dataset: tfds build fashion_mnist --file_format=array_record
Takes        13 minutes on one CPU core with other work beside it (39 s a hypergradient on a free
             one)
Expect       0.875 test accuracy after two epochs (0.875 +- 0.001, loss 0.335 +- 0.006; seed 0,
             five final runs); validation loss 0.499 at the initial schedule. Measured with
             --config.dataset.held_out=0
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.fds()

    config.algorithm.inner_steps = 2000
    config.algorithm.eval_steps = placeholder(int)
    config.algorithm.batch = 64
    config.algorithm.hyperparameters = {
        "learning_rate": {"low": 1e-4, "high": 1.0, "start": 0.01, "windows": 7, "space": "log"},
        "momentum": {"low": 0.0, "high": 1.0, "start": 0.5, "windows": 7, "space": "logit"},
        "weight_decay": {"low": 1e-5, "high": 0.1, "start": 1e-3, "windows": 7, "space": "log"},
    }

    config.model = {"name": "le_net", "library": "linen", "convolution": "auto"}

    config.dataset.tfds = "fashion_mnist"
    config.dataset.held_out = 0.05
    config.dataset.validation = 0.05

    config.health = False  # the check takes as long as an outer step
    # Losses of fresh starts differ by about 0.01 where training is stable, and by far more at the
    # limit of stability: updates that raise the loss by more than 0.02 are reverted.
    config.optimizer.update({"share": 0.05, "tolerance": 0.02})
    config.steps = 12
    config.checkpoint_every = 1
    config.test_tasks = 5
    return config
