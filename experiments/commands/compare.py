"""`metalearn compare`: every engine on a config as it stands, with its error beside its cost.

One outer step at the initial eta is differentiated by every engine and setting that serves the
config (`metalearn.diagnostics.compare`), and the meta-gradients are compared with the exact one. It
runs, unlike `metalearn plan`, so it takes the memory and the time of the engines that it lists.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from metalearn._utils import strict_json
from metalearn._utils.device_memory import show_bytes
from metalearn._utils.readable import aligned
from metalearn.diagnostics import Compared, Comparison, compare
from metalearn.experiments import build
from metalearn.planning.step_cost import changed_fields, short_repr

HEADER = ("engine", "rel. error", "cosine", "memory", "FLOPs", "time")


def show(config: Any, as_json: bool, x64: bool, tolerance: float | None = None) -> None:
    """Print the comparison of a config: a table, or JSON alone."""
    comparison = compared(build.to_json(config), x64, progress=not as_json)
    if as_json:
        print(strict_json.dumps(to_json(comparison, tolerance), indent=2))
    else:
        print("\n".join(table(comparison)))
    if tolerance is None:
        return
    row = comparison.cheapest(tolerance)
    if not as_json:
        print(f"\nChosen: {reason(row, tolerance)}.\n  {_flags(row)}")


def compared(config: Mapping[str, Any], x64: bool = False, progress: bool = False) -> Comparison:
    """Return the comparison of a config, in float64 with `x64`."""
    if x64:
        types = {**config.get("precision", {}), "compute": "float64", "params": "float64"}
        config = {**config, "precision": types} if config.get("model") else config
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        splits = build.splits(config["dataset"])
        trainer = build.trainer(build.with_open_engine(config), splits, build.layout(config))
        tasks = trainer.place(splits.train)
        return compare(trainer, tasks, key=build.key_of(config["seed"]), progress=progress)


def table(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of a table, from the smallest error to the largest."""
    rows = [row for row in comparison.rows if not row.refusal]
    steps, tasks = comparison.inner_steps, comparison.tasks
    yield (
        f"One outer step of {tasks} task{'s' * (tasks != 1)} of {steps} inner "
        f"step{'s' * (steps != 1)}, against {short_repr(comparison.exact)} in {comparison.dtype} "
        f"(norm {comparison.norm:.4g}); {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    yield ""
    rows.sort(key=lambda row: (math.isnan(row.relative_error), row.relative_error))
    yield from aligned([HEADER, *map(_cells, rows)], left=1)
    yield ""
    yield "Relative error and cosine: of the meta-gradient at the initial eta. Time: of one call."
    if not all(row.flops_known for row in rows):
        yield "FLOPs with >=: a solver stops by its residual, and one of its iterations is counted."
    for row in rows:
        for doubt in row.doubts:
            yield f"{short_repr(row.engine)}: {doubt}"
    for row in comparison.rows:
        if row.refusal:
            yield f"{short_repr(row.engine)} refuses: {row.refusal.split('. ')[0].rstrip('.')}."


def _cells(row: Compared) -> tuple[str, ...]:
    assert row.cost is not None
    flops = f"{'' if row.flops_known else '>='}{row.cost.flops:.3g}"
    numbers = f"{row.relative_error:.2g}", f"{row.cosine:.6f}"
    return short_repr(row.engine), *numbers, show_bytes(row.cost.peak), flops, _time(row.seconds)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def to_json(comparison: Comparison, tolerance: float | None = None) -> dict[str, Any]:
    """Return a comparison as JSON values; sizes are in bytes, times in seconds."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "exact": short_repr(comparison.exact),
        "inner_steps": comparison.inner_steps,
        "tasks": comparison.tasks,
        "dtype": comparison.dtype,
        "norm": comparison.norm,
        "tolerance": tolerance,
        "rows": [_row_json(row) for row in comparison.rows],
    }


def _row_json(row: Compared) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("relative_error", "cosine", "seconds")}
    return {
        "name": short_repr(row.engine),
        **settings(row),
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "cost": None if row.cost is None else {**row.cost._asdict(), "peak": row.cost.peak},
        "flops_known": row.flops_known,
        "doubts": list(row.doubts),
        "refusal": row.refusal or None,
    }


def settings(row: Compared) -> dict[str, Any]:
    """Return the engine of a row as a config names it."""
    (name,) = [name for name, made in build.ENGINES.items() if made is type(row.engine)]
    return {"engine": name, "engine_options": changed_fields(row.engine)}


def reason(row: Compared, tolerance: float) -> str:
    """Return a sentence: which engine is chosen, and why."""
    assert row.cost is not None
    return (
        f"{short_repr(row.engine)}: of the engines with a relative error of {tolerance:g} or less "
        f"at the initial eta (its own: {row.relative_error:.2g}), the fastest "
        f"({_time(row.seconds)} a call), in {show_bytes(row.cost.peak)}"
    )


def _flags(row: Compared) -> str:
    chosen = settings(row)
    options = {f"engine_options.{key}": value for key, value in chosen["engine_options"].items()}
    flags = {"engine": chosen["engine"], **options}
    return " ".join(f"--config.{key}={value}" for key, value in flags.items())
