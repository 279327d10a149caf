"""A learned optimizer for a small transformer, trained with truncated unrolls.

Reproduces   the optimizer of learned_optimizer_digits on text: a byte-level transformer of 2 layers
             and width 32 on tiny Shakespeare for T=100 steps. Validation and test runs train on
             text of their own split, with its last tenth as held-out text.
Command      metalearn train --config=learned_optimizer_shakespeare --workdir=runs/lo_shakespeare
             metalearn plan --config=learned_optimizer_shakespeare: memory and FLOPs by engine
             The dataset: tfds build tiny_shakespeare --file_format=array_record
Takes        16 minutes of CPU time on 2 cores
Expect       2.765 +- 0.026 mean training loss over 16 test runs of 100 steps (seed 0), 2.472 +-
             0.029 on held-out text; see docs/results.md
"""

import ml_collections
from ml_collections.config_dict import placeholder

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.learned_optimizer()
    config.chunk = 1

    config.algorithm.problem = "streamed"
    config.algorithm.batch = placeholder(int)  # the tasks have the batches
    config.algorithm.inner_steps = 100  # T, and dataset.inner_steps
    config.algorithm.cap = 8.0
    config.truncation.steps = 10  # K

    config.model = {"name": "transformer", "library": "linen", "remat": "block"}
    config.model.update({"width": 32, "layers": 2, "heads": 2})

    config.dataset = _common.shakespeare()
    config.dataset.fresh = True
    config.dataset.inner_steps = 100
    config.dataset.eval_steps = 100
    config.dataset.queries = 16
    config.dataset.eval_queries = 64

    config.optimizer.learning_rate = 3e-3
    config.tasks_per_step = 4
    config.steps = 200
    config.checkpoint_every = 50
    config.test_tasks = 16
    return config
