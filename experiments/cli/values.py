"""The values of a config: of the type that their key takes, and such that JSON can keep them.

A value comes from the command line as text, from a JSON file, or from a config file, which is
Python. The first two are held against the type of the key they are for, and refused by key,
value and type. All three become JSON in a run's checkpoints, which has neither NaN nor
infinity, and most are sizes and counts, which compiled programs hold as 32-bit integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections.config_flags import tuple_parser

from metalearn._utils import strict_json
from metalearn._utils.checks import MOST_TASKS

KINDS: dict[type, str] = {
    int: "an integer, such as 3",
    float: "a number, such as 0.1",
    bool: "true or false",
    str: "text",
    tuple: 'a tuple, such as (32, 32) or ("a", "b"), in quotes where a shell reads it',
}
PARSERS: dict[type, Any] = {  # as ml-collections reads them
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    tuple: tuple_parser.TupleParser(),
}
LARGEST = 2**31 - 1
WIDE = ("seed", "engine_options.budget")  # a seed has 64 bits, and a budget is in bytes
LEAST = {  # mostly of what a run uses late: better refused before hours of training than after
    "seed": 0,  # see `metalearn.experiments.build.key_of`
    "steps": 0,
    "log_every": 0,
    "eval_every": 0,
    "check_every": 0,
    "checkpoint_every": 0,
    "checkpoint_keep": 1,
    "eval_tasks": 1,
    "test_tasks": 1,
}


MOST = dict.fromkeys(("tasks_per_step", "eval_tasks", "test_tasks"), MOST_TASKS)


def check_text(key: str, text: str, kind: type) -> None:
    """Raise ValueError unless a word of the command line can be read as a type."""
    if kind not in PARSERS:
        return
    try:
        PARSERS[kind].parse(text)
    except (TypeError, ValueError, MemoryError, RecursionError) as error:
        raise _refused(key, text, kind) from error


def from_json(key: str, value: Any, kind: type, unset: bool) -> Any:
    """Return a JSON value as the type that a key takes.

    Args:
      key: for the message.
      value: what `json.loads` made of it.
      kind: int, float, bool, str or tuple.
      unset: whether the config leaves the key unset (None), so that null may too.

    Raises:
      ValueError: if it is of another type. An integer is a number too, a boolean is neither.
    """
    if value is None and unset:
        return None
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is float and type(value) is int:
        return _as_float(key, value)
    if type(value) is not kind:
        raise _refused(key, value, kind)
    return value


def _as_float(key: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"config.{key} is larger than any floating-point number.") from error


def _refused(key: str, value: Any, kind: type) -> ValueError:
    takes = KINDS.get(kind, kind.__name__)
    return ValueError(f"config.{key} takes {takes}, not {value!r}.")


def check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number of a config that no run can use."""
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"config.{key} is {value}, but a run keeps its config as JSON, which has finite "
                "numbers alone. Write a large one, or leave unset what can be."
            )
        if isinstance(value, bool) and (key in LEAST or key in MOST):
            raise _refused(key, value, int)
        if isinstance(value, int) and value < LEAST.get(key, value):
            raise ValueError(f"config.{key} is {value}, but it is {LEAST[key]} or more.")
        most = 2**63 - 1 if key in WIDE else MOST.get(key, LARGEST)
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(
                f"config.{key} is {value!s:.80}, but integers go up to {most}. Take a smaller one."
            )


def leaves(config: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested mappings and lists."""
    if isinstance(config, Mapping):
        parts: Iterable[tuple[Any, Any]] = config.items()
    elif isinstance(config, list | tuple):
        parts = enumerate(config)
    else:
        yield key, config
        return
    for name, value in parts:
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def to_json(config: Any) -> dict[str, Any]:
    """Return an ml-collections config as plain JSON values (tuples become lists)."""
    try:
        plain = strict_json.parse(config.to_json(), "The config", nonfinite=True)
    except (TypeError, RecursionError) as error:
        raise ValueError(
            "A run keeps its config as JSON, and this one holds what JSON does not: "
            f"{str(error).partition('. Instead')[0]}. Write numbers, texts, true, false and tuples "
            "of those."
        ) from error
    check(plain)
    return plain
