"""FDS on CIFAR-10 with WRN-16-1, for a GPU.

Reproduces   the setting of figure 1 of Micaelli & Storkey 2021 (arXiv:2007.07869): seven windows
             of the learning rate, one of momentum and one of weight decay, batches of 256; here
             learned over runs of one epoch, and stretched over ten for the reported run. Of the
             50,000 training images 2,500 are held out for evaluations during training.
Command      metalearn train --config=fds_cifar10 --workdir=runs/fds_cifar10
             The dataset: tfds build cifar10 --file_format=array_record
             By the paper's own rule: --config.optimizer.guarded=False
             --config.optimizer.schedule=constant
Takes        not measured: hours on 2 CPU cores
Expect       0.89 test accuracy is what the paper reports after 50 epochs; not measured here
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.fds()

    config.algorithm.inner_steps = 176  # one epoch of the 45,125 images that a run trains on
    config.algorithm.eval_steps = 1950  # ten epochs of all
    config.algorithm.batch = 256
    config.algorithm.hyperparameters = {
        "learning_rate": {"low": 1e-3, "high": 1.0, "start": 0.05, "windows": 7, "space": "log"},
        "momentum": {"low": 0.0, "high": 1.0, "start": 0.5, "windows": 1, "space": "logit"},
        "weight_decay": {"low": 1e-6, "high": 1e-2, "start": 1e-4, "windows": 1, "space": "log"},
    }

    config.model = {"name": "wide_res_net", "library": "linen", "depth": 16, "width": 1}
    config.model.convolution = "lax"

    config.dataset.tfds = "cifar10"
    config.dataset.held_out = 0.05
    config.dataset.validation = 0.05  # share of the others, drawn anew for each outer step

    config.health = False
    config.steps = 10
    config.checkpoint_every = 1
    config.test_tasks = 3
    return config
