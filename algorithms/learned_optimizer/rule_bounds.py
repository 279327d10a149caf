"""How large a rule in a file may be: no larger than the weights beside it.

A rule is a few lines of JSON, and what it stands for can be large: a list of 20,000 widths is
60 kB, and a network of 20,000 layers takes minutes to build. But every layer has its weights in
the file, and every width is the length of one of them. So a rule is weighed before anything is
built of it: what is built, and the time it takes, is then in proportion to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

DEEPEST = 64  # lists and objects within each other: a rule on top of three others has about 20
LONGEST = 1000  # characters of a name
SPARE = 16  # layers without weights that are still built, so that what is missing can be named


def check_bounds(what: str, rule: str, weights: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError where a rule is larger than the weights that are to be its own.

    Args:
      what: where it is from, for the message.
      rule: as JSON. What is no rule is left to `rule_json.decode`.
      weights: arrays by path.
    """
    try:
        found = json.loads(rule)
    except RecursionError as error:
        raise _too_deep(what) from error
    except ValueError:
        return
    largest = max((array.size for array in weights.values()), default=0)
    layers, width = 0, 0
    waiting = [(found, 1)]
    while waiting:
        part, depth = waiting.pop()
        if depth > DEEPEST:
            raise _too_deep(what)
        if isinstance(part, str) and len(part) > LONGEST:
            raise _too_long(what, len(part))
        inside = part if isinstance(part, list) else []
        if isinstance(part, dict):
            if (longest := max(map(len, part), default=0)) > LONGEST:
                raise _too_long(what, longest)
            inside = list(part.values())
            more, wide = _network(part)
            layers, width = layers + more, max(width, wide)
        waiting += [(value, depth + 1) for value in inside]
    if layers > len(weights) + SPARE:
        raise ValueError(
            f"{what} holds {len(weights)} arrays, and a rule whose networks have {layers} layers, "
            "each with a matrix and a bias. It was not written by `save_optimizer`."
        )
    if width > largest:
        raise ValueError(
            f"{what} holds arrays of {largest} numbers at most, and a rule with a network that is "
            f"{width} wide. It was not written by `save_optimizer`."
        )


def _network(part: Mapping[str, Any]) -> tuple[int, int]:
    """Return (layers, the largest width) of a part of a rule, where it is a network of ours."""
    fields = part.get("fields")
    if part.get("class") not in ("PointwiseMLP", "PointwiseGRU") or not isinstance(fields, dict):
        return 0, 0
    hidden = fields.get("hidden", [])
    widths = hidden if isinstance(hidden, list) else [hidden]
    return len(widths) + 1, max((n for n in widths if isinstance(n, int)), default=0)


def _too_deep(what: str) -> ValueError:
    return ValueError(
        f"{what} holds a rule of parts in parts, more than {DEEPEST} deep, as no rule is. It was "
        "not written by `save_optimizer`."
    )


def _too_long(what: str, length: int) -> ValueError:
    return ValueError(
        f"{what} holds a rule with a name of {length} characters, and the longest have {LONGEST}. "
        "It was not written by `save_optimizer`."
    )
