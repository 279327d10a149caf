"""What a sweep searches: ranges and choices of keys of a config, as a command line spells them.

    --sweep.optimizer.learning_rate="log(1e-4,1e-1)"   a number, its logarithm uniform
    --sweep.algorithm.optimizer.momentum="uniform(0,0.99)"
    --sweep.algorithm.inner_steps="int(1,5)"           an integer, both ends included
    --sweep.tasks_per_step="[4,8,16]"                  one of these; also choice(4,8,16)
    --sweep.model.name="[mlp,conv_net]"                names bring their own keys

A choice is written as it would be behind `--config.KEY=`, so that a tuple is one choice:
`[(32,),(64,64)]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from metalearn._utils.checks import nearest
from metalearn.experiments.cli import arguments, values

RANGES = ("log", "uniform", "int")
SPELLINGS = "log(1e-4,1e-1), uniform(0,1), int(1,8), or [a,b,c] (also choice(a,b,c))"
OPEN, CLOSE = "([{", ")]}"


class Parameter(NamedTuple):
    """A key of a config, and the values that are searched.

    Args:
      key: dotted, such as "optimizer.learning_rate".
      kind: "log", "uniform", "int" or "choice".
      low: the least value of a range; 0 for choices.
      high: the largest value of a range; 0 for choices.
      choices: as words of the command line; empty for a range.
    """

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def option(self) -> str:
        """Return the parameter as an option of the command line."""
        if self.kind == "choice":
            return f"--sweep.{self.key}=[{','.join(self.choices)}]"
        number = int if self.kind == "int" else float
        return f"--sweep.{self.key}={self.kind}({number(self.low)},{number(self.high)})"

    def points(self) -> list[Any] | None:
        """Return all values; None where there are infinitely many."""
        if self.kind == "choice":
            return list(self.choices)
        return list(range(int(self.low), int(self.high) + 1)) if self.kind == "int" else None


def parameter(key: str, text: str) -> Parameter:
    """Read the values of a key that a command line gives.

    >>> parameter("optimizer.learning_rate", "log(1e-4, 0.1)")
    Parameter(key='optimizer.learning_rate', kind='log', low=0.0001, high=0.1, choices=())
    >>> parameter("model.hidden", "[(32,),(64,64)]").choices
    ('(32,)', '(64,64)')

    Raises:
      ValueError: for another spelling, an empty or a reversed range, or repeated choices.
    """
    option, text = f"--sweep.{key}={text.strip()}", text.strip()
    if text.startswith("[") and text.endswith("]"):
        return _choice(key, option, text[1:-1])
    match = re.fullmatch(r"(\w+)\((.*)\)", text, re.DOTALL)
    if match and match[1] == "choice":
        return _choice(key, option, match[2])
    if match is None or match[1] not in RANGES:
        hint = nearest(match[1], (*RANGES, "choice")) if match else ""
        raise ValueError(f"{option} says no values to search.{hint} Write {SPELLINGS}.")
    return _range(key, option, match[1], match[2])


def _choice(key: str, option: str, text: str) -> Parameter:
    choices = tuple(part.strip() for part in split(text))
    if not choices:
        raise ValueError(f"{option} has no value to choose. Write some: --sweep.{key}=[a,b,c].")
    if len(set(choices)) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise ValueError(f"{option} has {twice} twice. Write each choice once.")
    return Parameter(key, "choice", choices=choices)


def _range(key: str, option: str, kind: str, text: str) -> Parameter:
    bounds = split(text)
    example = f"{kind}({'1,8' if kind == 'int' else '1e-4,1e-1'})"
    try:
        low, high = map(float, bounds)
    except ValueError as error:
        raise ValueError(f"{option} is a range from one number to another: {example}.") from error
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{option} has a bound that is not finite. Write two numbers: {example}.")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{option} is a range of integers, so both bounds are: {example}.")
    if low > high:
        flipped = ",".join(reversed(bounds))
        raise ValueError(f"{option} is reversed: its first bound is the larger. {kind}({flipped})?")
    if low == high:
        raise ValueError(
            f"{option} is empty: there is nothing between equal bounds. Set the one value with "
            f"--config.{key}={bounds[0].strip()}."
        )
    if kind == "log" and low <= 0:
        raise ValueError(
            f"{option} takes the logarithm of {bounds[0].strip()}, which is not above 0. Begin "
            f"above it, or write uniform({text})."
        )
    return Parameter(key, kind, low, high)


def split(text: str) -> list[str]:
    """Return the parts between commas that are in no brackets and no quotes.

    >>> split("(32,), (64, 64),'a,b'")
    ['(32,)', ' (64, 64)', "'a,b'"]
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in OPEN) - (character in CLOSE)
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts if text.strip() else []


def space(
    swept: Mapping[str, str],
    config: ml_collections.ConfigDict,
    fixed: Mapping[str, str],
    nullable: Callable[[ml_collections.ConfigDict, str], bool],
) -> list[Parameter]:
    """Read what is swept, and hold it against a config.

    Args:
      swept: the values of each `--sweep.KEY`, as text.
      config: that the trials begin with.
      fixed: what `--config.KEY` sets.
      nullable: says whether None is a value of a key.

    Raises:
      ValueError: for nothing to sweep, a key that is not there or that is set as well, values that
        the key does not take; and as `parameter`.
    """
    if not swept:
        raise ValueError(
            "A sweep needs at least one key to search, such as "
            f'--sweep.optimizer.learning_rate="log(1e-4,1e-1)". Write {SPELLINGS}.'
        )
    parameters = [parameter(key, text) for key, text in swept.items()]
    known = list(arguments.keys(config))
    for each in parameters:
        if each.key not in known:
            hint = arguments.renamed(each.key, known) or arguments.meant(each.key, known)
            raise ValueError(
                f"--sweep.{each.key}: the config has no such key.{hint} There are: "
                f"{', '.join(known)}."
            )
        if each.key in fixed:
            raise ValueError(
                f"{each.key} is swept, and set by --config.{each.key}={fixed[each.key]} too. "
                "Leave one of them out."
            )
        _check_type(each, config, nullable)
    return parameters


def _check_type(
    each: Parameter,
    config: ml_collections.ConfigDict,
    nullable: Callable[[ml_collections.ConfigDict, str], bool],
) -> None:
    kind = arguments.kind_of(config, each.key)
    for choice in each.choices:
        if not (choice in arguments.NONE and nullable(config, each.key)):
            values.check_text(each.key, choice, kind)
    if each.choices or kind is object:  # unset in a config of a run: of any type
        return
    if kind is int and each.kind != "int":
        raise ValueError(
            f"{each.option()}: {each.key} is an integer. Write int({math.ceil(each.low)},"
            f"{math.floor(each.high)}), or choices: [4,8,16]."
        )
    if kind not in (int, float):
        what = values.KINDS.get(kind, kind.__name__)
        raise ValueError(
            f"{each.option()}: {each.key} takes {what}, which has no range. Write choices: "
            f"--sweep.{each.key}=[a,b,c]."
        )
