"""A plan as a table for a person, and as JSON for a program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from metalearn import Trainer
from metalearn._utils.device_memory import show_bytes
from metalearn.experiments.commands.auto import settings
from metalearn.planning.cost import Cost
from metalearn.planning.plan import Plan
from metalearn.planning.step_cost import Row

HEADER = (
    *("", "engine", "tasks", "memory", "arguments", "temporaries", "output", "of plain"),
    *("FLOPs", "of plain", "fits"),
)


def to_json(found: Plan, trainer: Trainer) -> dict[str, Any]:
    """Return a plan as JSON values; sizes are in bytes."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "budget": found.budget,
        "tasks_per_step": trainer.tasks_per_step,
        "inner_steps": found.inner_steps,
        "plain": _cost_json(found.plain, found.plain),
        "rows": [_row_json(row, found) for row in found.rows],
        "chosen": found.rows.index(found.chosen) if found.chosen else None,
        "why": found.reason() if found.chosen else None,
        "largest_inner_steps": found.largest_horizon,
    }


def _row_json(row: Row, found: Plan) -> dict[str, Any]:
    return {
        "name": row.name,
        **settings(row),
        "exact": row.exact,
        "fits": found.fits(row),
        "refusal": row.refusal or None,
        "cost": _cost_json(row.cost, found.plain) if row.cost else None,
    }


def _cost_json(cost: Cost, plain: Cost) -> dict[str, Any]:
    return {
        **cost._asdict(),
        "peak": cost.peak,
        "peak_of_plain": cost.peak / plain.peak,
        "flops_of_plain": cost.flops / plain.flops if plain.flops else None,
    }


def table(found: Plan, trainer: Trainer) -> Iterator[str]:
    """Yield the lines of a table of a plan."""
    yield (
        f"{_problem(found, trainer)}; {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"budget {show_bytes(found.budget)}"
    )
    yield ""
    chunk = trainer.batch.at_once
    refusals = {row.name: row.refusal for row in found.rows if row.refusal}
    rows = [("", "plain training", str(chunk), *_cells(found.plain, found.plain), "")]
    rows += [_row_cells(row, found) for row in found.rows if not row.refusal]
    yield from _aligned([HEADER, *rows])
    yield ""
    for name, refusal in refusals.items():
        yield f"{name} refuses: {refusal.split('. ')[0].rstrip('.')}."
    yield "Plain training: the same inner loops and the outer loss, run forward; no meta-gradient."
    yield "tasks: unrolled at once. FLOPs: of matrix products and convolutions, loops included."
    if any(row.cost and row.cost.counted_on == "jaxpr" for row in found.rows):
        yield "FLOPs were counted on the jaxpr: this program's products cannot be read off its HLO."


def _problem(found: Plan, trainer: Trainer) -> str:
    steps, tasks = found.inner_steps, trainer.tasks_per_step
    many = f"{tasks} task{'s' * (tasks != 1)} of {steps} inner step{'s' * (steps != 1)}"
    return f"An outer step of {many}"


def _row_cells(row: Row, found: Plan) -> tuple[str, ...]:
    mark = "*" if row is found.chosen else ""
    name = row.name if row.exact else f"{row.name} (inexact)"
    fits = "yes" if found.fits(row) else "no"
    assert row.cost is not None
    return mark, name, str(row.chunk), *_cells(row.cost, found.plain), fits


def _cells(cost: Cost, plain: Cost) -> tuple[str, ...]:
    parts = map(show_bytes, (cost.peak, cost.arguments, cost.temporaries, cost.output))
    flops = f"{cost.flops / plain.flops:.2f}x" if plain.flops else "-"
    return *parts, f"{cost.peak / plain.peak:.2f}x", _si(cost.flops), flops


def _si(count: float) -> str:
    """Write a count with an SI prefix: 187,883,520 is "187.9 M"."""
    prefixes = ("", " k", " M", " G", " T", " P")
    power = next((i for i in range(len(prefixes)) if count < 1000 ** (i + 1)), len(prefixes) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f}{prefixes[power]}"


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*left, *right]).rstrip()
