"""Support sets that algorithms read: checks for `Algorithm.adapt`, and how they are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metalearn.unroll import Episode


def check_pair(what: str, support: Any, shape: str = "[n, ...]") -> None:
    """Raise ValueError unless a support set is (inputs, targets, ...), alike in leading axes.

    Args:
      what: the algorithm's class: "MAML".
      support: its support set.
      shape: of the leaves of inputs and targets; its axes with a name are those in common.
    """
    argument = f"{what}.adapt(support=)"
    if not isinstance(support, tuple | list) or len(support) < 2:
        raise ValueError(
            f"`{argument}` takes (inputs, targets), leaves {shape}, but got {_shown(support)}. "
            "Pass a pair of arrays, such as (images, labels)."
        )
    axes = shape.count(",")
    leading: dict[tuple[int, ...], str] = {}
    for name, part in zip(("inputs", "targets"), support, strict=False):
        if isinstance(part, list):
            raise ValueError(
                f"`{argument}` got a list of {len(part)} as its {name}, which are one array "
                f"{shape}. Pass `np.asarray({name})`."
            )
        for leaf in jax.tree.leaves(part):
            size = jnp.shape(leaf)
            if len(size) < axes:
                raise ValueError(
                    f"`{argument}` got {name} of the shape {list(size)}, which are {shape}."
                )
            leading[size[:axes]] = f"{name} {list(size)}"
    if len(leading) > 1:
        raise ValueError(
            f"`{argument}` takes inputs and targets {shape}, alike in those axes, but got "
            f"{' and '.join(leading.values())}. Give each input its target."
        )


def with_rows(what: str, support: Any) -> tuple[Any, Any, jax.Array]:
    """Return a dataset (inputs, targets, rows [m] int32); of a pair all rows.

    Args:
      what: the algorithm's class: "FDS".
      support: (inputs [n, ...], targets [n, ...]), or these with the row numbers to train on.
    """
    check_pair(what, support)
    if len(support) > 2:
        return tuple(support)  # type: ignore[return-value]
    rows = jnp.arange(len(support[1]), dtype=jnp.int32)
    return support[0], support[1], rows


def sharded(episode: Episode, shard: Callable[[Any], Any]) -> Episode:
    """Return an episode whose support set, which all inner steps read, and query are sharded.

    See `Algorithm.shard_examples`.
    """
    return Episode(shard(episode.support), shard(episode.query))


def _shown(support: Any) -> str:
    if isinstance(support, tuple | list):
        return f"a {type(support).__name__} of {len(support)}"
    try:
        return f"an array {list(support.shape)}"
    except AttributeError:
        return f"a {type(support).__name__}"
