"""The memory and FLOPs of an outer step with each engine, and the choice of an engine.

The memory of a meta-gradient depends on the number of inner steps, the activations and the
engine, and is hard to predict by hand. But an outer step is one compiled program: it is compiled
for shapes only, once per engine and setting, and the compiler reports its memory and its FLOPs
(`metalearn.cost`). Nothing is allocated or run.

Both are compared with *plain training*: the same inner loops on the same tasks, run forward with
ordinary inner gradients and evaluated by the outer loss, without a meta-gradient or an outer
update.

Of the exact settings that fit the memory, the one with the fewest FLOPs is chosen. Settings
within 1% of it count as equal; of those, the one with the most tasks at once, then the one with
the least memory. The numbers hold for this backend, device and version of jax.
"""

from __future__ import annotations

import bisect
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from tqdm import tqdm

from metalearn._utils.device_memory import device_memory, parse_bytes, show_bytes
from metalearn.cost import Cost
from metalearn.engines import Forward, MixedFlow, Reverse
from metalearn.planning.step_cost import Candidate, Row, StepCosts, sets_horizon, short_repr
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
    """No exact engine fits the memory budget."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of all engines and settings on a problem, and the choice among them.

    Args:
      rows: one for each engine, setting and chunk.
      plain: the cost of plain training, with the trainer's own chunk.
      budget: bytes of memory.
      inner_steps: T, or the inner steps of a truncated unroll.
      largest_horizon: if no exact row fits and the algorithm, or the tasks, have a field
        `inner_steps`: the most inner steps that would fit, or 0. None otherwise, and in
        truncated training.
    """

    rows: list[Row]
    plain: Cost
    budget: int
    inner_steps: int = 1
    largest_horizon: int | None = None

    def fits(self, row: Row) -> bool:
        """Say whether the memory of a row is within the budget."""
        return row.cost is not None and row.peak <= self.budget

    @property
    def leanest(self) -> Row | None:
        """Return the exact row with the least memory; None if all engines refuse."""
        compiled = [row for row in self.rows if row.exact and row.cost is not None]
        return min(compiled, key=lambda row: row.peak, default=None)

    @property
    def chosen(self) -> Row | None:
        """Return the chosen row; None if no exact row fits."""
        fitting = [row for row in self.rows if row.exact and self.fits(row)]
        fewest = min((row.flops for row in fitting), default=0)
        equal = [row for row in fitting if row.flops <= EQUAL * fewest]
        return max(equal, key=lambda row: (row.chunk, -row.peak), default=None)

    def choose(self) -> Row:
        """Return the chosen row, or raise BudgetError with the least memory that would fit."""
        if self.chosen is None:
            raise BudgetError(self._nothing_fits())
        return self.chosen

    def reason(self) -> str:
        """Return a sentence: which row is chosen, and why."""
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
    progress: bool = False,
) -> Plan:
    """Compile the outer step with each engine and return the costs. Nothing is allocated.

    Args:
      trainer: the trainer; its own engine is not read.
      tasks: as for `Trainer.step`, or their shapes.
      candidates: engines and settings, each compiled once per chunk; None: `CANDIDATES`.
      budget: bytes; None: the memory of the device.
      all_chunks: also compile with one task at a time if a row fits with all tasks at once.
        By default smaller chunks are tried only if none fits.
      progress: show which candidate is being compiled.
    """
    check_tasks("plan(tasks=)", tasks)
    candidates = CANDIDATES if candidates is None else candidates
    costs = StepCosts(trainer, jax.eval_shape(lambda tree: tree, tasks))
    chunk = costs.at_once
    rows = [costs.row(each, chunk) for each in _compiling(candidates, chunk, progress)]
    budget = device_memory() if budget is None else budget
    result = Plan(rows, costs.plain(), budget, costs.inner_steps())
    if chunk > 1 and (all_chunks or result.chosen is None):
        rows = rows + [costs.row(each, 1) for each in _compiling(candidates, 1, progress)]
        result = dataclasses.replace(result, rows=rows)
    return _with_largest(result, costs, chunk)


def choose_engine(
    trainer: Trainer, tasks: Tasks, *, budget: int | str | None = None, progress: bool = True
) -> Trainer:
    """Return the trainer with the cheapest exact engine that fits a memory budget; print why.

    Every candidate (`CANDIDATES`) is compiled for shapes alone: nothing is allocated or run. This
    is `engine="auto"` of a config, and the choice of `metalearn plan`.

    Args:
      trainer: its own engine is not read.
      tasks: as for `Trainer.step`, or their shapes.
      budget: bytes, or a text such as "8GiB"; None: the memory of the device.
      progress: show which candidate is being compiled, and print the choice with its reason.

    Raises:
      BudgetError: if no exact engine fits, with the least memory that would.
    """
    allowed = parse_bytes(budget) if isinstance(budget, str) else budget
    chosen = plan(trainer, tasks, budget=allowed, progress=progress)
    row = chosen.choose()
    if progress:
        print(f"engine: {chosen.reason()}.")
    chunk = None if trainer.chunk is None and row.chunk == trainer.batch.share else row.chunk
    return dataclasses.replace(trainer, engine=row.engine, chunk=chunk)


def _compiling(candidates: Sequence[Candidate], chunk: int, progress: bool) -> Iterator[Candidate]:
    """Yield the candidates, and show which one is being compiled, with how many tasks at once."""
    with tqdm(
        candidates,
        desc=f"compiling engines, {tasks_at_once(chunk)}",
        unit="engine",
        leave=False,
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
    ) as bar:
        for candidate in bar:
            bar.set_postfix_str(short_repr(candidate.engine))
            yield candidate


def _with_largest(result: Plan, costs: StepCosts, chunk: int) -> Plan:
    """Add what fits of the leanest engine: the largest chunk, or else the largest horizon."""
    leanest = result.leanest
    if leanest is None or any(result.fits(row) for row in result.rows if row.chunk == chunk):
        return result
    candidate = Candidate(leanest.engine)
    if result.chosen is None:
        if not (sets_horizon(costs.trainer.algorithm) or sets_horizon(costs.tasks)):
            return result
        if costs.trainer.truncation is not None:  # memory is that of its steps, not of the horizon
            return result
        horizons = range(1, result.inner_steps)
        fewest = bisect.bisect_left(horizons, True, key=costs.takes_horizon)
        if 0 < len(horizons) == fewest:
            return result
        steps = largest(
            horizons[fewest:],
            lambda steps: result.fits(costs.with_horizon(steps).row(candidate, leanest.chunk)),
        )
        return dataclasses.replace(result, largest_horizon=steps or 0)
    divisors = [n for n in range(2, chunk) if costs.trainer.batch.share % n == 0]
    between = largest(divisors, lambda n: result.fits(costs.row(candidate, n)))
    rows = [] if between is None else [costs.row(candidate, between)]
    return dataclasses.replace(result, rows=result.rows + rows)


def largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending values that fits; if one does not fit, no larger one does.

    >>> largest([1, 2, 4, 8], lambda n: n < 5), largest([8, 9], lambda n: n < 5)
    (4, None)
    """
    count = bisect.bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else None


def tasks_at_once(chunk: int) -> str:
    """Format a chunk.

    >>> tasks_at_once(1), tasks_at_once(16)
    ('1 task at a time', '16 tasks at once')
    """
    return "1 task at a time" if chunk == 1 else f"{chunk} tasks at once"
