"""From `config.mesh` to the layout of a run, over whatever devices there are.

    mesh.tasks     devices that take tasks of their own; None: as many as tasks_per_step divides by
    mesh.model     pieces that eta is cut into, by `mesh.rules`
    mesh.tangents  devices that share the tangents of the engine "forward"
    mesh.rules     (pattern, axis or None, ...), ...: how a leaf of eta is cut, axis by axis

Where a run is computed is no part of what it computes: another mesh goes on from its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metalearn import Layout, make_mesh
from metalearn._utils.checks import at_least, counts
from metalearn.sharding.batched_means import check_tasks, most_devices
from metalearn.sharding.mesh import AXES, MODEL, TANGENTS, TASKS, format_devices, remaining
from metalearn.sharding.partition import check_rules

DEFAULTS: dict[str, Any] = {TASKS: None, MODEL: 1, TANGENTS: 1, "rules": ()}


def layout(config: Mapping[str, Any]) -> Layout | None:
    """Build the layout of a config over the devices there are; None where one is enough.

    Raises:
      ValueError: for a mesh that the devices, the tasks or the engine do not fit.
    """
    config = {**config, **config.get("auto", {})}  # with the chunks that were chosen
    mesh = {**DEFAULTS, **config.get("mesh", {})}
    check_tasks(config["tasks_per_step"], config["chunk"])
    at_least("mesh", 1, **{axis: mesh[axis] for axis in AXES})
    counts("mesh", 1, **{MODEL: mesh[MODEL], TANGENTS: mesh[TANGENTS]})
    _check(mesh, config)
    rules = tuple(map(_rule, mesh["rules"]))
    check_rules(rules, dict.fromkeys(AXES, 1))
    tasks = _most(mesh, config) if mesh[TASKS] is None else mesh[TASKS]
    if tasks * mesh[MODEL] * mesh[TANGENTS] == 1 and jax.process_count() == 1:
        return None
    return Layout(make_mesh(tasks, mesh[MODEL], mesh[TANGENTS]), rules)


def for_evaluation(config: Mapping[str, Any]) -> Layout | None:
    """Build a layout to evaluate a run with, on other devices than those it was trained on."""
    mesh = {**config.get("mesh", {}), TASKS: None, TANGENTS: 1}
    if len(jax.devices()) % mesh.get(MODEL, 1):
        mesh |= {MODEL: 1, "rules": ()}
    return layout({**config, "mesh": mesh})


def idle(config: Mapping[str, Any], found: Layout | None) -> str:
    """Say how many devices take no part, and why; "" where all do."""
    config = {**config, **config.get("auto", {})}
    taken, there = 1 if found is None else found.mesh.size, len(jax.devices())
    if taken == there:
        return ""
    chunks = "" if config["chunk"] is None else f" in chunks of {config['chunk']}"
    return (
        f"devices: {taken} of {there} take part. tasks_per_step={config['tasks_per_step']}{chunks} "
        "does not divide among more, or config.mesh asks for no more."
    )


def tangents(found: Layout | None) -> dict[str, Any]:
    """Return the options of the engine "forward" that spread its tangents over a layout."""
    if found is None or found.mesh.shape[TANGENTS] == 1:
        return {}
    return {"sharding": NamedSharding(found.mesh, P(TANGENTS))}


def _rule(rule: Any) -> tuple[str, P]:
    words = list(rule) if isinstance(rule, list | tuple) else []
    if len(words) < 2 or not isinstance(words[0], str):
        raise ValueError(
            f"A rule of mesh.rules is a pattern and an axis or None for each axis of an array, "
            f"such as ('kernel$', None, 'model'), not {rule!r}."
        )
    axes = words[1:]
    for axis in axes:
        if axis is not None and (not isinstance(axis, str) or axes.count(axis) > 1):
            raise ValueError(
                f"In the rule {rule!r:.80} of mesh.rules each axis of an array has an axis of the "
                f"mesh of its own, or None, not {axis!r:.80}."
            )
    return words[0], P(*axes)


def _check(mesh: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if mesh[TANGENTS] > 1 and config["engine"] != "forward":
        raise ValueError(
            f"mesh.tangents={mesh[TANGENTS]} spreads the tangents of the engine 'forward', but the "
            f"engine is {config['engine']!r}, which has none. Leave mesh.tangents at 1."
        )
    if mesh[MODEL] > 1 and not mesh["rules"]:
        raise ValueError(
            f"mesh.model={mesh[MODEL]} cuts nothing without mesh.rules, which say what is cut and "
            "how, such as --config.mesh.rules=\"(('kernel$', None, 'model'),)\"."
        )


def _most(mesh: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return the most groups of devices that the tasks of a config divide among."""
    each, processes = mesh[MODEL] * mesh[TANGENTS], jax.process_count()
    there = remaining(len(jax.devices()), mesh[MODEL], mesh[TANGENTS])
    step = processes // math.gcd(processes, each)  # as many devices of each process
    found = most_devices(config["tasks_per_step"], config["chunk"], there, step)
    if not found:
        raise ValueError(
            f"tasks_per_step={config['tasks_per_step']} does not divide among {processes} "
            f"processes with {format_devices(len(jax.devices()))} in all. Take a multiple "
            f"of {step}."
        )
    return found
