"""Labels beside the outputs of a network: one that is beyond them is found before training.

The loss of such a label is NaN, or that of another class where it is negative, and what is seen
of it later looks like a diverged run. What the labels go up to is known on the host
(`Tasks.label_range`), how many outputs there are when the loss is traced, and only there. So
those who train say what is known (`known`), and a loss says what it is traced with (`compare`):

    with known(tasks, seen):            # Trainer.fit, Trainer.evaluate, health checks
        step(state, tasks)              # traces `cross_entropy`, which calls `compare`

A program that was compiled before is not traced again, so the outputs that were seen are kept.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalearn.tasks import Tasks

Range = tuple[int, int]  # the least and the largest label
Seen = set[tuple[str, int]]  # losses, by name, and the outputs they were traced with

_NOW: contextvars.ContextVar[tuple[Range | None, Seen]] = contextvars.ContextVar("labels")


@contextlib.contextmanager
def known(tasks: Any, seen: Seen) -> Iterator[None]:
    """Say what is known of the labels of `tasks` to all losses that are traced inside.

    Args:
      tasks: of which `label_range` is asked.
      seen: of earlier calls on the same network, and added to.

    Raises:
      ValueError: at once, where a label is beyond outputs that were seen; inside likewise.
    """
    found = tasks.label_range() if isinstance(tasks, Tasks) else None
    for what, outputs in seen:
        _check(what, found, outputs)
    token = _NOW.set((found, seen))
    try:
        yield
    finally:
        _NOW.reset(token)


def compare(what: str, outputs: int) -> None:
    """Note the outputs of a network that a loss is traced with, and check the labels there are."""
    labels, seen = _NOW.get((None, set()))
    seen.add((what, outputs))
    _check(what, labels, outputs)


def beyond(episode: Any, seen: Seen) -> str:
    """Say which labels of an episode, (inputs, labels, ...) twice, no output is for; or ""."""
    found = [_range(part) for part in (episode.support, episode.query)]
    for labels in found:
        for what, outputs in seen:
            if labels is not None and not 0 <= labels[0] <= labels[1] < outputs:
                return _message(what, labels, outputs)
    return ""


def _range(part: Any) -> Range | None:
    labels = part[1] if isinstance(part, tuple) and len(part) > 1 else None
    if not isinstance(labels, np.ndarray | jax.Array) or not labels.size:
        return None
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return None
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return None  # of other processes too
    values = np.asarray(labels)
    return int(values.min()), int(values.max())


def _check(what: str, labels: Range | None, outputs: int) -> None:
    if labels is not None and not 0 <= labels[0] <= labels[1] < outputs:
        raise ValueError(_message(what, labels, outputs))


def _message(what: str, labels: Range, outputs: int) -> str:
    return (
        f"The labels go from {labels[0]} to {labels[1]}, but the network has {outputs} outputs, "
        f"and `{what}` takes labels from 0 to {outputs - 1}. Give the network "
        f"{labels[1] + 1} outputs or more, or number the classes from 0 on: "
        "`np.unique(labels, return_inverse=True)[1]`."
    )
