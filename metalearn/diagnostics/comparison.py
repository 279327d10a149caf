"""How wrong each approximate meta-gradient is, and what it saves, on a problem as it stands.

The exact engines are here too, so the error of an approximation need not be argued: the same outer
step (the same eta, tasks and inner loops) is differentiated by every engine and setting, and each
meta-gradient g is compared with the exact one, e:

    relative error   |g - e| / |e|           0 for a perfect one, 1 for a gradient of zero
    cosine           <g, e> / (|g| |e|)      whether it points the same way, whatever its length

beside memory and FLOPs, of the compiled program, and the time of a call. An estimate from random
numbers (`ES`) is one draw of many. In float32 the exact engines differ from each other by rounding,
which is the least error that can be told apart; for a smaller one compare in float64.

The numbers are those of this eta. A fixed point that is reached at the first outer step may be
missed at the hundredth, when learning rates have changed: compare there as well.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from metalearn._utils.checks import at_least
from metalearn._utils.trees import precise
from metalearn.cost import Cost, cost
from metalearn.engines import (
    ES,
    SAMA,
    ApproximationWarning,
    Forward,
    Implicit,
    MetaGradient,
    MixedFlow,
    Reverse,
    Truncated,
)
from metalearn.tasks import Tasks, check_tasks
from metalearn.unroll import horizon

# Errors of an engine that cannot differentiate a problem, or of XLA that cannot compile it.
REFUSALS = (ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError)
REFERENCES = (MixedFlow(), Reverse("nested"))  # the first that serves a problem is the exact one


def candidates(steps: int) -> list[MetaGradient]:
    """Return the engines and settings that are compared on a loop of so many inner steps."""
    lasts = sorted({k for k in (1, 2, steps // 10, steps // 2) if 1 <= k < steps})
    return [
        Reverse(),
        MixedFlow(),
        Forward(),
        MixedFlow(store="inexact_bfloat16"),
        *(Truncated(last) for last in lasts),
        Truncated(finite_difference=0.01),
        SAMA(),
        *(Implicit(solver) for solver in ("gmres", "cg", "bicgstab", "nystrom")),
        Implicit("neumann", iterations=20, tolerance=0.0),
        Implicit(variables="params"),
        ES(pairs=8),
    ]


class Compared(NamedTuple):
    """One engine on a problem.

    Args:
      engine: with its settings.
      relative_error: of its meta-gradient; NaN where that is not finite, or it refuses.
      cosine: with the exact one.
      cost: memory and FLOPs of the compiled meta-gradient; None: the engine refuses the problem.
      flops_known: false where a loop has no known number of steps (a solver's): FLOPs are then a
        lower bound.
      seconds: of a call, the best of several.
      doubts: what the engine itself says may be wrong.
      refusal: the text of its error; "" if there is none.
    """

    engine: MetaGradient
    relative_error: float = math.nan
    cosine: float = math.nan
    cost: Cost | None = None
    flops_known: bool = True
    seconds: float = math.nan
    doubts: tuple[str, ...] = ()
    refusal: str = ""


class Comparison(NamedTuple):
    """All engines on a problem.

    Args:
      rows: one for each engine and setting.
      exact: the engine that the others are compared with.
      inner_steps: T.
      tasks: of the outer step.
      dtype: of eta.
      norm: of the exact meta-gradient.
    """

    rows: list[Compared]
    exact: MetaGradient
    inner_steps: int
    tasks: int
    dtype: str
    norm: float

    def cheapest(self, tolerance: float, budget: int | None = None) -> Compared:
        """Return the fastest engine whose relative error is within a tolerance.

        Args:
          tolerance: of the relative error.
          budget: bytes that it may take; None: any.

        Raises:
          ValueError: if there is none, with the one that comes closest; if the exact meta-gradient
            is zero or not finite.
        """
        if not (math.isfinite(self.norm) and self.norm > 0):
            raise ValueError(
                f"The exact meta-gradient has the norm {self.norm:g} here, so that no error can be "
                "told relative to it: compare at another eta, or on other tasks."
            )
        able = [
            row
            for row in self.rows
            if row.cost is not None
            and (budget is None or row.cost.peak <= budget)
            and math.isfinite(row.relative_error)
        ]
        if not able:
            raise ValueError("No engine serves this problem within the memory that it may take.")
        right = [row for row in able if row.relative_error <= tolerance]
        if not right:
            best = min(able, key=lambda row: row.relative_error)
            raise ValueError(
                f"No engine has a relative error of {tolerance:g} or less here. The closest, "
                f"{type(best.engine).__name__}, has {best.relative_error:.2g}: exact engines "
                "differ by rounding alone, so take a tolerance above it."
            )
        return min(right, key=lambda row: row.seconds)


def compare(
    trainer: Any,
    tasks: Tasks,
    *,
    key: jax.Array | None = None,
    state: Any = None,
    engines: Sequence[MetaGradient] | None = None,
    repeats: int = 3,
    progress: bool = False,
) -> Comparison:
    """Compute the meta-gradient of one outer step by every engine, and compare them.

    Args:
      trainer: a `Trainer`; its own engine is not read. Not one with a `segment`.
      tasks: as for `Trainer.step`.
      key: of the initial eta and of the tasks; None: `jax.random.key(0)`.
      state: a `TrainState` to compare at, such as one that was trained; None: the initial one.
      engines: what is compared; None: `candidates`. The exact one is computed beside them.
      repeats: calls whose best time counts.
      progress: show which engine is being compiled.

    Raises:
      ValueError: for a trainer with a `segment`, or a problem that no exact engine serves.
    """
    check_tasks("compare(tasks=)", tasks)
    at_least("compare", 1, repeats=repeats)
    if trainer.segment is not None:
        raise ValueError(
            f"`compare` computes the meta-gradient of an outer step in one program, and this "
            f"trainer cuts it (segment={trainer.segment!r}). Compare on fewer inner steps, with "
            "segment=None."
        )
    key = jax.random.key(0) if key is None else key
    steps = inner_steps(trainer, tasks, key)
    engines = candidates(steps) if engines is None else engines
    for exact in REFERENCES:
        row, expected = measured(trainer, exact, tasks, key, state, None, 1)
        if expected is not None:
            break
    else:
        raise ValueError(f"No exact engine serves this problem. {row.refusal}")
    rows = [
        measured(trainer, engine, tasks, key, state, expected, repeats)[0]
        for engine in _compiling(engines, progress)
    ]
    count, dtype = trainer.tasks_per_step, str(expected.dtype)
    return Comparison(rows, exact, steps, count, dtype, float(np.linalg.norm(expected)))


def measured(
    trainer: Any,
    engine: MetaGradient,
    tasks: Tasks,
    key: jax.Array,
    state: Any,
    expected: np.ndarray | None,
    repeats: int,
) -> tuple[Compared, np.ndarray | None]:
    """Return (how an engine compares, its meta-gradient as a vector; None: it refuses)."""
    try:
        trainer = dataclasses.replace(trainer, engine=engine)
        start = trainer.init(key, tasks)
        if state is not None:  # what truncated unrolls carry is the engine's own
            start = dataclasses.replace(start, eta=state.eta, step=state.step, key=state.key)
        tasks = trainer.fetch(tasks, start)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            costs = cost(trainer.gradient, start, tasks)
        known = not any(
            "number of steps the compiler does not know" in str(w.message) for w in said
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximationWarning)  # the row says it
            grads, metrics = jax.block_until_ready(trainer.gradient(start, tasks))
        seconds = min(_seconds(trainer.gradient, start, tasks) for _ in range(repeats))
    except REFUSALS as error:
        return Compared(engine, refusal=str(error).strip()), None
    flat = ravel_pytree(grads)[0]
    vector = np.asarray(precise(flat))
    values = {name: float(value) for name, value in metrics.items()}
    doubts = tuple(engine.doubts(values).values())
    reference = vector if expected is None else expected
    difference, cosine = closeness(vector, reference)
    return Compared(engine, difference, cosine, costs, known, seconds, doubts), vector


def closeness(vector: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return (relative error, cosine) of a vector [n]; NaN where it, or what is expected, is zero.

    >>> import numpy as np
    >>> closeness(np.array([2.0, 0.0]), np.array([1.0, 0.0]))
    (1.0, 1.0)
    """
    size, length = np.linalg.norm(expected), np.linalg.norm(vector)
    error = np.linalg.norm(vector - expected) / size if size else math.nan
    cosine = vector @ expected / (size * length) if size * length else math.nan
    return float(error), float(cosine)


def inner_steps(trainer: Any, tasks: Tasks, key: jax.Array) -> int:
    """Return the inner steps of an outer step: T, or those of a truncated unroll."""
    if trainer.truncation is not None:
        return trainer.truncation.steps
    algorithm = trainer.algorithm
    shapes = jax.eval_shape(
        lambda tasks, key: algorithm.batches(tasks.sample(key), key), tasks, key
    )
    return horizon(shapes)


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def _compiling(engines: Sequence[MetaGradient], progress: bool) -> Iterator[MetaGradient]:
    with tqdm(engines, "comparing", unit="engine", leave=False, disable=not progress) as bar:
        for engine in bar:
            bar.set_postfix_str(type(engine).__name__)
            yield engine
