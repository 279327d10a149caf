"""One learned learning rate per parameter, for a language model trained from scratch.

Reproduces   the first task of Kemaev et al. 2025 (arXiv:2505.00793), at a size for a CPU: the
             inner loop trains a byte-level transformer with Adam for 32 steps on tiny
             Shakespeare, from a fresh start each time; the outer loss is held-out text.
Command      metalearn train --config=learning_rates_shakespeare --workdir=runs/learning_rates
             The dataset: tfds build tiny_shakespeare --file_format=array_record
Takes        4 minutes on 2 CPU cores
Expect       2.76 test loss after 32 steps (2.760 +- 0.008, seed 0, 100 fresh starts)
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()
    config.chunk = 1

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "learning_rates"
    config.algorithm.objective = "cross_entropy"
    config.algorithm.optimizer = {
        "name": "adam",
        "eps_root": 1e-8,
    }  # its learning rates are learned
    config.algorithm.initial = 3e-3
    config.algorithm.mean_over_examples = True  # allows `micro_batches`

    config.model = {"name": "transformer", "library": "linen", "remat": "block"}
    config.model.update({"width": 32, "layers": 2, "heads": 2})

    config.dataset = _common.shakespeare()
    config.dataset.inner_steps = 32  # T
    config.dataset.eval_steps = 32
    config.dataset.queries = 32
    config.dataset.eval_queries = 128

    config.optimizer.update({"name": "adam", "learning_rate": 0.05, "schedule": "cosine"})
    config.tasks_per_step = 2

    config.steps = 200
    config.checkpoint_every = 50
    config.eval_every = 50
    config.eval_tasks = 20
    config.test_tasks = 100
    return config
