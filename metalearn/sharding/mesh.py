"""The mesh of a run: the devices of all its processes as a grid.

A mesh has four axes, often of size 1:

    tasks      each device unrolls its own tasks, one all-reduce averages the results
    data       the examples of an inner batch, and inner states by rules, are sharded: a large inner
               run of one task takes several devices (see `metalearn.sharding.inner_run`)
    model      eta, and inner states like it, are sharded (see `metalearn.sharding.partition`)
    tangents   the tangents of `Forward` are sharded (see `metalearn.engines.forward.tangents`)

Every process contributes the same number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from metalearn._utils.checks import is_integer

TASKS, DATA, MODEL, TANGENTS = AXES = ("tasks", "data", "model", "tangents")


def make_mesh(
    tasks: int | None = None,
    model: int = 1,
    tangents: int = 1,
    data: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh of `tasks` x `data` x `model` x `tangents` devices.

    Args:
      tasks: size of the axis "tasks"; None: all of `devices`, divided by the other sizes.
      model: size of the axis "model".
      tangents: size of the axis "tangents".
      data: size of the axis "data": devices that share the inner run of a task.
      devices: the devices to choose from; None: all devices of all processes.

    Raises:
      ValueError: if there are too few devices, or processes would contribute different numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    for axis, size in zip(AXES, (tasks, data, model, tangents), strict=True):
        if not is_integer(size) and not (axis == TASKS and size is None):
            raise ValueError(f"An axis of a mesh has a number of devices, not {axis}={size!s:.80}.")
    tasks = None if tasks is None else int(tasks)
    if tasks is None:
        tasks = remaining(len(devices), data, model, tangents)
    sizes = dict(zip(AXES, (tasks, data, model, tangents), strict=True))
    _check(sizes, devices)
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, auto, devices=_select(devices, sizes))


def remaining(devices: int, data: int, model: int, tangents: int) -> int:
    """Return the size that is left for the axis "tasks"; ValueError if devices do not divide."""
    group = data * model * tangents
    if group > 0 and devices % group:
        raise ValueError(
            f"The {format_devices(devices)} there {'is' if devices == 1 else 'are'} cannot be cut "
            f"into groups of data={data} x model={model} x tangents={tangents} = {group}. Choose "
            "sizes that divide, or say how many of the groups there are to be: `tasks`."
        )
    return devices // max(group, 1)


def _check(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> None:
    low = [f"{axis}={size}" for axis, size in sizes.items() if size < 1]
    if low:
        raise ValueError(f"An axis of a mesh has at least one device, not {', '.join(low)}.")
    required, available = math.prod(map(int, sizes.values())), len(devices)
    if required > available:
        raise ValueError(
            f"A mesh of {format_sizes(sizes)} takes {format_devices(required)}, but there "
            f"{'is' if available == 1 else 'are'} {available} ({devices[0].platform}). Ask for no "
            "more, or leave `tasks` unset to take them all. To try a mesh on a CPU: "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )


def _select(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> list[jax.Device]:
    """Return the devices of a mesh: the first ones of each process, equally many of each."""
    processes = sorted({device.process_index for device in devices})
    count = math.prod(sizes.values())
    share, surplus = divmod(count, len(processes))
    own = [[d for d in devices if d.process_index == process] for process in processes]
    if surplus or share > min(map(len, own)):
        raise ValueError(
            f"A mesh of {format_sizes(sizes)} takes {format_devices(count)}, and "
            f"{len(processes)} processes with {', '.join(str(len(d)) for d in own)} of them cannot "
            f"give as many each. Choose sizes whose product divides by {len(processes)}."
        )
    return [device for local in own for device in local[:share]]


def check_axis_types(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError for a mesh with axes that are not of type `Auto`."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = [f"{axis!r} is {kind.name}" for axis, kind in pairs if kind != AxisType.Auto]
    if others:
        count = len(mesh.axis_names)
        raise ValueError(
            "A layout needs a mesh whose axes are all of type Auto, along which the compiler "
            f"partitions, but of this one {', '.join(others)}. `metalearn.make_mesh()` makes one. "
            "`jax.make_mesh` makes axes Explicit where no types are named: pass "
            f"`axis_types=(jax.sharding.AxisType.Auto,) * {count}`."
        )


def auto_axes(sizes: Mapping[str, int]) -> list[str]:
    """Return the axes that the compiler partitions: those larger than 1, other than "tasks"."""
    return [axis for axis, size in sizes.items() if axis != TASKS and size > 1]


def on_current_mesh(sharding: NamedSharding) -> NamedSharding:
    """Return the sharding on the mesh of the current trace.

    Inside `jax.shard_map`, constraints on the axes that the compiler partitions must name the
    abstract mesh of the trace: the same devices, with other types of axes.
    """
    context = jax.sharding.get_abstract_mesh()
    return sharding if context.empty else NamedSharding(context, sharding.spec)


def format_sizes(sizes: Mapping[str, int]) -> str:
    """Format the sizes of a mesh.

    >>> format_sizes({"tasks": 4, "data": 1, "model": 2, "tangents": 1})
    'tasks=4 x data=1 x model=2 x tangents=1'
    """
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def format_devices(count: int) -> str:
    """Format a number of devices.

    >>> format_devices(1), format_devices(8)
    ('1 device', '8 devices')
    """
    return f"{count} device{'s' * (count != 1)}"
