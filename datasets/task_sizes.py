"""Which few-shot tasks can be drawn from classes of some sizes, and what refuses the others."""

from __future__ import annotations

import numpy as np

from metalearn._utils.checks import integers

MOST_OF_A_CLASS = 2**23  # examples: the resolution of a float32 uniform
KEEP_LARGER = (
    "the {few} smaller ones: `names, counts = np.unique(labels, return_counts=True); "
    "keep = np.isin(labels, names[counts >= {needed}])`"
)


def check_sizes(counts: np.ndarray, ways: int, shots: int, queries: int) -> None:
    """Raise ValueError unless every task of these sizes can be drawn from classes.

    Args:
      counts: [classes], the number of examples of each.
      ways: classes in a task.
      shots: support examples per class.
      queries: query examples per class.
    """
    check_task(ways, shots, queries)
    classes, needed = len(counts), shots + queries
    if ways > classes:
        raise ValueError(
            f"`FewShot` got ways={ways}, but the index has {classes} classes and those of a task "
            f"are distinct. Ask for at most ways={classes}, or give it an index of more classes "
            f"(`rotate(index)` makes four of each)."
        )
    smallest = int(counts.argmin())
    fewest = int(counts[smallest])
    if needed > fewest:
        raise ValueError(
            f"`FewShot` got shots + queries = {shots} + {queries} = {needed}, but class {smallest} "
            f"has {fewest} examples and those of a task are distinct. Ask for at most {fewest} "
            f"together, or keep only the larger classes with "
            f"`select(index, np.flatnonzero(index.counts >= {needed}))`."
        )
    if max(classes, counts.max()) > MOST_OF_A_CLASS:
        raise ValueError(
            f"`FewShot` got {classes:,} classes, the largest of {counts.max():,} examples, but it "
            f"draws from at most {MOST_OF_A_CLASS:,} of either. Leave some examples out."
        )


def check_task(ways: int, shots: int, queries: int) -> None:
    """Raise ValueError unless the sizes of a task are integers of at least one."""
    integers("FewShot", ways=ways, shots=shots, queries=queries)
    if min(ways, shots, queries) < 1:
        raise ValueError(
            f"`FewShot` got ways={ways}, shots={shots}, queries={queries}, but a task has at least "
            f"one of each. Pass positive integers, such as ways=5, shots=1, queries=15."
        )


def check_classes(
    what: str,
    names: np.ndarray,
    counts: np.ndarray,
    shots: int,
    queries: int,
    leave_out: str = KEEP_LARGER,
) -> None:
    """Raise ValueError if there is one class, or one is too small, which is named.

    Args:
      what: the function, as its user writes it.
      names: [classes], their labels.
      counts: [classes], the number of examples of each.
      shots: support examples per class.
      queries: query examples per class.
      leave_out: how to leave out the classes that are too small, for the message.
    """
    integers("FewShot", shots=shots, queries=queries)
    if len(names) < 2:
        classes = f"one class: every label is {names[0].item()!r}" if len(names) else "no class"
        raise ValueError(
            f"`{what}` got examples of {classes}. A task tells classes apart, so it takes at least "
            "two. Pass examples of more classes, with the label of each."
        )
    smallest, needed = int(counts.argmin()), shots + queries
    if counts[smallest] < needed:
        raise ValueError(
            f"`{what}` got shots + queries = {shots} + {queries} = {needed}, but the class "
            f"{names[smallest].item()!r} has {counts[smallest]} examples and those of a task are "
            f"distinct. Ask for at most {counts[smallest]} together, or leave out "
            f"{leave_out.format(few=(counts < needed).sum(), needed=needed)}."
        )
