"""Which keys a name of a config takes: a mistake in them is explained before a call is made.

Changing a name alone, `--config.dataset.name=text`, leaves the keys of what was there before.
Python would answer with a KeyError, or a TypeError about an unexpected keyword.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from metalearn.experiments.cli.arguments import renamed

_REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_OURS = ("name", "parent", "rngs")  # what a library gives its modules, and no config does


class Keys(NamedTuple):
    """The keys of a part of a config, but for its name."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


_FEW_SHOT = ("ways", "shots", "queries", "eval_queries")
_TEXT = (
    "tfds",
    "feature",
    "held_out",
    "corruption",
    "length",
    "inner_steps",
    "eval_steps",
    "batch",
)
_COUNTS = ("queries", "eval_queries", "probes", "eval_probes")
_RUNS = ("tfds", "data_dir", "validation")
_ADAPTING = ("inner_steps", "eval_steps", "learned_rates", "first_order", "adapt", "batch_norm")
_FDS = ("optimizer", "objective", "augment", "hyperparameters", "inner_steps", "batch")

DATASETS = {
    "digits": Keys(_FEW_SHOT, ("rotations",)),
    "omniglot": Keys(_FEW_SHOT, ("partition", "rotations", "data_dir")),
    "sinusoid": Keys(("shots", "queries", "eval_queries")),
    "text": Keys((*_TEXT, *_COUNTS), ("pieces", "fresh")),
    "training_run": Keys((*_RUNS, "label_noise", "noise_seed"), ("held_out",)),
    "optimizer_runs": Keys((*_RUNS, "most"), ("held_out",)),
}
ALGORITHMS = {
    "fds": Keys(_FDS, ("eval_steps",)),
    "learned_optimizer": Keys(("rule", "problem", "batch", "inner_steps"), ("judge", "cap")),
    "learning_rates": Keys(("optimizer", "objective"), ("initial", "mean_over_examples")),
    "loss_weights": Keys(("optimizer", "weighting", "squash", "normalize", "through_features")),
    "maml": Keys(("optimizer", "objective"), _ADAPTING),
}


def check(what: str, given: Mapping[str, Any], keys: Keys) -> None:
    """Raise ValueError where a key is missing, or is none of these."""
    _refuse(what, given, list(keys.needed), [*keys.needed, *keys.optional])


def check_call(
    what: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    positional: int = 0,
    complete: bool = True,
) -> None:
    """Raise ValueError where a function cannot be called with these keywords.

    Args:
      what: for the message, such as "optimizer 'adam'".
      function: with a signature.
      given: the keywords.
      positional: how many arguments are given by place.
      complete: whether arguments without a default must be among them.
    """
    found = list(inspect.signature(function).parameters.values())[positional:]
    found = [p for p in found if p.kind not in _REST and p.name not in _OURS]
    needed = [p.name for p in found if p.default is inspect.Parameter.empty]
    _refuse(what, given, needed if complete else [], [p.name for p in found])


def _refuse(what: str, given: Mapping[str, Any], needed: list[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            hint = renamed(key, known)
            raise ValueError(f"The {what} has no option {key!r}.{hint} It has: {known}.")
    missing = [key for key in needed if key not in given]
    if missing:
        raise ValueError(
            f"The {what} needs {', '.join(missing)}, which this config does not set. Begin with a "
            "packaged config that is made for it."
        )
