"""From a config to objects: a table for each kind of name, and nothing clever.

Config objects stop here; what these functions return takes plain arguments. A name that is in no
table is refused with the names that are, and a key that its name does not take with the keys that
it takes (`registry`).
"""

from metalearn.experiments.build.algorithms import ALGORITHMS, algorithm, sized_for
from metalearn.experiments.build.datasets import DATASETS, Sizes, Splits, splits
from metalearn.experiments.build.models import LIBRARIES, model
from metalearn.experiments.build.registry import (
    ENGINES,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    optimizer,
)
from metalearn.experiments.build.trainers import (
    check_keys,
    engine,
    evaluation_layout,
    idle_devices,
    key_of,
    layout,
    outer_optimizer,
    set_options,
    trainer,
    truncation,
    with_open_engine,
)
from metalearn.experiments.cli.values import to_json

__all__ = [
    "ALGORITHMS",
    "DATASETS",
    "ENGINES",
    "LIBRARIES",
    "OBJECTIVES",
    "OPTIMIZERS",
    "SCHEDULES",
    "Sizes",
    "Splits",
    "algorithm",
    "check_keys",
    "engine",
    "evaluation_layout",
    "idle_devices",
    "key_of",
    "layout",
    "model",
    "optimizer",
    "outer_optimizer",
    "set_options",
    "sized_for",
    "splits",
    "to_json",
    "trainer",
    "truncation",
    "with_open_engine",
]
