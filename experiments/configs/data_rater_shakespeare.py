"""A rater of training text on tiny Shakespeare, half of which is corrupted.

Reproduces   the method of Calian et al. 2025, DataRater (arXiv:2505.17895), on the text of
             `loss_weights_shakespeare`: half of 64 pieces are corrupted, by noise or by one byte
             repeated. A transformer without a causal mask scores windows; inner steps weight those
             of a batch by a softmax of their scores. As in the paper, truncated unrolls of two
             steps, eight inner models of different ages, and an Adam for each of them.
Command      metalearn train --config=data_rater_shakespeare --workdir=runs/data_rater
             The scores of all windows, and the best half of them:
             metalearn attribute --workdir=runs/data_rater --fraction=0.5
             The dataset: tfds build tiny_shakespeare --file_format=array_record
             Training on the best half: python -m metalearn.experiments.benchmarks.data_rater
Takes        about 2 minutes of CPU time on 2 cores, compilation included, without the test runs
Expect       0.996 AUC of the scores, clean against corrupted windows of the training text
             (seed 0); of the best half 97.1% are clean, of all 50%. No test loss is measured
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "data_rater"
    config.algorithm.optimizer = {"name": "adam", "learning_rate": 1e-2, "eps_root": 1e-8}
    config.algorithm.rater = {"name": "text", "width": 32, "layers": 1, "heads": 2}

    config.model = {"name": "transformer", "library": "linen"}
    config.model.update({"width": 32, "layers": 2, "heads": 2})

    config.dataset = _common.shakespeare()
    config.dataset.inner_steps = 100  # T, the lifetime of an inner model
    config.dataset.eval_steps = 400
    config.dataset.pieces = 64
    config.dataset.queries = 16
    config.dataset.probes = 16
    config.dataset.eval_queries = 256
    config.dataset.eval_probes = 256
    config.dataset.corruption.share = 0.5
    config.dataset.corruption.kinds = ("replaced", "repeated")

    config.truncation.steps = 2  # K
    config.truncation.transform = "optax.scale_by_adam"
    config.optimizer.update({"name": "sgd", "learning_rate": 3e-3, "schedule": "constant"})
    config.tasks_per_step = 8

    config.steps = 40
    config.log_every = 10
    config.checkpoint_every = 20
    config.eval_every = 0
    config.eval_tasks = 2
    config.test_tasks = 4
    return config
