"""`metalearn plan` and `engine="auto"`: the cost of each engine on a config, before training.

The dataset is read on the host, for its shapes, and the outer step is compiled for shapes
alone: nothing is put on the device. See `metalearn.planning.plan` for how the choice is made.
A plan is printed as a table, or as JSON. `engine="auto"` takes the engine that the plan would
choose, once for a run; with `--tolerance`, the fastest that `metalearn compare` finds within it.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from metalearn import Trainer
from metalearn._utils import strict_json
from metalearn._utils.checks import above
from metalearn._utils.device_memory import device_memory, show_bytes
from metalearn._utils.readable import aligned
from metalearn.cost import Cost
from metalearn.experiments import build
from metalearn.experiments.cli import import_paths
from metalearn.experiments.commands import compare
from metalearn.experiments.runs import newest_record
from metalearn.planning.plan import Plan, plan, tasks_at_once
from metalearn.planning.step_cost import Candidate, Row, StepCosts, changed_fields
from metalearn.sharding.distributed import broadcast, is_first, say

FLAT = 1.02  # memory of an outer step in segments within this factor does not grow


class Largest(NamedTuple):
    """The largest value of a config's key that fits, in doublings of the value it has."""

    key: str  # such as "model.filters"
    value: int | None  # None: not even 1 fits
    beyond: str  # what became of twice that: the memory it needs, or why it is refused


def show(config: Any, budget: int | None, as_json: bool, key: str | None = None) -> None:
    """Print the plan of a config: a table, or JSON alone. BudgetError where nothing fits."""
    plain = build.to_json(config)
    value = None if key is None else _value(plain, key)
    trainer, tasks = abstract(plain)
    planned = plan(trainer, tasks, budget=budget, all_chunks=True, progress=not as_json)
    most = None if key is None or value is None else largest(plain, key, value, planned)
    if as_json:
        values = to_json(planned, trainer)
        print(strict_json.dumps({**values, "largest": most and most._asdict()}, indent=2))
        planned.choose()
        return
    print("\n".join(table(planned, trainer)))
    if most is not None and planned.leanest is not None:
        print(f"\n{_said(most, planned.leanest, planned.budget)}")
    row = planned.choose()
    print(f"\nChosen: {planned.reason()}.\n  {_flags(row)}")


