"""MAML on scikit-learn's digits, 5-way 1-shot: the embedded default.

Reproduces   nothing published: a real few-shot problem that works offline. The
             digits 0, 1, 6, 8, 9 and their quarter turns train, 3, 4, 7 are held out.
Command      make train        (or: metalearn train --config=maml_digits --workdir=...)
Takes        half a minute on 2 CPU cores, compilation included
Expect       0.83 test accuracy (0.828 +- 0.005, seed 0, 1,000 tasks); see docs/results.md
"""

import ml_collections

from metalearn.experiments.configs import _common


def get_config() -> ml_collections.ConfigDict:
    config = _common.maml()

    config.model = {"name": "conv_net", "library": "linen", "filters": 32, "blocks": 3}

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "digits"
    config.dataset.rotations = True
    config.dataset.on = "device"  # or "host": see docs/data.md
    config.dataset.ways = 5
    config.dataset.shots = 1
    config.dataset.queries = 5
    config.dataset.eval_queries = 15

    config.steps = 2000
    config.checkpoint_every = 500
    config.eval_every = 500
    return config
