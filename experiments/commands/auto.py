"""`engine="auto"`: the engine that `metalearn plan` would choose, once for a run.

The dataset is read on the host, for its shapes, and the outer step is compiled for shapes
alone: nothing is put on the device. See `metalearn.planning.plan` for how the choice is made.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from metalearn import Trainer
from metalearn.checkpoints.manager import Checkpoints
from metalearn.experiments import build, devices
from metalearn.planning.plan import plan
from metalearn.planning.step_cost import Row, changed_fields
from metalearn.sharding.distributed import agreed, say

AUTO = "auto"


def settled(config: dict[str, Any], checkpoints: pathlib.Path) -> dict[str, Any]:
    """Return the config of a run, with the engine chosen where it is "auto".

    The choice is made once for a run, before its first checkpoint, and kept in the config
    that its checkpoints record: a run goes on as it began, on whatever device.
    """
    if config["engine"] != AUTO:
        return config
    given = sorted(build.set_options(config["engine_options"]))
    if given:
        raise ValueError(
            f'engine="auto" chooses the options of the engine too, but engine_options.{given[0]} '
            "is set. Leave it unset, or name the engine."
        )
    if config.get("segment") is not None:
        raise ValueError(
            f'engine="auto" may choose one that keeps what is behind it, and segment='
            f'{config["segment"]} cuts a run into programs. Name the engine, "forward", or leave '
            "`segment` unset."
        )
    kept = _recorded(checkpoints).get(AUTO)
    chosen = kept or agreed(_choice(config))
    say(f"engine: {chosen['why']}{' (chosen when the run began)' if kept else ''}.")
    return {**config, AUTO: chosen}


def _choice(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer, tasks = abstract(config)
    found = plan(trainer, tasks)
    return {**settings(found.choose()), "why": found.reason()}


def _recorded(checkpoints: pathlib.Path) -> dict[str, Any]:
    """Return the config of the newest checkpoint; empty where there is none."""
    if not checkpoints.is_dir():
        return {}
    opened = Checkpoints(checkpoints)
    record = opened.record()
    opened.close()
    return record["config"] if record else {}


def abstract(config: Mapping[str, Any]) -> tuple[Trainer, Any]:
    """Return the trainer of a config, its engine left open, and the shapes of its tasks."""
    read = []

    def tasks() -> Any:
        read.append(build.splits(config["dataset"]))
        return read[-1][:3]

    train, validation, test = jax.eval_shape(tasks)
    splits = read[-1]._replace(train=train, validation=validation, test=test)
    open_config = {**config, "engine": "mixed_flow", "engine_options": {}, "segment": None}
    return build.trainer(open_config, splits, devices.layout(config)), train


def settings(row: Row) -> dict[str, Any]:
    """Return the engine and the chunk of a row as a config names them."""
    (name,) = [name for name, made in build.ENGINES.items() if made is type(row.engine)]
    return {"engine": name, "engine_options": changed_fields(row.engine), "chunk": row.chunk}
