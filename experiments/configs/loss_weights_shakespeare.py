"""Learned loss weights on tiny Shakespeare with half of the training text corrupted.

Reproduces   nothing published; the experiment of Ren et al. 2018 (arXiv:1803.09050) and Shu et
             al. 2019 (arXiv:1902.07379), noise in the training data and a small clean set, on a
             language model, the setting of Kemaev et al. 2025 (arXiv:2505.00793). Half of 64
             pieces are corrupted: noise (each byte replaced with probability 1/2), with a large
             loss, or one byte repeated, with a small one. A network on the mean and the spread
             of an example's loss learns their weights, over 24 steps from scratch.
Command      metalearn train --config=loss_weights_shakespeare --workdir=runs/loss_weights
             The dataset: tfds build tiny_shakespeare --file_format=array_record
             Against uniform weights: python -m metalearn.experiments.benchmarks.loss_weights
Takes        2.5 minutes on 2 CPU cores (other work beside it), 160 outer steps and 4 test runs
Expect       1.00 AUC of the weights, clean against corrupted windows of the test split, and a
             test loss of 2.41 +- 0.03 nats a byte after 400 steps (seed 0, 4 trainings). Over
             5 seeds: learned 2.41, uniform 2.55, only the clean half 2.29
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.chunk = 1  # a single task per chunk is fastest on a CPU

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "loss_weights"
    config.algorithm.optimizer = {"name": "adam", "learning_rate": 1e-2, "eps_root": 1e-6}
    config.algorithm.weighting = {  # its options; see its docstring
        "name": "example",  # or "token", or "domain" with domains=64
        "features": placeholder(tuple),
        "hidden": placeholder(tuple),
        "sources": placeholder(int),
        "domains": placeholder(int),
    }
    config.algorithm.squash = "unbounded"  # "bounded" limits the ratio of weights; see weighting.py
    config.algorithm.normalize = "mean_one"  # or "none"
    config.algorithm.through_features = False

    config.model = {"name": "transformer", "library": "linen"}
    config.model.update({"width": 32, "layers": 2, "heads": 2})

    config.dataset = _common.shakespeare()
    config.dataset.inner_steps = 24  # T
    config.dataset.eval_steps = 400  # far beyond the horizon of meta-training
    config.dataset.pieces = 64
    config.dataset.queries = 64
    config.dataset.probes = 64
    config.dataset.eval_queries = 256
    config.dataset.eval_probes = 256
    config.dataset.corruption.share = 0.5
    config.dataset.corruption.kinds = ("replaced", "repeated")

    # The meta-gradient of a task is noisy and sometimes huge: a short memory for Adam's b2.
    config.optimizer.update({"name": "adam", "learning_rate": 0.02, "b2": 0.9})
    config.optimizer.schedule = "constant"
    config.tasks_per_step = 1

    config.steps = 160
    config.log_every = 10
    config.checkpoint_every = 40
    config.eval_every = 0
    config.eval_tasks = 2
    config.test_tasks = 4
    return config
