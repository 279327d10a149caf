"""Labels that exceed the outputs of a network, detected before training.

The loss of such a label is NaN, and that of a negative label is the loss of another class; later
both look like a diverged run. The range of the labels is known on the host (`Tasks.label_range`),
the number of outputs only when a loss is traced. So a trainer announces the labels (`known`), and a
loss compares its outputs with them when it is traced (`compare`):

    with known(label_range(tasks), seen):  # Trainer.fit, Trainer.evaluate, Algorithm.adapt
        step(state, tasks)                 # traces `cross_entropy`, which calls `compare`

A compiled program is not traced again, so the numbers of outputs are recorded in `seen`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Range = tuple[int, int]  # the smallest and the largest label
Seen = set[tuple[str, int]]  # names of losses, and the numbers of outputs they were traced with

_NOW: contextvars.ContextVar[tuple[Range | None, Seen]] = contextvars.ContextVar("labels")


@contextlib.contextmanager
def known(labels: Range | None, seen: Seen) -> Iterator[None]:
    """Announce a range of labels to all losses that are traced in this context.

    Args:
      labels: the smallest and the largest; None: unknown, or there are none.
      seen: numbers of outputs from earlier calls on the same network; extended.

    Raises:
      ValueError: if a label exceeds the outputs in `seen`; or in the context, those traced there.
    """
    for what, outputs in seen:
        _check(what, labels, outputs)
    token = _NOW.set((labels, seen))
    try:
        yield
    finally:
        _NOW.reset(token)


def compare(what: str, outputs: int) -> None:
    """Record the number of outputs that a loss is traced with, and check the known labels."""
    labels, seen = _NOW.get((None, set()))
    seen.add((what, outputs))
    _check(what, labels, outputs)


def beyond(episode: Any, seen: Seen) -> str:
    """Return a message if labels of an episode, (inputs, labels, ...) twice, exceed the outputs."""
    ranges = [range_of(part) for part in (episode.support, episode.query)]
    for labels in ranges:
        for what, outputs in seen:
            if labels is not None and not 0 <= labels[0] <= labels[1] < outputs:
                return _message(what, labels, outputs)
    return ""


def range_of(part: Any) -> Range | None:
    """Return the range of the labels of a support or query set, (inputs, labels, ...)."""
    labels = part[1] if isinstance(part, tuple) and len(part) > 1 else None
    mask = getattr(labels, "mask", None)  # of `Masked`: the labels of padding are not read
    if isinstance(labels, tuple) and labels:
        labels = labels[0]
    if not isinstance(labels, np.ndarray | jax.Array) or not labels.size:
        return None
    if isinstance(labels, jax.core.Tracer):
        return None
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return None
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return None  # sharded over processes
    values = np.asarray(labels)
    if mask is not None and not isinstance(mask, jax.core.Tracer):
        values = values[np.asarray(mask, bool)]
    if not values.size:
        return None
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
