"""The cost of an outer step with each engine: compiled for shapes, never run."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from metalearn.cost import Cost, cost
from metalearn.diagnostics.comparison import REFUSALS, inner_steps
from metalearn.engines import MetaGradient
from metalearn.sharding.batched_means import outgrow_cache
from metalearn.trainer import Trainer
from metalearn.training.evaluation import task_metrics
from metalearn.training.segment_plan import SegmentPlan

HORIZON = "inner_steps"  # the field by which algorithms and tasks set T


class Candidate(NamedTuple):
    """An engine with its settings.

    Args:
      engine: the engine.
      exact: whether its meta-gradient is exact; an inexact one is listed but never chosen.
    """

    engine: MetaGradient
    exact: bool = True


class Row(NamedTuple):
    """The cost of an outer step with one engine and one chunk.

    Args:
      engine: the engine.
      exact: whether its meta-gradient is exact.
      chunk: tasks unrolled at once.
      cost: of the compiled outer step; None: the engine refuses the problem.
      refusal: the text of its error; "" if there is none.
      segments: of an outer step that is cut: the states it keeps, and its replays; else None.
    """

    engine: MetaGradient
    exact: bool
    chunk: int
    cost: Cost | None
    refusal: str = ""
    segments: SegmentPlan | None = None

    @property
    def name(self) -> str:
        """Return the engine's repr without the fields that are at their default."""
        return short_repr(self.engine)

    @property
    def peak(self) -> int:
        """Return the peak bytes of an outer step; only if `cost` is not None."""
        assert self.cost is not None, self.refusal
        return self.cost.peak

    @property
    def flops(self) -> int:
        """Return the FLOPs of an outer step; only if `cost` is not None."""
        assert self.cost is not None, self.refusal
        return self.cost.flops


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """The cost of the outer steps of one problem, per candidate engine.

    Args:
      trainer: the trainer; its own engine is not read.
      tasks: the tasks, or their shapes.
      known: costs by program text, read and extended, so that equal programs are compiled once.
    """

    trainer: Trainer
    tasks: Any
    known: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def row(self, candidate: Candidate, chunk: int) -> Row:
        """Return the cost of an outer step with a candidate, or the text of its refusal."""
        engine, exact = candidate
        plan = None
        try:
            trainer = dataclasses.replace(self.trainer, engine=engine, chunk=chunk)
            state = trainer.shapes(self.tasks)  # an engine may have a part in it
            segments = trainer.segments(self.tasks)
            if segments is None:
                step_cost = cost(trainer.step, state, self.tasks, known=self.known)
            else:
                plan, step_cost = segments.planned, segments.cost(state, self.tasks, self.known)
        except REFUSALS as error:
            return Row(engine, exact, chunk, None, str(error).strip())
        return Row(engine, exact, chunk, step_cost, segments=plan)

    def plain(self) -> Cost:
        """Return the cost of plain training: the inner loops and the outer loss, forward only."""
        trainer, state = self.trainer, self._state()

        def step(eta: Any, tasks: Any, key: jax.Array) -> dict[str, Any]:
            keys = jax.random.split(key, trainer.tasks_per_step)
            return trainer.batch.mean(self._on_task, (eta, tasks), keys)

        return cost(jax.jit(step), state.eta, self.tasks, state.key, known=self.known)

    @property
    def at_once(self) -> int:
        """The tasks that a device unrolls at once: where the trainer leaves it open, by size."""
        batch, state = self.trainer.batch, self._state()
        one = batch.chunk is None and outgrow_cache(
            batch.share, self._on_task, state.eta, self.tasks, state.key
        )
        return 1 if one else batch.at_once

    def _on_task(self, eta: Any, tasks: Any, key: jax.Array) -> dict[str, Any]:
        """Train plainly on one task, and return its metrics."""
        return task_metrics(self.trainer.algorithm, eta, tasks, key, self._truncated())

    def with_horizon(self, steps: int) -> StepCosts:
        """Return the `StepCosts` of the same problem with another number of inner steps.

        Raises:
          ValueError: if the algorithm takes no so few, such as a schedule of more windows.
        """
        algorithm = _with_horizon(self.trainer.algorithm, steps)
        trainer = dataclasses.replace(self.trainer, algorithm=algorithm)
        return StepCosts(trainer, _with_horizon(self.tasks, steps), self.known)

    def takes_horizon(self, steps: int) -> bool:
        """Say whether the problem can have this number of inner steps."""
        try:
            self.with_horizon(steps)
        except ValueError:
            return False
        return True

    def inner_steps(self) -> int:
        """Return the inner steps of an outer step: T, or those of a truncated unroll."""
        return inner_steps(self.trainer, self.tasks, self._state().key)

    def _truncated(self) -> int | None:
        return None if self.trainer.truncation is None else self.trainer.truncation.steps

    def _state(self) -> Any:
        return self.trainer.shapes(self.tasks)


def sets_horizon(part: Any) -> bool:
    """Say whether an algorithm, or tasks, set T by a field `inner_steps`."""
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    return HORIZON in [field.name for field in fields]


def _with_horizon(part: Any, steps: int) -> Any:
    return dataclasses.replace(part, **{HORIZON: steps}) if sets_horizon(part) else part


def short_repr(engine: Any) -> str:
    """Return the repr of an engine, or any dataclass, without fields at their default.

    >>> from metalearn import Reverse
    >>> short_repr(Reverse()), short_repr(Reverse(remat="step"))
    ('Reverse()', "Reverse(remat='step')")
    """
    fields = [f"{key}={value!r}" for key, value in changed_fields(engine).items()]
    return f"{type(engine).__name__}({', '.join(fields)})"


def changed_fields(engine: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their default, by name."""
    values = {field: getattr(engine, field.name) for field in dataclasses.fields(engine)}
    return {field.name: value for field, value in values.items() if value != field.default}
