"""`metalearn plan`: what each engine would cost on a config, before it is trained."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from metalearn._utils import strict_json
from metalearn._utils.device_memory import show_bytes
from metalearn.experiments import build
from metalearn.experiments.commands import auto, plan_table
from metalearn.planning.plan import Plan, plan, tasks_at_once
from metalearn.planning.step_cost import Candidate, Costs, Row


class Largest(NamedTuple):
    """The largest value of a config's key that fits, in doublings of the value it has."""

    key: str  # such as "model.filters"
    value: int | None  # None: not even 1 fits
    beyond: str  # what became of twice that: the memory it needs, or why it is refused


def show(config: Any, budget: int | None, as_json: bool, key: str | None = None) -> None:
    """Print the plan of a config: a table, or JSON alone. BudgetError where nothing fits."""
    plain = build.to_json(config)
    value = None if key is None else _value(plain, key)
    trainer, tasks = auto.abstract(plain)
    found = plan(trainer, tasks, budget=budget, all_chunks=True)
    most = None if key is None or value is None else largest(plain, key, value, found)
    if as_json:
        values = plan_table.to_json(found, trainer)
        print(strict_json.dumps({**values, "largest": most and most._asdict()}, indent=2))
        found.choose()
        return
    print("\n".join(plan_table.table(found, trainer)))
    if most is not None and found.leanest is not None:
        print(f"\n{_said(most, found.leanest, found.budget)}")
    row = found.choose()
    print(f"\nChosen: {found.reason()}.\n  {_flags(row)}")


def largest(config: dict[str, Any], key: str, value: int, found: Plan) -> Largest | None:
    """Double a value for as long as it fits with the leanest engine, or halve it until it does."""
    leanest = found.leanest
    if leanest is None:
        return None

    def row_of(value: int) -> Row:
        trainer, tasks = auto.abstract(_changed(config, key, value))
        return Costs(trainer, tasks).row(Candidate(leanest.engine), leanest.chunk)

    row = leanest
    if row_of(2 * value).cost == leanest.cost:
        raise ValueError(f"--largest={key}: memory does not depend on it.")
    if found.fits(leanest):
        while found.fits(row := row_of(2 * value)):
            value *= 2
        return Largest(key, value, _needs(row))
    while value > 1:
        beyond, row = row, row_of(value // 2)
        value //= 2
        if found.fits(row):
            return Largest(key, value, _needs(beyond))
    return Largest(key, None, _needs(row))


def _needs(row: Row) -> str:
    return row.refusal or show_bytes(row.peak)


def _said(most: Largest, leanest: Row, budget: int) -> str:
    fits = f"fits {show_bytes(budget)} with {leanest.name} and {tasks_at_once(leanest.chunk)}"
    if most.value is None:
        return f"No {most.key} {fits}: 1 needs {most.beyond}."
    return (
        f"The largest {most.key} that {fits}, by doubling: {most.value}; twice that: {most.beyond}."
    )


def _value(config: dict[str, Any], key: str) -> int:
    """Return the integer at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) and part in value else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"--largest takes a key of the config that holds a positive integer, such as "
            f"algorithm.inner_steps or tasks_per_step, but {key!r} holds {value!r}."
        )
    return value


def _changed(config: dict[str, Any], key: str, value: int) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    *parents, last = key.split(".")
    inside = changed
    for parent in parents:
        inside = inside[parent]
    inside[last] = value
    return changed


def _flags(row: Row) -> str:
    """Return the command-line options that make a config take the engine of a row."""
    chosen = auto.settings(row)
    options = {f"engine_options.{key}": value for key, value in chosen["engine_options"].items()}
    flags = {"engine": chosen["engine"], **options, "chunk": chosen["chunk"]}
    return " ".join(f"--config.{key}={value}" for key, value in flags.items())
