"""What each engine would cost on a problem, before anything is allocated; and which to take.

The memory of a meta-gradient grows with the inner steps, the activations and the way the
derivative travels, and is found out by running out of it. But the outer step is one
program, and its compiler knows: it is compiled for shapes alone, once for each engine and
setting, and asked for its memory and its FLOPs (`metalearn.planning.cost`).

Both are set beside *plain training*: the same inner loops on the same tasks, run forward
with ordinary inner gradients and judged by the outer loss, with no meta-gradient and no
outer update. That is what the training would cost without the meta-.

Of the exact settings that fit, the one with the fewest FLOPs is chosen. Settings within 1%
of it count as equal; of those, the one that takes most tasks at once, then the one with the
least memory. The figures are those of this backend, device and version of jax.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import jax

from metalearn._utils.device_memory import device_memory, show_bytes
from metalearn.engines import Forward, MixedFlow, Reverse
from metalearn.planning.cost import Cost
from metalearn.planning.step_cost import Candidate, StepCosts, Row, sets_horizon
from metalearn.tasks import Tasks, check_tasks
from metalearn.trainer import Trainer

EQUAL = 1.01  # FLOPs within this factor count as equal
CANDIDATES = (
    Candidate(Reverse()),
    Candidate(Reverse(peel=True)),
    Candidate(Reverse(remat="step")),
    Candidate(Reverse(remat="segments")),
    Candidate(Reverse(remat="nested")),
    Candidate(MixedFlow()),
    Candidate(MixedFlow(remat="none")),
    Candidate(MixedFlow(remat="segments")),
    Candidate(MixedFlow(remat="nested")),
    Candidate(MixedFlow(micro_batches=4)),
    Candidate(MixedFlow(remat="nested", micro_batches=4)),
    Candidate(MixedFlow(store="host")),
    Candidate(MixedFlow(store="inexact_bfloat16"), exact=False),
    Candidate(MixedFlow(remat="inexact_reconstruct"), exact=False),
    Candidate(Forward()),
)


class BudgetError(ValueError):
    """No exact engine fits the memory there is."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found: a row for each engine and setting, and what to take of them."""

    rows: list[Row]
    plain: Cost  # of plain training, with the trainer's own chunk
    budget: int  # bytes
    inner_steps: int = 1  # T
    # Where nothing fits, and the algorithm sets T: the most inner steps that would, or 0.
    largest_horizon: int | None = None

    def fits(self, row: Row) -> bool:
        """Say whether a row's memory is within the budget."""
        return row.cost is not None and row.peak <= self.budget

    @property
    def leanest(self) -> Row | None:
        """Return the exact row with the least memory; None where all engines refuse."""
        served = [row for row in self.rows if row.exact and row.cost is not None]
        return min(served, key=lambda row: row.peak, default=None)

    @property
    def chosen(self) -> Row | None:
        """Return the row to take; None where nothing fits."""
        fitting = [row for row in self.rows if row.exact and self.fits(row)]
        fewest = min((row.flops for row in fitting), default=0)
        equal = [row for row in fitting if row.flops <= EQUAL * fewest]
        return max(equal, key=lambda row: (row.chunk, -row.peak), default=None)

    def choose(self) -> Row:
        """Return the row to take, or raise BudgetError with the least that would do."""
        if self.chosen is None:
            raise BudgetError(self._nothing_fits())
        return self.chosen

    def reason(self) -> str:
        """Say what is chosen, and why, in a sentence."""
        row = self.choose()
        times = row.flops / max(self.plain.flops, 1)
        return (
            f"{row.name} with {tasks_at_once(row.chunk)}: of the exact settings that fit "
            f"{show_bytes(self.budget)}, the fewest FLOPs ({times:.1f}x plain training), in "
            f"{show_bytes(row.peak)}"
        )

    def _nothing_fits(self) -> str:
        if self.leanest is None:
            return f"No exact engine serves this problem. {self.rows[0].refusal}"
        steps = ""
        if self.largest_horizon is not None:
            steps = (
                f"With it, inner_steps={self.largest_horizon} is the largest horizon that fits. "
            )
        if self.largest_horizon == 0:
            steps = "Fewer inner steps do not help: not one fits. "
        name, tasks = self.leanest.name, tasks_at_once(self.leanest.chunk)
        return (
            f"No exact engine fits {show_bytes(self.budget)}. The leanest, {name} with {tasks}, "
            f"needs {show_bytes(self.leanest.peak)}: the least that would do. "
            f"{steps}Give it that memory, or take a smaller model or fewer examples in a batch."
        )


def plan(
    trainer: Trainer,
    tasks: Tasks,
    *,
    candidates: Sequence[Candidate] | None = None,
    budget: int | None = None,
    all_chunks: bool = False,
) -> Plan:
    """Compile the outer step with each engine and say what it costs. Nothing is allocated.

    Args:
      trainer: what would train; its own engine does not matter.
      tasks: as `Trainer.step` takes them, or their shapes.
      candidates: engines and settings, each a compilation; None is `CANDIDATES`.
      budget: bytes; None is the memory of the device.
      all_chunks: look at one task at a time too, even where all at once fit. Otherwise
        fewer tasks at once are tried where nothing fits.
    """
    check_tasks("plan(tasks=)", tasks)
    candidates = CANDIDATES if candidates is None else candidates
    trainer = dataclasses.replace(trainer, segment=None)  # its memory is that of the uncut loop
    costs = StepCosts(trainer, jax.eval_shape(lambda tree: tree, tasks))
    chunk = trainer.batch.at_once
    rows = [costs.row(candidate, chunk) for candidate in candidates]
    budget = device_memory() if budget is None else budget
    found = Plan(rows, costs.plain(), budget, costs.inner_steps())
    if chunk > 1 and (all_chunks or found.chosen is None):
        rows = rows + [costs.row(candidate, 1) for candidate in candidates]
        found = dataclasses.replace(found, rows=rows)
    return _with_largest(found, costs, chunk)


def _with_largest(found: Plan, costs: StepCosts, chunk: int) -> Plan:
    """Add what would fit: more tasks at once than one, or fewer inner steps."""
    leanest = found.leanest
    if leanest is None or any(found.fits(row) for row in found.rows if row.chunk == chunk):
        return found
    candidate = Candidate(leanest.engine)
    if found.chosen is None:
        if not sets_horizon(costs.trainer.algorithm):
            return found
        most = largest(
            range(1, found.inner_steps),
            lambda steps: found.fits(costs.with_horizon(steps).row(candidate, leanest.chunk)),
        )
        return dataclasses.replace(found, largest_horizon=most or 0)
    divisors = [n for n in range(2, chunk) if costs.trainer.batch.share % n == 0]
    between = largest(divisors, lambda n: found.fits(costs.row(candidate, n)))
    rows = [] if between is None else [costs.row(candidate, between)]
    return dataclasses.replace(found, rows=found.rows + rows)


def largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending values that fits, where no larger one fits again.

    >>> largest([1, 2, 4, 8], lambda n: n < 5), largest([8, 9], lambda n: n < 5)
    (4, None)
    """
    count = bisect.bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else None


def tasks_at_once(chunk: int) -> str:
    """Write a chunk for a person.

    >>> tasks_at_once(1), tasks_at_once(16)
    ('1 task at a time', '16 tasks at once')
    """
    return "1 task at a time" if chunk == 1 else f"{chunk} tasks at once"