def largest(config: dict[str, Any], key: str, value: int, planned: Plan) -> Largest | None:
    """Double a value for as long as it fits with the leanest engine, or halve it until it does."""
    leanest = planned.leanest
    if leanest is None:
        return None

    def row_of(value: int) -> Row:
        trainer, tasks = abstract(_changed(config, key, value))
        return StepCosts(trainer, tasks).row(Candidate(leanest.engine), leanest.chunk)

    row = leanest
    more = row_of(2 * value)
    if more.cost and leanest.cost and more.cost.peak == leanest.cost.peak:
        raise ValueError(f"--largest={key}: memory does not depend on it.")
    if more.cost and leanest.segments and more.peak < FLAT * leanest.peak:
        raise ValueError(
            f"--largest={key}: an outer step is cut into segments, and memory does not depend on "
            "it. States that are kept are bounded by config.replay, and replays take their place."
        )
    if planned.fits(leanest):
        while planned.fits(row := row_of(2 * value)):
            value *= 2
        return Largest(key, value, _needs(row))
    while value > 1:
        beyond, row = row, row_of(value // 2)
        value //= 2
        if planned.fits(row):
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
    chosen = settings(row)
    options = {f"engine_options.{key}": value for key, value in chosen["engine_options"].items()}
    flags = {"engine": chosen["engine"], **options, "chunk": chosen["chunk"]}
    return " ".join(f"--config.{key}={value}" for key, value in flags.items())


HEADER = (
    *("", "engine", "tasks", "memory", "arguments", "temporaries", "output", "of plain"),
    *("FLOPs", "of plain", "fits"),
)


def to_json(planned: Plan, trainer: Trainer) -> dict[str, Any]:
    """Return a plan as JSON values; sizes are in bytes."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "budget": planned.budget,
        "tasks_per_step": trainer.tasks_per_step,
        "inner_steps": planned.inner_steps,
        "plain": _cost_json(planned.plain, planned.plain),
        "rows": [_row_json(row, planned) for row in planned.rows],
        "chosen": planned.rows.index(planned.chosen) if planned.chosen else None,
        "why": planned.reason() if planned.chosen else None,
        "largest_inner_steps": planned.largest_horizon,
    }


def _row_json(row: Row, planned: Plan) -> dict[str, Any]:
    return {
        "name": row.name,
        **settings(row),
        "exact": row.exact,
        "fits": planned.fits(row),
        "refusal": row.refusal or None,
        "segments": None if row.segments is None else row.segments._asdict(),
        "cost": _cost_json(row.cost, planned.plain) if row.cost else None,
    }


def _cost_json(cost: Cost, plain: Cost) -> dict[str, Any]:
    return {
        **cost._asdict(),
        "peak": cost.peak,
        "peak_of_plain": cost.peak / plain.peak,
        "flops_of_plain": cost.flops / plain.flops if plain.flops else None,
    }


def table(planned: Plan, trainer: Trainer) -> Iterator[str]:
    """Yield the lines of a table of a plan."""
    yield (
        f"{_problem(planned, trainer)}; {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"budget {show_bytes(planned.budget)}"
    )
    yield ""
    chunk = planned.rows[0].chunk
    refusals = {row.name: row.refusal for row in planned.rows if row.refusal}
    rows = [("", "plain training", str(chunk), *_cells(planned.plain, planned.plain), "")]
    rows += [_row_cells(row, planned) for row in planned.rows if not row.refusal]
    yield from aligned([HEADER, *rows], left=2)
    yield ""
    shown = planned.chosen or planned.leanest
    yield from _segments(shown) if shown else ()
    for name, refusal in refusals.items():
        yield f"{name} refuses: {refusal.split('. ')[0].rstrip('.')}."
    yield "Plain training: the same inner loops and the outer loss, run forward; no meta-gradient."
    yield "tasks: unrolled at once. FLOPs: of matrix products and convolutions, loops included."
    if any(row.cost and row.cost.counted_on == "jaxpr" for row in planned.rows):
        yield "FLOPs were counted on the jaxpr: this program's products cannot be read off its HLO."


def _problem(planned: Plan, trainer: Trainer) -> str:
    steps, tasks = planned.inner_steps, trainer.tasks_per_step
    many = f"{tasks} task{'s' * (tasks != 1)} of {steps} inner step{'s' * (steps != 1)}"
    return f"An outer step of {many}"


def _row_cells(row: Row, planned: Plan) -> tuple[str, ...]:
    mark = "*" if row is planned.chosen else ""
    name = row.name if row.exact else f"{row.name} (inexact)"
    fits = "yes" if planned.fits(row) else "no"
    assert row.cost is not None
    return mark, name, str(row.chunk), *_cells(row.cost, planned.plain), fits


def _cells(cost: Cost, plain: Cost) -> tuple[str, ...]:
    parts = map(show_bytes, (cost.peak, cost.arguments, cost.temporaries, cost.output))
    flops = f"{cost.flops / plain.flops:.2f}x" if plain.flops else "-"
    return *parts, f"{cost.peak / plain.peak:.2f}x", _si(cost.flops), flops


def _si(count: float) -> str:
    """Write a count with an SI prefix: 187,883,520 is "187.9 M"."""
    prefixes = ("", " k", " M", " G", " T", " P")
    power = next((i for i in range(len(prefixes)) if count < 1000 ** (i + 1)), len(prefixes) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f}{prefixes[power]}"


def _segments(row: Row) -> Iterator[str]:
    """Yield what an outer step in segments keeps and runs again."""
    plan = row.segments
    if plan is None:
        return
    where = {"device": plan.device, "host": plan.host, "disk": plan.disk}
    kept = [
        f"{count} on the {name} ({show_bytes(count * plan.state_bytes)})"
        for name, count in where.items()
        if count
    ]
    yield (
        f"{row.name}: {plan.segments} segments of {plan.segment} inner steps, {plan.programs} "
        f"programs, {plan.replays} of them replays. States kept: {', '.join(kept) or 'none'}."
    )
    if plan.gradient_bytes:
        most = plan.device_gradients + plan.host_gradients
        yield (
            f"Inner gradients kept: of {most} segments ({show_bytes(most * plan.gradient_bytes)}); "
            f"computed again: of {plan.recomputed}."
        )


AUTO = "auto"


def settled(
    config: dict[str, Any],
    checkpoints: pathlib.Path,
    budget: int | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Return the config of a run, with the engine chosen where it is "auto".

    The choice is made once for a run, before its first checkpoint, and stored in the config
    that its checkpoints record: a run goes on as it began, on whatever device.

    Args:
      config: of the run.
      checkpoints: the folder of its checkpoints.
      budget: in bytes; None: the memory of the device.
      tolerance: of the relative error of a meta-gradient: the fastest engine within it is chosen,
        by a comparison at the initial eta; None: the exact engine with the fewest FLOPs.
    """
    if config["engine"] != AUTO and tolerance is not None:
        raise ValueError(
            f"--tolerance is the error within which engine='auto' chooses an engine, but the "
            f"engine is {config['engine']!r}. Add --config.engine=auto, or leave --tolerance out."
        )
    if config["engine"] != AUTO:
        if budget is not None:
            raise ValueError(
                f"--budget is the memory that engine='auto' chooses an engine for, but the engine "
                f"is {config['engine']!r}. Add --config.engine=auto, or leave --budget out."
            )
        return {key: value for key, value in config.items() if key != AUTO}
    options = sorted(build.set_options(config["engine_options"]))
    if options:
        raise ValueError(
            f'engine="auto" chooses the options of the engine too, but engine_options.{options[0]} '
            "is set. Leave it unset, or name the engine."
        )
    stored = _recorded(checkpoints).get(AUTO)
    import_paths.check_run(checkpoints.parent, stored or {}, allowed=False)  # plans choose ours
    chosen = stored or broadcast(_choice(config, budget, tolerance))
    say(f"engine: {chosen['why']}{' (chosen when the run began)' if stored else ''}.")
    return {**config, AUTO: chosen}


def _choice(
    config: Mapping[str, Any], budget: int | None, tolerance: float | None
) -> dict[str, Any]:
    if tolerance is not None:
        above("metalearn train", 0, tolerance=tolerance)
        budget = device_memory() if budget is None else budget
        row = compare.compared(config, progress=is_first()).cheapest(tolerance, budget)
        return {
            **compare.settings(row),
            "chunk": config["chunk"],
            "why": compare.reason(row, tolerance),
        }
    trainer, tasks = abstract(config)
    planned = plan(trainer, tasks, budget=budget, progress=is_first())
    return {**settings(planned.choose()), "why": planned.reason()}


def _recorded(checkpoints: pathlib.Path) -> dict[str, Any]:
    """Return the config of the newest checkpoint; empty where there is none."""
    record = newest_record(checkpoints)
    return record["config"] if record else {}


def abstract(config: Mapping[str, Any]) -> tuple[Trainer, Any]:
    """Return the trainer of a config, its engine left open, and the shapes of its tasks."""
    read = []

    def tasks() -> Any:
        read.append(build.splits(config["dataset"]))
        return read[-1][:3]

    train, validation, test = jax.eval_shape(tasks)
    splits = read[-1]._replace(train=train, validation=validation, test=test)
    return build.trainer(build.with_open_engine(config), splits, build.layout(config)), train


def settings(row: Row) -> dict[str, Any]:
    """Return the engine and the chunk of a row as a config names them."""
    (name,) = [name for name, made in build.ENGINES.items() if made is type(row.engine)]
    return {"engine": name, "engine_options": changed_fields(row.engine), "chunk": row.chunk}
