"""The devices of a run as a grid, of all its processes.

A mesh has three axes, each of them often 1:

    tasks      every device takes its own tasks, and one all-reduce adds up what they found
    model      eta, and inner states like it, are cut into pieces (see `metalearn.sharding`)
    tangents   the tangents of `Forward` are spread (see `metalearn.engines.forward.tangents`)

With several processes each gives as many devices as the others, or it would have no part in a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from metalearn._utils.checks import is_integer

TASKS, MODEL, TANGENTS = AXES = ("tasks", "model", "tangents")


def make_mesh(
    tasks: int | None = None,
    model: int = 1,
    tangents: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh of `tasks` x `model` x `tangents` devices.

    Args:
      tasks: the size of that axis; None: as many as `devices` have room for.
      model: the size of that axis.
      tangents: the size of that axis.
      devices: those to take from; None: all there are, of all processes.

    Raises:
      ValueError: if that is more devices than there are, or processes give different numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    for axis, size in zip(AXES, (tasks, model, tangents), strict=True):
        if not is_integer(size) and not (axis == TASKS and size is None):
            raise ValueError(f"An axis of a mesh has a number of devices, not {axis}={size!s:.80}.")
    tasks = None if tasks is None else int(tasks)
    if tasks is None:
        tasks = remaining(len(devices), model, tangents)
    sizes = dict(zip(AXES, (tasks, model, tangents), strict=True))
    _check(sizes, devices)
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, auto, devices=_chosen(devices, sizes))


def remaining(there: int, model: int, tangents: int) -> int:
    """Return how many devices are left for tasks; ValueError where they do not divide."""
    each = model * tangents
    if each > 0 and there % each:
        raise ValueError(
            f"The {format_devices(there)} there {'is' if there == 1 else 'are'} cannot be cut into groups "
            f"of model={model} x tangents={tangents} = {each}. Choose sizes that divide, or say "
            "how many of the groups there are to be: `tasks`."
        )
    return there // max(each, 1)


def _check(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> None:
    low = [f"{axis}={size}" for axis, size in sizes.items() if size < 1]
    if low:
        raise ValueError(f"An axis of a mesh has at least one device, not {', '.join(low)}.")
    asked, there = math.prod(map(int, sizes.values())), len(devices)
    if asked > there:
        raise ValueError(
            f"A mesh of {format_sizes(sizes)} takes {format_devices(asked)}, but there "
            f"{'is' if there == 1 else 'are'} {there} ({devices[0].platform}). Ask for no more, "
            "or leave `tasks` unset to take them all. To try a mesh on a CPU: "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )


def _chosen(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> list[jax.Device]:
    """Return the first devices of each process, as many of each."""
    processes = sorted({device.process_index for device in devices})
    share, surplus = divmod(math.prod(sizes.values()), len(processes))
    own = [[d for d in devices if d.process_index == process] for process in processes]
    if surplus or share > min(map(len, own)):
        raise ValueError(
            f"A mesh of {format_sizes(sizes)} takes {format_devices(math.prod(sizes.values()))}, and "
            f"{len(processes)} processes with {', '.join(str(len(d)) for d in own)} of them cannot "
            f"give as many each. Choose sizes whose product divides by {len(processes)}."
        )
    return [device for mine in own for device in mine[:share]]


def auto_axes(sizes: Mapping[str, int]) -> list[str]:
    """Return the axes that are left to the compiler: all but that of tasks, if more than 1."""
    return [axis for axis, size in sizes.items() if axis != TASKS and size > 1]


def on_current_mesh(sharding: NamedSharding) -> NamedSharding:
    """Return a sharding as the code that is being traced has to name it.

    Where some axes of a mesh are mapped by hand (`jax.shard_map`), what is left to the compiler
    belongs to another mesh: the same devices, and other types of axes.
    """
    context = jax.sharding.get_abstract_mesh()
    return sharding if context.empty else NamedSharding(context, sharding.spec)


def format_sizes(sizes: Mapping[str, int]) -> str:
    """Write the sizes of a mesh for a person.

    >>> format_sizes({"tasks": 4, "model": 2, "tangents": 1})
    'tasks=4 x model=2 x tangents=1'
    """
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def format_devices(count: int) -> str:
    """Write a number of devices.

    >>> format_devices(1), format_devices(8)
    ('1 device', '8 devices')
    """
    return f"{count} device{'s' * (count != 1)}"
