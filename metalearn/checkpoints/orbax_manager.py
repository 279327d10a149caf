"""The checkpoint manager of Orbax, as a store of checkpoints uses it.

The only module that imports Orbax: it is imported when the first store is opened.
"""

from __future__ import annotations

import datetime
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies


class Manager(ocp.CheckpointManager):
    """An Orbax manager that opens damaged directories too: damage is detected on reading."""

    def __init__(self, directory: pathlib.Path, keep: int, best: tuple[str, str] | None):
        """Open or make a directory; `best`: ("max" or "min", the metric's name)."""
        names = ("state", "record")
        super().__init__(directory, options=_options(keep, best), item_names=names)

    def save_items(
        self, step: int, state: Any, record: Any, metrics: dict[str, float] | None
    ) -> bool:
        """Start to save a state and its JSON record; return whether the save has started."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        return self.save(step, args=items, metrics=metrics)

    def read_record(self, step: int) -> Any:
        """Return the JSON record of a step."""
        return self.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record

    def read_state(self, step: int, shapes: Any) -> Any:
        """Return the arrays of a step, as a tree like `shapes`."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self.restore(step, args=items).state

    def read_part(self, step: int, shapes: Any) -> Any:
        """Return some fields of the state of a step, as a tree like `shapes`."""
        where = ocp.checkpoint_utils.construct_restore_args(shapes)
        part = ocp.args.PyTreeRestore(item=shapes, restore_args=where, partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(
            self.directory / str(step) / "state", args=part
        )

    def read_nodes(self, step: int) -> dict[str, str]:
        """Return what `nodes` says of the state of a step, without reading its arrays."""
        place = self.directory / str(step) / "state"
        return nodes(ocp.StandardCheckpointHandler().metadata(place).tree)

    def metrics(self, step: int) -> dict[str, float] | None:
        """Return the metric that a step is ranked by; None if it cannot be read."""
        try:
            metrics = super().metrics(step)
        except (ValueError, OSError, RecursionError):
            return None
        if not isinstance(metrics, dict):
            return None
        finite = all(type(x) in (int, float) and abs(x) < math.inf for x in metrics.values())
        return metrics if finite else None


class _Names:
    """The names of steps as in Orbax, without the times at which they were saved.

    Orbax reads a time from a file of each step, which may be damaged or deleted; it is not used.
    """

    def __init__(self) -> None:
        self._names = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._names.build_name(step)

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._names.find_step(base_path, step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        for checkpoint in self._names.find_all(base_path):
            if checkpoint.path.name == str(checkpoint.step):  # no digits but 0 to 9
                yield _Undated(checkpoint.step, checkpoint.path)


class _Undated(ocp.path.step.Metadata):
    @property
    def commit_timestamp(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(0, datetime.UTC)


def nodes(state: Any) -> dict[str, str]:
    """Return the type and shape of each array as Orbax stores it, and each empty node, by path."""
    flat = ocp.tree.to_flat_dict(state, keep_empty_nodes=True, sep="/")
    return {path: _stored(leaf) for path, leaf in flat.items()}


def _stored(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return "(nothing)"
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def _options(keep: int, best: tuple[str, str] | None) -> ocp.CheckpointManagerOptions:
    latest = policies.LatestN(keep)
    if best is None:
        return ocp.CheckpointManagerOptions(preservation_policy=latest, step_name_format=_Names())
    mode, name = best

    def metric(metrics: Any) -> float:
        return metrics.get(name, math.inf if mode == "min" else -math.inf)  # of another config

    kept = policies.BestN(
        get_metric_fn=metric, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([latest, kept]),
        best_fn=metric,
        best_mode=mode,
        step_name_format=_Names(),
    )
