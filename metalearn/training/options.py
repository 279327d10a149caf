"""How a run is trained: for how long, what is looked at on the way, and what on a fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from metalearn._utils.checks import at_least, at_most, counts
from metalearn.sizes import MOST_TASKS
from metalearn.tasks import Tasks
from metalearn.training.faults import Faults


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long to train, what to look at on the way, and what to do when something breaks."""

    steps: int  # outer steps, counted from the beginning of the run
    held_out: Tasks | None = None  # evaluated on the way: validation tasks, not test
    eval_every: int | None = None  # outer steps; None or 0: never
    eval_tasks: int = 200
    log_every: int = 10  # outer steps
    check_every: int | None = None  # outer steps; a `HealthWarning` for what is found
    faults: Faults = Faults()
    # Asked after every outer step, with its number: None, or why the run is to stop. It then
    # saves and raises Interrupted. Of outer steps in segments: after every segment, with how
    # many there were.
    asked_to_stop: Callable[[int], str | None] | None = None
    progress: bool = True  # a bar with the rate and the loss

    def __post_init__(self) -> None:
        never = {"eval_every": self.eval_every, "check_every": self.check_every}
        counts("Fit", 0, steps=self.steps, log_every=self.log_every)
        at_least("Fit", 0, **never)
        counts("Fit", 1, eval_tasks=self.eval_tasks)
        at_most("Fit", MOST_TASKS, eval_tasks=self.eval_tasks)
