"""The command line, called in this process, and a run that is short."""

import sys

import pytest
from absl import flags

from metalearn.experiments.main import main

SINUSOID = (
    *("train", "--config=maml_sinusoid", "--config.steps=2", "--config.test_tasks=4"),
    *("--config.eval_every=1", "--config.eval_tasks=4", "--config.log_every=1"),
    *("--config.tasks_per_step=2", "--config.engine=reverse", "--config.wandb.mode=disabled"),
    "--config.health=False",  # a program more to compile; diagnostics/test_health.py has it on
)


def call(*words: object) -> int:
    """Call `main` as a process would: once, with flags that nothing has touched."""
    argv = ["metalearn", *map(str, words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # ml-collections looks for overrides there
        try:
            return main(argv)
        finally:
            flags.FLAGS.unparse_flags()
            for name in [name for name in flags.FLAGS if name.startswith("config.")]:
                delattr(flags.FLAGS, name)
